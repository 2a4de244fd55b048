"""Weights in and out: safe files, strict loading, starting one model from another, model folders.

Every loader is strict: a tensor that is missing, left over or of another shape is an error that
names it. What a start deliberately leaves out (a fresh head) stands in its :class:`Report`. Whose
names a file uses is found by :mod:`bevt_lib.weights.formats`, so that ``read_weights`` takes any
of them.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bevt_lib.base import files
from bevt_lib.base.config import ClipSpec
from bevt_lib.model.bevt import BEVT
from bevt_lib.model.classifier import Classifier
from bevt_lib.model.swin import Size3
from bevt_lib.weights.formats import Recognised, State, recognise, window_of

MODEL_FILES = ("model.safetensors", "config.json")
Beginnings = tuple[str, ...]  # of tensor names


def harmless_classes() -> list[Any]:
    """List what a checkpoint's pickle may name besides tensors: NumPy's scalars and arrays, and
    the bare namespace of command-line arguments. Never made from a file."""
    rebuild: list[Any] = [value.__reduce__()[0] for value in (np.float64(0), np.zeros(0))]
    # NumPy moved its core in version 2: files hold either name.
    named = [(function, f"numpy.{core}.multiarray.{function.__name__}")
             for function in rebuild for core in ("core", "_core")]  # fmt: skip
    dtypes = [type(np.dtype(c)) for c in "?bBhHiIlLqQefdFDSU"]
    return [*named, np.dtype, np.ndarray, *dtypes, argparse.Namespace]


def read_file(path: Path) -> Mapping[str, Any]:
    """Read a safetensors file, a torch pickle or a model or checkpoint folder: tensors only.

    If the checkpoint has an EMA, the EMA is read.

    No code from a pickle is run: it may name tensors and :func:`harmless_classes`, and is refused
    whole otherwise. Raises ValueError in one line for a missing, damaged or refused file.
    """
    path = Path(path)
    for name in ("ema.safetensors", MODEL_FILES[0]):
        path = path / name if (path / name).is_file() else path
    if not path.is_file():
        raise ValueError(f"no weights at {path}: give a .safetensors or .pth file, or a model or "
                         "checkpoint folder")  # fmt: skip
    with path.open("rb") as file:
        start = file.read(2)
    if start != b"PK" and not start.startswith(b"\x80"):  # neither a zip nor a bare pickle
        return files.read_tensors(path)[1]
    content = files.read_pickle(path, harmless_classes())
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict")
    return content


def read_checkpoint(path: Path) -> Recognised:
    """Read any Swin or BEVT checkpoint into our names; see :func:`formats.recognise`."""
    try:
        return recognise(read_file(path))
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


def read_weights(path: Path) -> State:
    """Read the tensors of any Swin or BEVT checkpoint, under our names."""
    return read_checkpoint(path).state


def save_weights(state: Mapping[str, Tensor], path: Path, dtype: torch.dtype | None = None) -> None:
    """Write tensors to a safetensors file, atomically; ``dtype`` casts matrices to save space."""
    cast = {k: v.to(dtype) if dtype and v.dim() > 1 else v for k, v in state.items()}
    files.write_tensors(Path(path), cast, {})


def load_strict(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load a state dict of our own names into ``model``; ValueError names what doesn't fit."""
    own = model.state_dict()
    missing, left = own.keys() - state.keys(), state.keys() - own.keys()
    wrong = [f"{word} {len(names)} ({_first(sorted(names), 4)})"
             for word, names in (("missing", missing), ("left over", left)) if names]  # fmt: skip
    if not wrong:
        wrong = [f"{name} has shape {tuple(state[name].shape)}, expected {tuple(ours.shape)}"
                 for name, ours in own.items() if state[name].shape != ours.shape][:1]  # fmt: skip
    if wrong:
        raise ValueError(f"{where}: the weights don't fit this model: {'; '.join(wrong)}; was it "
                         "made by another preset?")  # fmt: skip
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})


def _first(names: list[str], number: int) -> str:
    """Write the first few of a list of names."""
    return ", ".join(names[:number]) + (", …" if len(names) > number else "")


@dataclass
class Report:
    """What a start took from other weights and what it did not: tensor names by fate, and why."""

    taken: list[str] = field(default_factory=list)
    inflated: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    why: dict[tuple[str, str], str] = field(default_factory=dict)  # (fate, name): reason

    def __str__(self) -> str:
        counts = {fate: len(names) for fate, names in self.fates().items() if names}
        return ", ".join(f"{number} {fate.replace('_', ' ')}" for fate, number in counts.items())

    def fates(self) -> dict[str, list[str]]:
        """Give the names by fate."""
        return {fate: names for fate, names in vars(self).items() if fate != "why"}

    def put(self, fate: str, name: str, why: str = "") -> None:
        """Enter one tensor."""
        getattr(self, fate).append(name)
        self.why[fate, name] = why

    def table(self) -> str:
        """Write one line for every fate and reason, with how many tensors and the first few."""
        groups: dict[tuple[str, str], list[str]] = {}
        for fate, names in self.fates().items():
            for name in names:
                groups.setdefault((fate, self.why.get((fate, name), "")), []).append(name)
        return "\n".join(
            f"{fate.replace('_', ' '):9s} {len(names):4d}  {why and why + ': '}{_first(names, 3)}"
            for (fate, why), names in groups.items()
        )


