"""The one training loop: image stream, joint pretraining, fine-tuning and the tokenizer.

Step is the only state: learning rate, epoch, sample order and noise are functions of it, so that a
run resumed from a checkpoint, on any number of processes, does what it would have done.
"""

import contextlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from bevt_lib import checkpoint, dist
from bevt_lib.augment import one_thread
from bevt_lib.config import Optim, Run
from bevt_lib.datasets import Positions, step_batches
from bevt_lib.optim import learning_rate, parameter_groups, start_average, update_average
from bevt_lib.seeds import Stream, uniform_noise

Batch = dict[str, dict[str, Any]]
Trainable = Any  # an nn.Module with forward(batch, noise), counts(batch) and noise_sizes
NOISE_STREAM = {"video": Stream.VIDEO, "image": Stream.IMAGE}
TIMINGS = ("items_per_s", "data_wait")  # in the record, but not part of the result


@dataclass(frozen=True)
class Source:
    """One stream of a run: where its items come from and how many one step takes in all."""

    items: Positions
    batch: int  # global


@dataclass(frozen=True)
class Split:
    """How a global batch is cut: processes x accumulation x micro-batch, for every stream."""

    processes: int
    accumulation: int
    micro: dict[str, int]

    def __str__(self) -> str:
        parts = " + ".join(f"{n} {stream}" for stream, n in self.micro.items())
        return f"{self.processes} process(es) x {self.accumulation} micro-batch(es) of {parts}"


