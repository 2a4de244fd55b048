"""What a run will cost, from shapes alone: multiply-adds, tokens, memory, GPU-hours.

Models are built and run on PyTorch's ``meta`` device, whose tensors have shapes and no values:
seconds on one CPU core, whatever the size. G and T are 10^9 and 10^12, GB are 10^9 bytes.
"""

import math
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from bevt_lib.base import distributed
from bevt_lib.base.config import Finetune, Pretrain
from bevt_lib.model.bevt import BEVT, IMAGE_FRAMES
from bevt_lib.model.classifier import Classifier
from bevt_lib.tokenizers.base import FrozenTokenizer
from bevt_lib.training import loop, optim, step

GPU, GPU_PEAK = "A100", 312e12  # bf16 or fp16 operations per second, dense; NVIDIA's data sheet
# Share of the peak in training Swin-B. Others measured 0.08 on images (A100, 282 a second:
# microsoft/Swin-Transformer, pull request 234) and 0.06 on clips (V100, 16 GPU-hours a K400 epoch:
# SwinTransformer/Video-Swin-Transformer, issue 14).
SWIN_SHARE = 0.07
TOKENIZER_SHARE = 0.25  # ASSUMED: large convolutions, in fp16 on CUDA by DALL-E's own code
PASSES = 3  # of the student: forward, and ASSUMED twice as much backward
NORM_COST = 5  # fvcore's multiply-adds per LayerNorm element; the paper's figures hold them


@dataclass(frozen=True)
class Count:
    """Multiply-adds of a forward pass by PyTorch operation, and its LayerNorm elements."""

    by_op: dict[str, int]
    norm_elements: int

    @property
    def total(self) -> int:
        """Convolutions, linear layers and both products of attention; nothing else."""
        return sum(self.by_op.values())

    @property
    def fvcore(self) -> int:
        """The total in fvcore's convention, which the paper's figures follow."""
        return self.total + NORM_COST * self.norm_elements


