"""Checkpoints as plain files: tensors in safetensors, the rest in JSON, no pickle.

    RUN/config.json                  the recipe
    RUN/metrics.jsonl                one line per step
    RUN/checkpoints/step_00000100/   model.safetensors  optimizer.safetensors  state.json
                                     and ema.safetensors where the run averages its weights

model.safetensors holds the weights that training goes on from, ema.safetensors their average,
under the same names. A checkpoint is written into a hidden folder, synced and renamed; it
counts only while the SHA-256 sums in its state.json hold. Any number of processes resumes it.
"""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

State = dict[str, Tensor]


def save(
    run: Path, step: int, model: nn.Module, optimizer: Optimizer, average: State, keep: int
) -> Path:
    """Write the checkpoint of a finished step and delete all but the last ``keep``.

    ``average`` is the weight average; empty: the run keeps none. Call on one process only; all
    hold the same. Returns the checkpoint's folder.
    """
    folder = run / "checkpoints" / f"step_{step:08d}"
    part = folder.with_name(f".part_{folder.name}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    contents = {"model": model.state_dict(), "optimizer": optimizer_tensors(optimizer)}
    if average:
        contents["ema"] = average
    sums = {}
    for stem, tensors in contents.items():
        path = part / f"{stem}.safetensors"
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path)
        _sync(path)
        sums[path.name] = _sha256(path)
    state = {"step": step, "sha256": sums}
    (part / "state.json").write_text(json.dumps(state, indent=1))
    _sync(part / "state.json")
    _sync(part)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(part, folder)
    _sync(folder.parent)
    for old in sorted(folder.parent.glob("step_*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def latest(run: Path) -> Path | None:
    """Find the newest checkpoint of a run whose sums hold; a damaged one is named and passed by."""
    for folder in sorted((run / "checkpoints").glob("step_*"), reverse=True):
        try:
            state = json.loads((folder / "state.json").read_text())
            if all(_sha256(folder / name) == sha for name, sha in state["sha256"].items()):
                return folder
        except (OSError, ValueError, KeyError):
            pass
        print(f"{folder.name} is damaged (its sums don't hold): passed by", file=sys.stderr)
    return None


def load(folder: Path, model: nn.Module, optimizer: Optimizer, average: State) -> int:
    """Load a checkpoint into model, optimizer and, unless empty, average; return its step."""
    model.load_state_dict(load_file(folder / "model.safetensors"))
    tensors = load_file(folder / "optimizer.safetensors")
    for name, parameter in _named_parameters(optimizer):
        optimizer.state[parameter] = {
            key: tensors[f"{name}/{key}"].to(parameter.device if key != "step" else "cpu")
            for key in ("step", "exp_avg", "exp_avg_sq")
        }
    if average:
        for name, value in load_file(folder / "ema.safetensors").items():
            average[name].copy_(value)
    return json.loads((folder / "state.json").read_text())["step"]


def optimizer_tensors(optimizer: Optimizer) -> State:
    """Flatten AdamW's state to {"parameter/key": tensor}."""
    return {
        f"{name}/{key}": value
        for name, parameter in _named_parameters(optimizer)
        for key, value in optimizer.state[parameter].items()
    }


def _named_parameters(optimizer: Optimizer):
    for group in optimizer.param_groups:
        yield from zip(group["names"], group["params"], strict=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Make a file's or folder's content durable (folders can't be synced on Windows)."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