def split_batch(batches: Mapping[str, int], processes: int, micro_batch: int) -> Split:
    """Cut the global batches {stream: items} for a number of processes.

    ``micro_batch`` bounds the first stream's items per forward pass; 0: no accumulation. Raises
    ValueError where the batches can't be cut evenly.
    """
    first = next(iter(batches.values()))
    micro = micro_batch or first // processes
    accumulation = first // (processes * micro) if micro else 0
    for stream, batch in batches.items():
        if (
            not accumulation
            or batch % (processes * accumulation)
            or accumulation * micro * processes != first
        ):
            raise ValueError(
                f"a global batch of {batch} ({stream}) can't be cut into {processes} process(es) x "
                f"micro-batches of {micro}: choose --run.micro-batch and a number of processes "
                "that divide it"
            )
    cut = processes * accumulation
    return Split(processes, accumulation, {s: batch // cut for s, batch in batches.items()})


def be_deterministic(switch: bool) -> None:
    """Ask PyTorch for deterministic kernels, at some cost in speed on CUDA."""
    if switch:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(switch)


def in_folder(run: Run, folder: str) -> Run:
    """Give the run settings with their folder filled in."""
    return replace(run, folder=folder)


def fit(
    model: Trainable,
    sources: Mapping[str, Source],
    optim: Optim,
    run: Run,
    *,
    steps: int,
    prepare: Callable[[Batch, int], Batch],
    config: Mapping[str, Any] | None = None,
    rename: Callable[[str], str] = lambda name: name,
) -> list[dict[str, float]]:
    """Train ``model`` for ``steps`` optimiser steps and return the record, one dict per step.

    ``model(batch, noise)`` gives {stream: Term}; the loss is the sum over streams of the mean over
    the *global* batch. ``model.counts(batch)`` says how many items each stream holds, and
    ``model.noise_sizes`` how many uniforms per sample it wants. ``prepare(batch, step)`` runs on
    the device without gradient: pixels to floats, token ids. With ``run.folder`` the run is saved
    there and a run found there is resumed; ``config`` is compared with the one found. With
    ``optim.ema`` the model ends with the weight average in the weights' place, also where the run
    stops early or was finished before; checkpoints hold both. Raises ValueError for another
    configuration there and for a loss that is not finite.
    """
    device = dist.device()
    split = split_batch({s: source.batch for s, source in sources.items()},
                        dist.world_size(), run.micro_batch)  # fmt: skip
    model.to(device).train()
    groups = parameter_groups(model, optim, rename)
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas)
    folder = Path(run.folder) if run.folder else None
    average = start_average(model) if optim.ema else {}
    start = _resume(folder, model, optimizer, average, config or {})
    stop = min(steps, run.stop_after or steps)
    history = _read_metrics(folder, start)
    if start >= stop:
        model.load_state_dict(model.state_dict() | average)
        return history
    wrapped = dist.replicate(model)
    items = len(next(iter(sources.values())).items)
    loaders = {s: iter(_loader(source, split, s, start, stop)) for s, source in sources.items()}
    bar = tqdm(total=stop, initial=start, unit="step", disable=dist.rank() > 0, mininterval=1)
    with _record(folder, history) as write, _asked_to_stop() as asked, bar:
        for step in range(start, stop):
            began = time.perf_counter()
            micros = [
                _to_device({s: next(loader) for s, loader in loaders.items()}, device)
                for _ in range(split.accumulation)
            ]
            waited = time.perf_counter() - began
            rate = learning_rate(optim, step, items)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["factor"]
            entry = _step(wrapped, model, micros, optimizer, optim, run, step, prepare)
            if average:
                update_average(average, model, optim.ema)
            seconds = time.perf_counter() - began
            entry = {"step": step, "lr": rate, **entry}
            entry["items_per_s"] = sum(s.batch for s in sources.values()) / seconds
            entry["data_wait"] = waited / seconds
            write(entry)
            bar.set_postfix(loss=f"{entry['loss']:.3f}", lr=f"{rate:.1e}", refresh=False)
            bar.update()
            done = step + 1
            stopping = asked(device)
            if folder and (done == stop or stopping or done % run.save_every == 0):
                if dist.rank() == 0:
                    checkpoint.save(folder, done, model, optimizer, average, run.keep)
                dist.wait_for_all()
            if stopping:
                break
    model.load_state_dict(model.state_dict() | average)
    return history


def _step(
    wrapped: nn.Module,
    model: Trainable,
    micros: list[Batch],
    optimizer: torch.optim.Optimizer,
    optim: Optim,
    run: Run,
    step: int,
    prepare: Callable[[Batch, int], Batch],
) -> dict[str, float]:
    """Make one optimiser step from its micro-batches; return its losses and gradient norm."""
    device = next(model.parameters()).device
    with torch.no_grad():
        micros = [prepare(batch, step) for batch in micros]
    streams = list(micros[0])
    counts = torch.tensor([model.counts(b) for b in micros], dtype=torch.float64, device=device)
    counts = dist.sum_over_processes(counts.sum(0)).clamp(min=1)
    sums: dict[str, Tensor] = {}
    optimizer.zero_grad(set_to_none=True)
    for number, batch in enumerate(micros):
        noise = _noise(model, batch, run.seed, step, device)
        local = number < len(micros) - 1
        with dist.gradients_stay_local(wrapped, local):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                terms = wrapped(batch, noise)
            means = [terms[s].loss / n for s, n in zip(streams, counts.tolist(), strict=True)]
            # DDP averages gradients over processes; the division by the global count is in place.
            (sum(means) * dist.world_size()).backward()
        for stream, n in zip(streams, counts.tolist(), strict=True):
            for key, value in {"loss": terms[stream].loss.detach(), **terms[stream].logs}.items():
                name = f"{stream}/{key}"
                sums[name] = sums.get(name, torch.zeros((), device=device)) + value / n
    values = dist.sum_over_processes(torch.stack([v.float() for v in sums.values()])).tolist()
    entry = dict(zip(sums, values, strict=True))
    loss = sum(v for k, v in entry.items() if k.endswith("/loss"))
    if not math.isfinite(loss):
        positions = {s: part["position"].tolist() for s, part in micros[0].items()}
        raise ValueError(f"the loss is {loss} at step {step}, before its update; items {positions}")
    norm = nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm or math.inf)
    optimizer.step()
    return {"loss": loss, **entry, "grad_norm": float(norm)}