def start_pretraining(model: nn.Module, state: State, *, token_head: bool = False) -> Report:
    """Start joint pretraining from an image stream's weights, by inflation as released.

    The image patch embedding is copied for images and inflated for clips: repeated over the
    patch's frames and divided by their number; 2D bias tables are repeated over time. Swin and norm
    are taken, mask token and image decoder where there are any; the video decoder starts fresh, and
    so does the token head unless ``token_head`` (the released code starts it fresh). Raises
    ValueError where a tensor is missing or does not fit.
    """
    fresh = ("decoder.video.",) if token_head else ("decoder.video.", "token_head.")
    return _start(model, state, fresh, optional=("decoder.image.", "mask_token"))


def start_classifier(model: nn.Module, state: State) -> Report:
    """Start a classifier from other weights: Swin, norm and the video patch embedding.

    Decoders, mask token, token head and another classifier's head are left out; the head is fresh.
    Weights without a video stream are inflated as in :func:`start_pretraining`; bias tables of
    another window are resized. Raises ValueError where a tensor is missing or does not fit.
    """
    return _start(model, state, fresh=("head.",), optional=())


def _start(model: nn.Module, state: State, fresh: Beginnings, optional: Beginnings) -> Report:
    """Load what ``model`` wants out of ``state``, except what starts fresh."""
    report, chosen, used, missing = Report(), {}, set(), []
    # Take each tensor that the model wants from the best source there is.
    flat = not {"patch_embed.video.proj.weight", "patch_embed.proj.weight"} & state.keys()
    for name, own in model.state_dict().items():
        source = next((s for s in _sources(name) if s in state), None)
        if name.startswith(fresh):
            report.put("fresh", name, "starts fresh, as in the released code")
        elif source is None and name.startswith(optional):
            report.put("fresh", name, "not among the weights")
        elif source is None:
            missing.append(name)
        else:
            value, fate, why = _fit(name, state[source].float(), own, source, model, flat)
            if value.shape != own.shape:
                fix = "; --tokens.weights must name the tokenizer that they were made with"
                raise ValueError(f"the weights to start from don't fit: {source} has shape "
                                 f"{tuple(value.shape)}, expected {tuple(own.shape)}"
                                 f"{fix if name.startswith('token_head.') else ''}")  # fmt: skip
            report.put(fate, name, why)
            chosen[name] = value
            used.add(source)
    # Say what is lacking and what is left, then load.
    if missing:
        raise ValueError(f"the weights to start from lack {len(missing)} tensors: {missing[:4]}")
    for name in sorted(state.keys() - used):
        report.put("left_out", name, "the model starts it fresh" if name.startswith(fresh)
                   else "the model has no such part")  # fmt: skip
    model.load_state_dict(chosen, strict=False)
    return report


def _sources(name: str) -> list[str]:
    """Name the tensors that can become ``name``, best first: clips' own, then an image's."""
    if not name.startswith("patch_embed.") or name.startswith("patch_embed.image."):
        return [name]
    part = name.removeprefix("patch_embed.").removeprefix("video.")
    return [f"patch_embed.video.{part}", f"patch_embed.{part}", f"patch_embed.image.{part}"]


def _fit(
    name: str, value: Tensor, own: Tensor, source: str, model: Any, flat: bool
) -> tuple[Tensor, str, str]:
    """Bring one tensor into the model's shape: (tensor, fate, why)."""
    if source.startswith("patch_embed.image.") and not name.startswith("patch_embed.image."):
        if not name.endswith("proj.weight"):
            return value, "inflated", "clips start from the image patch embedding"
        frames = own.shape[2]
        why = f"image kernel repeated over {frames} frames, divided by {frames}"
        return value.repeat(1, 1, frames, 1, 1) / frames, "inflated", why
    if name.endswith("bias_table") and value.shape != own.shape:
        new = model.swin.stages[0].blocks[0].window
        old = window_of(len(value), near=new, flat=flat)
        fate = "inflated" if old[0] == 1 else "resized"
        return resize_table(value, old, new), fate, f"bias table of window {old} to {new}"
    return value, "taken", ""


def resize_table(table: Tensor, old: Size3, new: Size3) -> Tensor:
    """Resize a bias table ((2d-1)(2h-1)(2w-1), heads) from one window to another, as released.

    A 2D table (d = 1) is resized bicubically if its height or width differ, then repeated over
    time; a 3D one is resized trilinearly. Corners aren't aligned.
    """
    was, will = ([2 * side - 1 for side in window] for window in (old, new))
    volume = table.T.view(1, -1, *was)
    if old[0] == 1:
        plane = volume[:, :, 0]
        if was[1:] != will[1:]:
            plane = F.interpolate(plane, size=will[1:], mode="bicubic", align_corners=False)
        volume = plane[:, :, None].expand(-1, -1, will[0], -1, -1)
    else:
        volume = F.interpolate(volume, size=will, mode="trilinear", align_corners=False)
    return volume.flatten(2)[0].T.contiguous()


def load_model(folder: str | Path) -> BEVT | Classifier:
    """Load a model folder, ``model.safetensors`` beside ``config.json``, in eval mode.

    The config says which class it is: a classifier has classes, BEVT a vocabulary. Raises
    ValueError in one line where the folder, its config or its tensors don't hold a model.
    """
    folder = Path(folder)
    absent = [name for name in MODEL_FILES if not (folder / name).is_file()]
    if absent:
        raise ValueError(f"{folder} is not a model folder: it lacks {' and '.join(absent)}")
    try:
        config = json.loads((folder / "config.json").read_text())
        if config.get("views"):
            config["views"] = ClipSpec(**config["views"])
        model = Classifier(**config) if "num_classes" in config else BEVT(**config)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'} doesn't describe a model: {error}") from None
    load_strict(model, read_file(folder), str(folder))
    return model.eval()
