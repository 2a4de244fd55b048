"""How long training takes beside what people would use instead, and where its time goes.

Two sides take turns at the same work in one process; the other side is
:mod:`bevt_lib.scoring.textbook`. Seconds are the processor's on a CPU, whose threads other programs
disturb, and those of the clock on a GPU, where both sides compute in bf16.
"""

import copy
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from typing import Any

import dall_e
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from bevt_lib.base import distributed
from bevt_lib.base.config import Model, Optim, Run
from bevt_lib.base.memory import keep_freed_memory
from bevt_lib.base.trainable import Batch
from bevt_lib.model.bevt import BEVT
from bevt_lib.model.classifier import Classifier
from bevt_lib.model.masking import block_mask, tube_mask
from bevt_lib.scoring import cost, textbook
from bevt_lib.tokenizers.base import add_tokens
from bevt_lib.tokenizers.dalle import DalleTokenizer, build
from bevt_lib.training.step import AUTOCAST, Update, choose_precision
from bevt_lib.training.task import Task

SWIN_T = Model(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24))
SWIN_B = Model()
MASKS = 16  # seeds of masks, in turn: the frames without a hidden place are not named
# AdamW works as ever and moves nothing, so that all turns see the same weights.
OPTIM = Optim(lr=1e-30, weight_decay=0.0, clip_norm=3.0, clips=1, steps=1)
Row = dict[str, Any]
Work = Callable[[int], Any]  # takes the number of the turn


@dataclass(frozen=True)
class Sizes:
    """What is measured; the smallest are for a rehearsal."""

    joint: Model = SWIN_B
    tuned: Model = SWIN_T
    clips: int = 1  # of a joint step and of a fine-tuning step
    images: int = 8
    side: int = 224
    frames: int = 16
    tokenizer: tuple[int, int, int] = (256, 2, 8192)
    matrix: int = 2048  # side of the matrix product that stands for the limit


CPU_SIZES = Sizes()
GPU_SIZES = Sizes(tuned=SWIN_B, clips=4, images=32, frames=32, matrix=8192)
TINY = Model(embed_dim=24, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), window=(2, 2, 2))
TINY_SIZES = Sizes(TINY, TINY, images=2, side=64, frames=4, tokenizer=(32, 1, 64), matrix=256)


def seconds(work: Work, turn: int, device: torch.device) -> tuple[float, Any]:
    """Time one turn; give what it returns, too."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    began = clock()
    result = work(turn)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - began, result


def race(name: str, ours: Work, other: Work, pairs: int) -> Row:
    """Let the kit and the textbook take turns.

    The row has the medians of both sides' seconds, and the median, lowest and highest ratio of a
    turn; on a GPU the peaks of their memory in GB. "differs" is the largest relative difference of
    the numbers that the works return, if any: losses and lengths of gradients. Both have the
    process's freed memory kept, which :func:`memory_row` measures apart.
    """
    device = distributed.device()
    keep_freed_memory()
    sides = {"ours": ours, "textbook": other}
    times: dict[str, list[float]] = {who: [] for who in sides}
    results: dict[str, list[Any]] = {who: [] for who in sides}
    peaks = dict.fromkeys(sides, 0.0)
    for turn in range(pairs + 1):  # the first only warms up
        for who in list(sides) if turn % 2 else list(sides)[::-1]:
            taken, result = seconds(sides[who], turn, device)
            results[who].append(result)
            if turn:
                times[who].append(taken)
                if device.type == "cuda":
                    peaks[who] = max(peaks[who], torch.cuda.max_memory_allocated() / 1e9)
    row = compare(name, times["ours"], times["textbook"])
    if device.type == "cuda":
        row |= {"memory": peaks["ours"], "textbook_memory": peaks["textbook"]}
    if results["ours"][0] is not None:
        row["differs"] = np.abs(np.array(results["ours"]) / np.array(results["textbook"]) - 1).max()
    return rounded(row)


def compare(name: str, ours: Sequence[float], textbook: Sequence[float]) -> Row:
    """Make a row of the seconds of turns."""
    ratios = np.array(textbook) / np.array(ours)
    return {"name": name, "ours": np.median(ours), "textbook": np.median(textbook),
            "ratio": np.median(ratios), "low": ratios.min(), "high": ratios.max()}  # fmt: skip


def rounded(row: Row) -> Row:
    """Give a row's numbers with four digits."""
    return {k: v if isinstance(v, str) else float(f"{v:.4g}") for k, v in row.items()}