def _noise(
    model: Trainable, batch: Batch, seed: int, step: int, device: torch.device
) -> dict[str, Tensor]:
    """Draw each sample's uniforms, keyed by (seed, stream, step, its place in the data order)."""
    return {
        s: uniform_noise(
            seed, part["position"].tolist(), model.noise_sizes[s], NOISE_STREAM.get(s, 2), step
        ).to(device)
        for s, part in batch.items()
    }


def _loader(source: Source, split: Split, stream: str, start: int, stop: int) -> DataLoader:
    micro = split.micro[stream]
    batches = step_batches(start, stop, source.batch, dist.rank(), split.processes, micro)
    return DataLoader(
        source.items,
        batch_sampler=list(batches),
        num_workers=source.items.workers,
        worker_init_fn=one_thread,
        pin_memory=dist.device().type == "cuda",
    )


def _to_device(batch: Batch, device: torch.device) -> Batch:
    return {
        s: {k: v.to(device, non_blocking=True) if k != "position" else v for k, v in part.items()}
        for s, part in batch.items()
    }


def _resume(
    folder: Path | None,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: checkpoint.State,
    config: Mapping,
) -> int:
    """Load the latest checkpoint of the run, if any; return the step to go on from."""
    if folder is None:
        return 0
    written = folder / "config.json"
    mine = json.loads(json.dumps(dict(config)))
    if written.exists():
        found = json.loads(written.read_text())
        other = [k for k in {**mine, **found} if _matters(k) and mine.get(k) != found.get(k)]
        if other:
            detail = "; ".join(f"{k}: {found.get(k)} there, {mine.get(k)} here" for k in other)
            raise ValueError(
                f"{folder} holds a run of another configuration ({detail}): choose another "
                "--run.folder or remove it"
            )
    elif dist.rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            written.write_text(json.dumps(mine, indent=1))
        except OSError as error:
            raise ValueError(
                f"can't write to the run folder {folder} ({error.strerror}): choose another "
                "with --run.folder"
            ) from None
    dist.wait_for_all()
    found = checkpoint.latest(folder)
    return checkpoint.load(found, model, optimizer, average) if found else 0


def _matters(key: str) -> bool:
    """Tell whether a field changes what is computed: paths, workers and the run's own don't."""
    machine = ("data.video_list", "data.video_root", "data.image_root", "data.val_list",
               "data.workers", "tokens.weights", "default_init")  # fmt: skip
    return key == "run.seed" or not (key.startswith("run.") or key in machine)


def _read_metrics(folder: Path | None, start: int) -> list[dict[str, float]]:
    """Read the record of the steps before ``start``; what came after is forgotten."""
    path = folder / "metrics.jsonl" if folder else None
    if path is None or not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return [entry for entry in lines if entry["step"] < start]


@contextlib.contextmanager
def _record(folder: Path | None, history: list[dict[str, float]]) -> Iterator[Callable]:
    """Give a function that appends to the history and, on rank 0, to metrics.jsonl."""
    if folder is None or dist.rank() > 0:
        yield history.append
        return
    path = folder / "metrics.jsonl"
    part = folder / ".metrics.part"
    part.write_text("".join(json.dumps(entry) + "\n" for entry in history))
    os.replace(part, path)
    with path.open("a") as file:

        def write(entry: dict[str, float]) -> None:
            history.append(entry)
            file.write(json.dumps(entry) + "\n")
            file.flush()

        yield write


@contextlib.contextmanager
def _asked_to_stop() -> Iterator[Callable[[torch.device], bool]]:
    """Watch for SIGTERM; the function given tells whether any process was asked to stop."""
    seen = [0.0]

    def note(number: int, frame: Any) -> None:
        seen[0] = 1.0
        print("asked to stop: saving after this step", file=sys.stderr)

    def asked(device: torch.device) -> bool:
        return bool(dist.sum_over_processes(torch.tensor(seen, device=device)).item())

    try:
        before = signal.signal(signal.SIGTERM, note)
    except ValueError:  # not in the main thread: nobody can ask
        yield asked
        return
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)
