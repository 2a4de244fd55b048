"""Checkpoints as plain files: tensors in safetensors, the rest in JSON, no pickle.

    RUN/config.json                  the recipe
    RUN/metrics.jsonl                one line per step
    RUN/checkpoints/step_00000100/   model.safetensors  optimizer.safetensors  state.json
                                     and ema.safetensors where the run averages its weights
    RUN/best/                        model.safetensors  state.json: the best of the validations

model.safetensors holds the weights that training goes on from, ema.safetensors their average,
under the same names; best/ holds the average where there is one. A folder is written under a
hidden name, synced and renamed; it counts only while the SHA-256 sums in its state.json match. Any
number of processes can resume it.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from bevt_lib.base.files import save_tensors, sha256
from bevt_lib.base.trainable import Trainable

State = dict[str, Tensor]


def save(
    run: Path,
    step: int,
    model: Trainable,
    optimizer: Optimizer,
    average: State,
    keep: int,
    **more: Any,
) -> Path:
    """Write the checkpoint of a finished step and delete all but the last ``keep``.

    ``average`` is the EMA of the weights; empty: the run keeps none. ``more`` goes into state.json.
    Call on one process only; all hold the same. Returns the checkpoint's folder. Raises ValueError
    in one line where it can't be written; what was there before is still there then.
    """
    folder = run / "checkpoints" / f"step_{step:08d}"
    contents = {"model": model.state_dict(), "optimizer": optimizer_tensors(optimizer)}
    if average:
        contents["ema"] = average
    write(folder, contents, {"step": step, **more})
    others = [f for f in sorted(folder.parent.glob("step_*")) if f != folder]
    before = [f for f in others if f < folder]
    kept = before[max(0, len(before) - keep + 1) :]
    for old in (f for f in others if f not in kept):  # later ones are damaged
        hidden = old.with_name(f".old_{old.name}")
        with suppress(OSError):
            os.rename(old, hidden)
        shutil.rmtree(hidden, ignore_errors=True)
    return folder


def write(folder: Path, contents: Mapping[str, State], state: Mapping[str, Any]) -> None:
    """Write {file stem: tensors} and state.json as a folder that is there whole or not at all.

    Raises ValueError in one line where it can't be written, as on a full disk.
    """
    part, old = (folder.with_name(f".{word}_{folder.name}") for word in ("part", "old"))
    try:
        part.mkdir(parents=True)
        sums = {}
        for stem, tensors in contents.items():
            path = part / f"{stem}.safetensors"
            save_tensors(tensors, path)
            _sync(path)
            sums[path.name] = sha256(path)
        whole = {**state, "sha256": sums}
        whole["self"] = _checksum(whole)
        (part / "state.json").write_text(json.dumps(whole, indent=1))
        _sync(part / "state.json")
        _sync(part)
        if folder.exists():
            os.rename(folder, old)
        os.rename(part, folder)
        _sync(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise ValueError(
            f"can't write {folder} ({getattr(error, 'strerror', None) or error}): make room; the "
            "same command then continues from the last checkpoint"
        ) from None
    shutil.rmtree(old, ignore_errors=True)


def is_intact(folder: Path) -> bool:
    """Whether a folder is still as :func:`write` left it."""
    try:
        state = json.loads((folder / "state.json").read_text())
        sums = state["sha256"]
        own = state.pop("self", None)  # older checkpoints have none
        whole = own in (None, _checksum(state)) and "model.safetensors" in sums
        return whole and all(sha256(folder / name) == total for name, total in sums.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def remove_partial(run: Path) -> None:
    """Remove what a killed process left half written or half removed; no run may be active."""
    for place in (run, run / "checkpoints"):
        for left in [*place.glob(".part_*"), *place.glob(".old_*")]:
            shutil.rmtree(left, ignore_errors=True)
    for file in run.glob(".*.part"):
        file.unlink()


def latest(run: Path) -> Path | None:
    """Find a run's newest intact checkpoint; damaged ones are skipped, with a line on stderr.

    None: the run has saved nothing yet. Raises ValueError if all are damaged.
    """
    folders = sorted((run / "checkpoints").glob("step_*"), reverse=True)
    for folder in folders:
        if is_intact(folder):
            return folder
        print(f"{folder.name} is damaged (checksum mismatch): skipped", file=sys.stderr)
    if folders:
        raise ValueError(
            f"every checkpoint in {run} is damaged ({', '.join(f.name for f in folders)}): bring "
            "one back from a copy, or remove the folder to start again"
        )
    return None


def load(folder: Path, model: Trainable, optimizer: Optimizer, average: State) -> dict[str, Any]:
    """Load a checkpoint into model, optimizer and, unless empty, average; return its state.json."""
    model.load_state_dict(load_file(folder / "model.safetensors"))
    tensors = load_file(folder / "optimizer.safetensors")
    for name, parameter in _named_parameters(optimizer):
        if f"{name}/step" in tensors:  # not before a parameter's first update
            moments = {k: tensors[f"{name}/{k}"].to(parameter) for k in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": tensors[f"{name}/step"], **moments}
    if average:
        for name, value in load_file(folder / "ema.safetensors").items():
            average[name].copy_(value)
    return json.loads((folder / "state.json").read_text())


def optimizer_tensors(optimizer: Optimizer) -> State:
    """Flatten AdamW's state to {"parameter/key": tensor}."""
    return {
        f"{name}/{key}": value
        for name, parameter in _named_parameters(optimizer)
        for key, value in optimizer.state[parameter].items()
    }


def _named_parameters(optimizer: Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    for group in optimizer.param_groups:
        yield from zip(group["names"], group["params"], strict=True)


def _checksum(state: Mapping[str, Any]) -> str:
    """Give the SHA-256 of what state.json holds beside this checksum."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    """Make a file's or folder's content durable (folders can't be synced on Windows)."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
