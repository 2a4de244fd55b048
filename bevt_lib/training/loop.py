"""The one training loop: image stream, joint pretraining, fine-tuning and the tokenizer.

Step is the only state: learning rate, epoch, sample order and noise are functions of it, so that a
run resumed from a checkpoint, on any number of processes, does what it would have done. One step
of it is in :mod:`bevt_lib.training.step`, its folder and screen in
:mod:`bevt_lib.training.run_folder`.
"""

import contextlib
import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from bevt_lib.base import distributed
from bevt_lib.base.config import Optim, Run
from bevt_lib.base.memory import keep_freed_memory
from bevt_lib.base.trainable import Batch, Part
from bevt_lib.datasets.augment import one_thread
from bevt_lib.datasets.items import step_batches
from bevt_lib.training import checkpoint, run_folder
from bevt_lib.training.optim import learning_rate, start_average, update_average
from bevt_lib.training.run_folder import Entry
from bevt_lib.training.step import Update
from bevt_lib.training.task import Source, Task

TIMINGS = ("items_per_s", "data_wait")  # in the record, but not part of the result
ALWAYS_TOLERATED = 10  # replaced items that stop no run, whatever their share


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
    cut = processes * accumulation
    for stream, batch in batches.items():
        if not cut or batch % cut or cut * micro != first:
            raise ValueError(
                f"a global batch of {batch} ({stream}) can't be cut into {processes} process(es) x "
                f"micro-batches of {micro}: --run.micro-batch and the processes must divide it"
            )
    return Split(processes, accumulation, {s: batch // cut for s, batch in batches.items()})


def be_deterministic(switch: bool) -> None:
    """Ask for the same bits in every run on the same CUDA machine, or stop asking.

    Call before anything is computed. Sets deterministic kernels (PyTorch raises RuntimeError that
    names one that has no such form), cuDNN without search for the fastest, and cuBLAS's fixed work
    space. Cost: slower gradients of indexing (the bias tables) and convolutions, and memory filled
    before use; how much on a GPU we have not measured. CPU runs repeat to the bit without it.
    """
    if switch:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = switch
    torch.use_deterministic_algorithms(switch)


def set_up(run: Run) -> None:
    """Set torch's threads and determinism, and keep freed memory; call before anything else."""
    keep_freed_memory()
    if run.threads:
        torch.set_num_threads(run.threads)
    be_deterministic(run.deterministic)


def fit(task: Task, optim: Optim, run: Run) -> list[Entry]:
    """Train ``task.model`` for ``task.steps`` optimiser steps; return the record, a dict per step.

    The loss is the sum over streams of ``optim.loss_weights`` times the mean over the *global*
    batch. With ``run.folder`` the run is saved there and a run found there is resumed. With
    ``optim.ema`` the model ends with the EMA of its weights, also if the run stops early or was
    finished before; checkpoints hold both.

    A record shorter than min(steps, run.stop_after or steps) is that of a run that was asked to
    stop (SIGTERM): it is saved, and its process should end soon. Raises ValueError for another
    configuration in the folder, for numbers that aren't finite, where nothing can be saved, and
    where more than ``task.bad_share`` of a stream's items so far had to be replaced.
    """
    sources, steps = task.sources, task.steps
    batches = {stream: source.batch for stream, source in sources.items()}
    split = split_batch(batches, distributed.world_size(), run.micro_batch)
    update = Update.start(task, optim, run)
    average = start_average(task.model) if optim.ema else {}
    folder = Path(run.folder) if run.folder else None
    with contextlib.ExitStack() as stack:
        # Go on from the folder's last checkpoint, if it holds one.
        start, history = _resume(stack, folder, update, average)
        stop = min(steps, run.stop_after or steps)
        items = len(next(iter(sources.values())).items)
        replaced = Counter({s: sum(e.get(f"{s}/replaced", 0) for e in history) for s in sources})

        def due(done: int) -> bool:
            every = bool(task.validate_every) and done % task.validate_every == 0
            return task.validate is not None and done > 0 and (done == steps or every)

        if history and due(start) and not any(k.startswith("val/") for k in history[-1]):
            # The run ended between a checkpoint and its validation.
            history[-1] |= _validated(task, average, folder, history, start)
        # Open the record and the screen.
        metrics = run_folder.Metrics(folder, history)
        distributed.on_rank_zero(metrics.open)
        stack.callback(metrics.close)
        asked = stack.enter_context(run_folder.asked_to_stop())
        title = f"steps {start} to {stop} in {split}; {update.precision}"
        show = stack.enter_context(run_folder.progress(title, start, stop))
        for step, micros, waited in _batches(sources, split, start, stop):
            # Make the step.
            began = time.perf_counter()
            extra_sums = {f"{s}/replaced": float(sum(m[s]["replaced"].sum() for m in micros))
                          for s in sources} | {"asked": float(asked())}  # fmt: skip
            rate = learning_rate(optim, step, items)
            entry = {"step": step, "lr": rate, **update.step(micros, step, rate, extra_sums)}
            entry |= task.after_step(step)
            if average:
                update_average(average, task.model, optim.ema)
            # Note its speed, and count what had to be replaced.
            seconds = time.perf_counter() - began + waited
            entry["items_per_s"] = sum(batches.values()) / seconds
            entry["data_wait"] = waited / seconds
            stopping, done = entry.pop("asked") > 0, step + 1
            replaced.update({s: entry.get(f"{s}/replaced", 0) for s in sources})
            _refuse_many_replacements(replaced, batches, done, task.bad_share)
            # Save, validate, and write the step's line.
            if folder and (done == stop or stopping or due(done) or done % run.save_every == 0):
                save = partial(_save, folder, metrics, update, average, done, entry)
                distributed.on_rank_zero(save)
            if due(done) and not stopping:
                entry |= _validated(task, average, folder, history, done)
            metrics.write(entry)
            show(entry)
            if stopping:
                break
        task.model.load_state_dict(task.model.state_dict() | average)
        distributed.on_rank_zero(metrics.flush)
    return metrics.history


def _resume(
    stack: contextlib.ExitStack, folder: Path | None, update: Update, average: checkpoint.State
) -> tuple[int, list[Entry]]:
    """Enter the run's folder and load its latest checkpoint, if any: (steps done, record)."""
    if folder is None:
        return 0, []
    task = update.task

    def enter() -> tuple[Path | None, list[Entry]]:
        lists = {run_folder.ITEMS + s: src.items.fingerprint() for s, src in task.sources.items()}
        run_folder.check_config(folder, {**task.config, **lists})
        stack.enter_context(run_folder.lock_folder(folder))
        checkpoint.remove_partial(folder)
        return checkpoint.latest(folder), run_folder.read_metrics(folder)

    found, history = distributed.on_rank_zero(enter)
    if found is None:
        return 0, []
    state = checkpoint.load(found, task.model, update.optimizer, average)
    if update.scaler.is_enabled() and state.get("scaler"):
        update.scaler.load_state_dict(state["scaler"])
    start = state["step"]
    history = [entry for entry in history if entry["step"] < start]
    if "entry" in state and (not history or history[-1]["step"] < start - 1):
        history.append(state["entry"])  # saved before its line was written
    return start, history


def _save(
    folder: Path,
    metrics: run_folder.Metrics,
    update: Update,
    average: checkpoint.State,
    done: int,
    entry: Entry,
) -> None:
    """Save after ``done`` steps, the lines before the last one's ``entry`` first."""
    metrics.flush()
    checkpoint.save(folder, done, update.task.model, update.optimizer, average, update.run.keep,
                    scaler=update.scaler.state_dict(), entry=entry)  # fmt: skip


def _validated(
    task: Task, average: checkpoint.State, folder: Path | None, history: list[Entry], done: int
) -> Entry:
    """Score the model, or its EMA, keep it if it is the best, and leave it as it was."""
    model = task.model
    assert task.validate is not None
    weights = {k: v.clone() for k, v in model.state_dict().items() if k in average}
    model.load_state_dict(model.state_dict() | average)
    model.eval()
    with torch.no_grad():
        mine = task.validate(done)
    model.train()
    scores = {f"val/{k}": float(v) for k, v in distributed.on_rank_zero(lambda: mine).items()}

    def keep() -> None:
        assert folder is not None
        name = f"val/{task.best_by}"
        best = max((e.get(name, -math.inf) for e in history), default=-math.inf)
        if scores[name] > best or not checkpoint.is_intact(folder / "best"):
            state = {"step": done, task.best_by: scores[name]}
            checkpoint.write(folder / "best", {"model": model.state_dict()}, state)

    if folder and task.best_by:
        distributed.on_rank_zero(keep)
    model.load_state_dict(model.state_dict() | weights)
    return scores


def _refuse_many_replacements(
    replaced: Mapping[str, float], batches: Mapping[str, int], done: int, bad_share: float
) -> None:
    for stream, batch in batches.items():
        bad, seen = replaced[stream], done * batch
        if bad >= ALWAYS_TOLERATED and bad > bad_share * seen:
            raise ValueError(
                f"{bad:.0f} of {seen} {stream} items had bad files, more than {bad_share:.2%}: see "
                "python -m bevt_lib.check_data, or allow more with --data.bad-share"
            )


def _batches(
    sources: Mapping[str, Source], split: Split, start: int, stop: int
) -> Iterator[tuple[int, list[Batch], float]]:
    """Give (step, this process's micro-batches on its device, seconds waited for them)."""
    if start >= stop:
        return
    device = distributed.device()
    loaders: dict[str, Iterator[Part]] = {}
    for stream, source in sources.items():
        cut = (distributed.rank(), split.processes, split.micro[stream])
        loaders[stream] = iter(DataLoader(
            source.items, batch_sampler=list(step_batches(start, stop, source.batch, *cut)),
            num_workers=source.items.workers, worker_init_fn=one_thread,
            pin_memory=device.type == "cuda",
        ))  # fmt: skip
    for step in range(start, stop):
        began = time.perf_counter()
        micros: list[Batch] = [{s: _next(loader, device) for s, loader in loaders.items()}
                  for _ in range(split.accumulation)]  # fmt: skip
        yield step, micros, time.perf_counter() - began


def _next(loader: Iterator[Part], device: torch.device) -> Part:
    """Take a loader's next part to the device, but for its numbers, which the host needs.

    Raises RuntimeError as PyTorch's own where a worker was killed.
    """
    try:
        part = next(loader).items()
    except (EOFError, ConnectionError, FileNotFoundError) as error:  # killed while handing it over
        raise RuntimeError(f"DataLoader worker seems to be killed: {error!r}") from error
    host = ("position", "replaced")
    return cast(Part, {k: v if k in host else cast(Tensor, v).to(device, non_blocking=True)
                       for k, v in part})  # fmt: skip