class Shadow:
    """A textbook training step: forward, backward, clip the gradient, AdamW."""

    def __init__(self, model: nn.Module, loss: Callable[[Any], Any], optim: Optim):
        self.model, self.loss, self.optim = model.to(distributed.device()).train(), loss, optim
        self.adamw = torch.optim.AdamW(model.parameters(), lr=optim.lr, betas=optim.betas,
                                       weight_decay=optim.weight_decay)  # fmt: skip

    def step(self, prepared: Any) -> tuple[float, float]:
        """Make a step; return its loss and the length of its gradient."""
        with autocast():
            loss = self.loss(prepared)
        self.adamw.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.optim.clip_norm)
        self.adamw.step()
        return loss.item(), norm.item()


def moved(update: Update, batch: Batch) -> tuple[float, float]:
    """Make a step of the kit's; return its loss and the length of its gradient."""
    entry = update.step([batch], 0, 0.0, {})
    return entry["loss"], entry["grad_norm"]


def autocast() -> Any:
    """Compute as the kit's steps do by themselves: in bf16 on a GPU, in float32 on a CPU."""
    device = distributed.device()
    kind = AUTOCAST.get(choose_precision("auto", device))
    return torch.autocast(device.type, kind) if kind else nullcontext()


class JointStep:
    """The joint pretraining step, from pixels to moved weights, by both sides.

    Equal start weights, random pixels, masks of the turn's seed, token ids of a tokenizer with
    random weights. ``hidden_only=False``: the kit names all frames, too.
    """

    def __init__(self, sizes: Sizes, *, hidden_only: bool = True):
        torch.manual_seed(0)
        self.sizes, self.hidden_only, self.device = sizes, hidden_only, distributed.device()
        a = replace(sizes.joint, drop_path=0.0)
        model = BEVT(a, vocab_size=sizes.tokenizer[2])
        self.tokenizer = DalleTokenizer(*build(*sizes.tokenizer)).to(self.device)
        self.encoder = as_packaged(self.tokenizer, sizes)
        other = textbook.TextbookBEVT(model, a)
        self.shadow = Shadow(other, lambda batch: sum(other(batch).values()), OPTIM)
        task = Task(model=model, sources={}, steps=1, prepare=self.prepare)
        self.update = Update.start(task, OPTIM, Run(folder=""))

    def batch(self, turn: int) -> dict[str, Any]:
        """Make the clips and images of a turn, on the device."""
        s, grid, rng = self.sizes, self.sizes.side // 16, np.random.default_rng(turn)
        shapes = {"video": (s.clips, s.frames), "image": (s.images, 1)}
        batch = {}
        for stream, (items, frames) in shapes.items():
            rngs = [Random(turn % MASKS + MASKS * n) for n in range(items)]
            masks = [tube_mask((frames // 2, grid, grid), r) if stream == "video"
                     else block_mask((grid, grid), r)[None] for r in rngs]  # fmt: skip
            views = {"pixels": s.side, "tokenizer_input": 8 * grid}
            part = {k: torch.from_numpy(rng.integers(0, 256, (items, frames, n, n, 3), np.uint8))
                    for k, n in views.items()}  # fmt: skip
            part |= {"mask": torch.from_numpy(np.stack(masks)), "position": torch.arange(items)}
            batch[stream] = {k: v.to(self.device) for k, v in part.items()}
        return batch

    def prepare(self, batch: Any, step: int) -> Any:
        return add_tokens(batch, self.tokenizer, hidden_only=self.hidden_only,
                          fp16=self.device.type == "cuda")  # fmt: skip

    def ours(self, turn: int) -> tuple[float, float]:
        return moved(self.update, self.batch(turn))

    def textbook(self, turn: int) -> tuple[float, float]:
        return self.shadow.step(textbook.add_all_tokens(self.batch(turn), self.encoder))


def joint_rows(sizes: Sizes, pairs: int) -> Iterator[Row]:
    """Race the joint step, with the frames named that the loss asks for and with all."""
    for name, hidden_only in (("joint_step", True), ("joint_step, all frames named", False)):
        step = JointStep(sizes, hidden_only=hidden_only)
        turns = max(pairs, MASKS) if hidden_only and sizes.side > 64 else pairs
        yield race(name, step.ours, step.textbook, turns)


def clips(sizes: Sizes) -> Tensor:
    """Make normalised random clips (clips, 3, frames, side, side)."""
    shape = (sizes.clips, 3, sizes.frames, sizes.side, sizes.side)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(distributed.device())


def classifiers(a: Model) -> tuple[Classifier, nn.Module]:
    """Build the kit's and torchvision's, equal weights: small windows' biases as released."""
    a = replace(a, drop_path=0.0, released_quirks=True)
    torch.manual_seed(0)
    model = Classifier(a, num_classes=400)
    return model, textbook.build_classifier(model, a)


def tuning_sides(sizes: Sizes) -> tuple[Work, Work]:
    """Give the fine-tuning step of either side."""
    model, other = classifiers(sizes.tuned)
    pixels = clips(sizes)
    label = torch.arange(len(pixels), device=pixels.device)
    task = Task(model=model, sources={}, steps=1, prepare=lambda batch, step: batch)
    update = Update.start(task, OPTIM, Run(folder=""))
    shadow = Shadow(other, lambda x: F.cross_entropy(other(x).float(), label), OPTIM)
    batch: Any = {"clip": {"pixels": pixels, "label": label, "position": torch.arange(len(label))}}
    return lambda turn: moved(update, batch), lambda turn: shadow.step(pixels)


def tuning_rows(sizes: Sizes, pairs: int) -> Iterator[Row]:
    """Race the fine-tuning step."""
    yield race("finetune_step", *tuning_sides(sizes), pairs)


def inference_rows(sizes: Sizes, pairs: int) -> Iterator[Row]:
    """Race the classifiers' forward pass: Swin-T and Swin-B, or the rehearsal's."""
    pixels = clips(sizes)
    for name, a in {"inference_t": sizes.tuned, "inference_b": sizes.joint}.items():
        model, other = classifiers(a)
        model.to(pixels.device).eval(), other.to(pixels.device).eval()
        with torch.inference_mode(), autocast():
            yield race(name, partial(score, model.logits, pixels), partial(score, other, pixels),
                       pairs)  # fmt: skip


def memory_rows(sizes: Sizes, pairs: int) -> Iterator[Row]:
    """Race the textbook's fine-tuning step with freed memory kept and without: two processes."""
    start = multiprocessing.get_context("spawn").Pool
    jobs = (sizes, torch.get_num_threads())
    with (
        start(1, in_a_process, (*jobs, True)) as kept,
        start(1, in_a_process, (*jobs, False)) as usual,
    ):
        turns = [tuple(side.apply(one_turn, (n,)) for side in (kept, usual))
                 for n in range(pairs + 1)]  # fmt: skip
    ours, others = zip(*turns[1:], strict=True)
    yield rounded(compare("textbook's finetune_step, memory kept", ours, others))


started: list[Work] = []  # of a process of its own


def in_a_process(sizes: Sizes, threads: int, kept: bool) -> None:
    """Start a process that makes the textbook's steps."""
    torch.set_num_threads(threads)
    if kept:
        keep_freed_memory()
    started.append(tuning_sides(sizes)[1])


def one_turn(turn: int) -> float:
    """Time a turn of this process's work."""
    return seconds(started[0], turn, distributed.device())[0]


def score(classify: Callable[[Tensor], Tensor], pixels: Tensor, turn: int) -> float:
    """Classify clips; give the length of their scores, to compare."""
    return classify(pixels).norm().item()


def as_packaged(tokenizer: DalleTokenizer, sizes: Sizes) -> dall_e.Encoder:
    """Give a tokenizer's encoder as the DALL-E package builds it."""
    encoder, _ = build(*sizes.tokenizer)
    encoder.load_state_dict(tokenizer.encoder.state_dict())
    return encoder.to(distributed.device())


def tokenizing_rows(sizes: Sizes, pairs: int) -> Iterator[Row]:
    """Race the tokenizer on all frames of a clip; "changed" is the share of ids that differ."""
    torch.manual_seed(0)
    device, n = distributed.device(), sizes.side // 2
    tokenizer = DalleTokenizer(*build(*sizes.tokenizer)).to(device)
    encoder = as_packaged(tokenizer, sizes)
    frames = torch.randint(0, 256, (sizes.clips * sizes.frames, n, n, 3), dtype=torch.uint8)
    frames, ids = frames.to(device), {}

    def ours(turn: int) -> None:
        with torch.autocast("cuda", torch.float16, enabled=device.type == "cuda"):
            ids["ours"] = tokenizer.encode(frames)

    def theirs(turn: int) -> None:
        ids["textbook"] = textbook.name_frames(encoder, frames)

    row = race("tokenizing", ours, theirs, pairs)
    yield row | {"changed": float((ids["ours"] != ids["textbook"]).float().mean())}


def limit_rows(sizes: Sizes, pairs: int) -> Iterator[Row]:
    """Compare the multiply-adds a second of each part's forward pass with a matrix product's.

    Those that the definition takes are counted: Winograd's convolutions make do with fewer.
    """
    device, view = distributed.device(), sizes.side // 2
    model = BEVT(sizes.joint, vocab_size=sizes.tokenizer[2]).to(device).eval()
    tokenizer = DalleTokenizer(*build(*sizes.tokenizer)).to(device)
    frames = torch.zeros((sizes.frames, view, view, 3), dtype=torch.uint8, device=device)
    square = nn.Linear(sizes.matrix, sizes.matrix, bias=False).to(device)
    parts: dict[str, tuple[Callable[[Any, Tensor], Tensor], nn.Module, Tensor]] = {
        "matrix product": (nn.Linear.forward, square, square.weight),
        "tokenizer": (DalleTokenizer.encode, tokenizer, frames),
    }
    x = model.patch_embed["video"](clips(sizes)[:1]).detach()
    for number, stage in enumerate(model.swin.stages, 1):
        parts[f"stage {number}"] = (run_stage, stage, x)
        x = run_stage(stage, x).detach()
    parts["token head"] = (nn.Linear.forward, model.token_head, x.new_ones(1000, x.shape[-1]))
    rates = {}
    for name, (run, module, given) in parts.items():
        products = cost.count(run, copy.deepcopy(module).to("meta"), given.to("meta")).total
        work = partial(run, module, given)
        with torch.inference_mode(), autocast():
            turns = [seconds(partial(once, work), n, device) for n in range(pairs + 1)]
        rates[name] = products / float(np.median([taken for taken, _ in turns[1:]]))
        yield {"name": name, "multiply_adds": products, "per_second": float(f"{rates[name]:.4g}"),
               "share": round(rates[name] / rates["matrix product"], 3)}  # fmt: skip


def once(work: Callable[[], Any], turn: int) -> None:
    """Do what is the same in every turn."""
    work()


def run_stage(stage: Any, x: Tensor) -> Tensor:
    """Run a stage's blocks and the merging behind them, without noise."""
    for block in stage.blocks:
        x = block(x, None)
    return x if stage.downsample is None else stage.downsample(x)


def profile_rows(sizes: Sizes, most: int = 12) -> Iterator[Row]:
    """Give the operations in which a joint step spends most of its time, on either side."""
    step = JointStep(sizes)
    cuda = step.device.type == "cuda"
    for who, work in {"ours": step.ours, "textbook": step.textbook}.items():
        work(0)
        activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
        with profile(activities=[activity]) as watched:
            work(1)
        field = "self_device_time_total" if cuda else "self_cpu_time_total"
        spent = {e.key: getattr(e, field) for e in watched.key_averages()}
        for name in sorted(spent, key=spent.__getitem__, reverse=True)[:most]:
            share = spent[name] / sum(spent.values())
            yield {"name": name, "who": who, "share": round(share, 4)}


def growth_rows(sizes: Sizes, pairs: int) -> Iterator[Row]:
    """Race the fine-tuning step as clips grow; "kept" are the GB kept for the backward pass."""
    lengths, sides = ((8, 16, 32), (112, 224, 320)) if sizes.side > 64 else ((4, 8), (32, 64))
    cases = [(n, sides[1]) for n in lengths] + [(lengths[1], n) for n in sides if n != sides[1]]
    for frames, side in cases:
        grown = replace(sizes, tuned=sizes.tuned, clips=1, frames=frames, side=side)
        model, other = classifiers(grown.tuned)
        pixels = clips(grown)
        kept = {k: cost.kept_bytes(m, run, pixels) / 1e9 for k, m, run in
                (("kept", model, model.logits), ("textbook_kept", other, other))}  # fmt: skip
        row = race(f"{frames} frames of {side} px", *tuning_sides(grown), min(pairs, 2))
        yield row | {k: round(v, 4) for k, v in kept.items()}