def count(run: Callable[..., Any], *arguments: Any) -> Count:
    """Count the multiply-adds of ``run(*arguments)``, on any device, without gradient."""
    norm = torch.ops.aten.native_layer_norm
    elements = {norm: lambda shape, *_, **__: 2 * math.prod(shape)}  # halved below
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=elements) as counter:
        run(*arguments)
    # PyTorch counts a multiply-add as two operations.
    by_op = {str(op): n // 2 for op, n in counter.get_flop_counts()["Global"].items()}
    return Count(by_op, norm_elements=by_op.pop(str(norm), 0))


class Bf16(TorchFunctionMode):
    """Cast as CUDA's autocast to bf16 does in our models; the meta device has no autocast."""

    DOWN = (F.linear, F.conv3d, F.conv_transpose3d, Tensor.matmul)
    UP = (F.layer_norm, Tensor.softmax, F.cross_entropy)

    def __init__(self) -> None:
        super().__init__()
        self.weights: dict[Tensor, Tensor] = {}  # a weight is cast once, as by autocast

    def __torch_function__(self, func, types, args=(), kwargs=None):
        dtype = torch.bfloat16 if func in self.DOWN else torch.float32 if func in self.UP else None
        if dtype:
            args, kwargs = tree_map_only(Tensor, lambda x: self.cast(x, dtype), (args, kwargs))
        return func(*args, **(kwargs or {}))

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Cast a floating-point tensor."""
        if not x.is_floating_point() or x.dtype == dtype:
            return x
        copy = x.to(dtype)
        return self.weights.setdefault(x, copy) if isinstance(x, nn.Parameter) else copy


def kept_bytes(module: nn.Module, run: Callable[..., Any], *arguments: Any) -> int:
    """Sum the bytes that ``run(*arguments)`` keeps for the backward pass, without the parameters.

    A storage counts whole and once. On any device; inside :class:`Bf16` as under autocast, where
    cast copies of the parameters count.
    """
    weights = {p.untyped_storage()._cdata for p in module.parameters()}
    kept: dict[int, Tensor] = {}  # holds the tensors, so that no address comes twice

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage()._cdata] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        run(*arguments)
    return sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in weights)


@dataclass(frozen=True, kw_only=True)
class Item:
    """One clip or image of a run: its tokens, what its forward pass multiplies, its loss."""

    text: str  # the multiply-adds in words
    student: int  # multiply-adds of a forward pass
    tokenizer: int = 0
    patches: int  # tokens in
    places: int = 0  # tokens the tokenizer names
    hidden: int = 0  # of these, what the student names
    loss: Callable[[int], Tensor]  # of a micro-batch of so many, on meta


Recipe = Pretrain | Finetune
Items = Mapping[str, Item]  # by stream


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Make a tensor without values."""
    return torch.empty(shape, dtype=dtype, device="meta")


def amount(number: float) -> str:
    """Write multiply-adds or bytes in T, G or M."""
    power, unit = (12, "T") if number >= 1e12 else (9, "G") if number >= 1e9 else (6, "M")
    return f"{number / 10**power:,.2f} {unit}"


def parameters(module: nn.Module) -> int:
    """Count a model's parameters."""
    return sum(p.numel() for p in module.parameters())


def write(lines: Mapping[str, str]) -> str:
    """Write a plan's lines under each other, values in one column, wrapped."""
    return "\n".join(textwrap.fill(value, 96, initial_indent=f"{key:17s} ",
                                   subsequent_indent=18 * " ")
                     for key, value in lines.items())  # fmt: skip


def hidden_places(target: int, steps: int, tube: tuple[float, float], frames_per_step: int) -> int:
    """Expect the places a tube hides: ``target`` cells over the mean of its lengths in time.

    A little above the mean of :func:`bevt_lib.model.masking.tube_mask`, whose blocks at times
    stop before their target.
    """
    shortest, longest = (max(1, int(steps * share)) for share in tube)
    return round(target * (shortest + longest) / 2 * frames_per_step)


def token_item(recipe: Pretrain, model: BEVT, tokenizer: FrozenTokenizer, stream: str) -> Item:
    """Measure one item of a pretraining stream; ``model`` and ``tokenizer`` lie on meta."""
    # How many places there are, how many are hidden, and in how many frames.
    per_step, side = model.frames_per_step[stream], recipe.data.size
    shape = (3, recipe.data.frames if stream == "video" else IMAGE_FRAMES, side, side)
    _, frames, high, wide, dim = model.features(stream, empty(1, *shape)).shape
    places = frames * high * wide
    tube = recipe.masking.tube if stream == "video" else (1.0, 1.0)
    hidden, named = (
        hidden_places(target, frames // per_step, tube, per_step)
        for target in (recipe.masking.target((high, wide)), 1)  # 1: frames that hold any
    )
    # Multiply-adds: encoder and decoder, the head at one place, the tokenizer on one frame.
    view = (high * tokenizer.factor, wide * tokenizer.factor, 3)
    body = count(model.features, stream, empty(1, *shape)).total
    head = count(model.token_head, empty(1, dim)).total
    naming = count(tokenizer.encode, empty(1, *view, dtype=torch.uint8)).total
    rest = (f" on about {named} frames that hold one ({amount(frames * naming)} on all {frames}, as"
            " released)" if named < frames else "")  # fmt: skip

    def loss(items: int) -> Tensor:
        noise = empty(items, model.noise_sizes[stream])
        x = model.features(stream, empty(items, *shape), noise=noise).flatten(0, 3)
        logits = model.token_head(x[: items * hidden])  # without values no mask can choose
        targets = empty(items * hidden, dtype=torch.int64)
        return F.cross_entropy(logits.float(), targets, reduction="sum")

    return Item(
        text=f"{amount(body)} backbone and decoder + {amount(hidden * head)} token head on about "
             f"{hidden:,} hidden places ({amount(places * head)} on all {places:,}, as released) + "
             f"{amount(named * naming)} tokenizer{rest}",
        student=body + hidden * head, tokenizer=named * naming, places=named * high * wide,
        hidden=hidden, loss=loss,
        patches=math.prod(model.patch_embed[stream](empty(1, *shape)).shape[1:4]),
    )  # fmt: skip


def clip_item(recipe: Finetune, model: Classifier) -> Item:
    """Measure one clip of fine-tuning; ``model`` lies on meta."""
    shape = (3, recipe.data.frames, recipe.data.size, recipe.data.size)
    forward = count(model.logits, empty(1, *shape))

    def loss(items: int) -> Tensor:
        part = {"pixels": empty(items, *shape), "label": empty(items, dtype=torch.int64)}
        return model({"clip": part}, {"clip": empty(items, model.noise_sizes["clip"])})["clip"].loss

    return Item(
        text=f"{amount(forward.total)} for {shape[1]} frames ({amount(forward.fvcore)} by fvcore, "
             f"which adds {NORM_COST} per LayerNorm element)",
        student=forward.total, loss=loss,
        patches=math.prod(model.patch_embed(empty(1, *shape)).shape[1:4]),
    )  # fmt: skip


def memory(
    recipe: Recipe, model: nn.Module, items: Items, split: loop.Split,
    tokenizer: nn.Module | None = None,
) -> dict[str, int]:  # fmt: skip
    """Estimate the bytes a GPU needs, by what they are for.

    Attention's logits are counted, which a GPU's fused kernel doesn't keep, if it takes the window.
    Not counted: the work space of single operations, the gaps between tensors and, with
    ``run.checkpoint_activations``, what one block keeps when it is computed again. On CPU, at a
    quarter of Swin-B's width, the peak of a forward and backward pass was 0.1 % above what the
    forward pass keeps; we measured on no GPU.
    """
    # DDP's buckets: the gradients again, on their way between GPUs.
    state = {"weights": 1, "gradients": 1, "AdamW's moments": 2,
             "DDP's buckets": split.processes > 1, "average": recipe.optim.ema > 0}  # fmt: skip
    step.checkpoint_blocks(model, recipe.run.checkpoint_activations)
    with Bf16():
        kept = kept_bytes(model, lambda: [items[s].loss(n) for s, n in split.micro.items()])
    return {
        f"{', '.join(k for k, copies in state.items() if copies)} (float32)":
            4 * sum(state.values()) * parameters(model),
        **({"tokenizer": 4 * parameters(tokenizer)} if tokenizer else {}),
        "kept for backward by a micro-batch (bf16 autocast)": kept,
    }  # fmt: skip


def gpu_hours(student: int, tokenizer: int) -> float:
    """Estimate the GPU-hours of so many multiply-adds from the shares of the peak above."""
    return 2 * (student / SWIN_SHARE + tokenizer / TOKENIZER_SHARE) / GPU_PEAK / 3600


def describe(
    recipe: Recipe, model: nn.Module, items: Items, tokenizer: FrozenTokenizer | None = None
) -> dict[str, str]:
    """Describe a run by one line a fact: how it is cut, how long it is, what it costs.

    Models lie on meta. Raises ValueError where the batches can't be cut evenly.
    """
    # How a global batch is cut, and how many steps there are.
    batches, processes = recipe.batches, recipe.run.processes or distributed.world_size()
    split = loop.split_batch(batches, processes, recipe.run.micro_batch)
    first, expected = next(iter(batches)), recipe.data.expected_items
    steps = optim.total_steps(recipe.optim, expected)
    epochs = f" ({expected:,} {first}s, {expected / batches[first]:,.0f} steps an epoch)"
    # What one step takes.
    patches, places, hidden, student, frozen = (
        sum(n * getattr(items[stream], field) for stream, n in batches.items())
        for field in ("patches", "places", "hidden", "student", "tokenizer")
    )
    held = memory(recipe, model, items, split, tokenizer)
    parts = " + ".join(f"{amount(n)}B {what}" for what, n in held.items())
    passes = PASSES + recipe.run.checkpoint_activations
    hours = gpu_hours(steps * passes * student, steps * frozen)
    digits = 1 if hours / processes >= 1 else 3
    # What is said of the tokenizer, where there is one.
    encoder = ids = naming = share = ""
    if tokenizer:
        encoder = f" + {parameters(tokenizer.encoder):,} in the tokenizer's encoder, frozen"
        ids = f", {places:,} ids named, about {hidden:,} of them hidden"
        naming = f" + 1 x {amount(frozen)} frozen tokenizer"
        share = f", tokenizer at {TOKENIZER_SHARE:.0%}"
        if isinstance(recipe, Pretrain) and not recipe.tokens.fp16:
            share += " (with --tokens.fp16)"
    return {
        "preset": recipe.name,
        "parameters": f"{parameters(model):,} trained{encoder}",
        "global batch": " + ".join(f"{n} {s}s" for s, n in batches.items()),
        "cut into": str(split),
        "steps": f"{steps:,}{epochs if expected else ''}",
        "tokens a step": f"{patches:,} patches in{ids}",
        **{f"one {s}": f"multiply-adds forward: {item.text}" for s, item in items.items()},
        "one step": f"multiply-adds: {passes} x {amount(student)} student (ASSUMED: backward is "
                    f"twice forward){naming}",
        "memory a GPU": f"{amount(sum(held.values()))}B = {parts}; work space not counted",
        "GPU-hours": f"{hours:,.{digits}f} on {GPU}s, {hours / processes:,.{digits}f} h on "
                     f"{processes} of them; ASSUMED: student at {SWIN_SHARE:.0%} of "
                     f"{GPU_PEAK / 1e12:.0f} TFLOP/s{share}, no waiting for data",
    }  # fmt: skip
