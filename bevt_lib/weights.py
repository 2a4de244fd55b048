"""Weights in and out: files without pickle, released names, starting one model from another.

Every loader is strict: a tensor that is missing, left over or of another shape is an error that
names it. What a start deliberately leaves out (a fresh head) is returned in a :class:`Report`.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

State = dict[str, Tensor]

# Our name, as a pattern, to the released one. The first match is taken.
TABLE = "attn.relative_position_bias_table"
RELEASED_NAMES = [
    (r"swin\.stages\.(.*)attn\.bias_table", rf"backbone.layers.\1{TABLE}"),
    (r"swin\.stages\.(.*)", r"backbone.layers.\1"),
    (r"patch_embed\.video\.(.*)", r"backbone.patch_embed.\1"),
    (r"patch_embed\.image\.(.*)", r"backbone.patch_embed_2d.\1"),
    (r"patch_embed\.(.*)", r"backbone.patch_embed.\1"),
    (r"decoder\.image\.up\.(.*)", r"backbone.fpn.0.\1"),
    (r"decoder\.image\.fuse\.(.*)", r"backbone.lm_down.\1"),
    (r"decoder\.video\.up\.(.*)", r"backbone.fpn_s.0.\1"),
    (r"decoder\.video\.fuse\.(.*)", r"backbone.lm_down_st.0.\1"),
    (r"decoder\.video\.lift\.(.*)", r"backbone.fpn_t.0.\1"),
    (r"(mask_token|norm\..*)", r"backbone.\1"),
    (r"token_head\.(.*)", r"cls_head.lm_head.\1"),
    (r"head\.(.*)", r"cls_head.fc_cls.\1"),
]  # fmt: skip
IMAGE_KERNELS = ("patch_embed.image.proj.weight", "decoder.image.up.weight")  # 2D when released


def released_name(name: str) -> str:
    """Translate a parameter name of BEVT or Classifier to the released recogniser's."""
    for pattern, replacement in RELEASED_NAMES:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    raise ValueError(f"{name} has no counterpart in the released code")


def released_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Give the released shape of our tensor: 2D image kernels, mask token (1, 1, C)."""
    if name in IMAGE_KERNELS:
        return (*shape[:2], *shape[3:])
    return (1, 1, *shape) if name == "mask_token" else shape


def from_released(model: nn.Module, state: Mapping[str, Tensor]) -> State:
    """Rename a released state dict (full names) into ours for ``model``. Strict.

    Raises ValueError naming the tensors that are missing, left over or of another shape. Index
    buffers and the frozen tokenizer inside the released file are not parameters and are passed by.
    """
    left = {k for k in state if "relative_position_index" not in k and "vae_encoder" not in k}
    taken: State = {}
    for name, value in model.state_dict().items():
        key = released_name(name)
        if key in left:
            left.remove(key)
            expected = released_shape(name, tuple(value.shape))
            if tuple(state[key].shape) != expected:
                raise ValueError(f"{key}: shape {tuple(state[key].shape)}, expected {expected}")
            taken[name] = state[key].reshape(value.shape)
    _refuse_misfit({released_name(n) for n in model.state_dict() if n not in taken}, left)
    return taken


def to_released(model: nn.Module) -> State:
    """Rename a model's parameters to the released names and shapes, without index buffers."""
    return {
        released_name(name): value.reshape(released_shape(name, tuple(value.shape)))
        for name, value in model.state_dict().items()
    }


def _refuse_misfit(missing: set[str], left: set[str]) -> None:
    if missing or left:
        parts = [
            f"{word} {len(names)} ({', '.join(sorted(names)[:4])}{', …' if len(names) > 4 else ''})"
            for word, names in (("missing", missing), ("left over", left))
            if names
        ]
        raise ValueError(f"the weights don't fit this model: {'; '.join(parts)}")


def load_strict(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load a state dict of our own names into ``model``; ValueError names what doesn't fit."""
    own = model.state_dict()
    try:
        _refuse_misfit(own.keys() - state.keys(), state.keys() - own.keys())
        for name, value in own.items():
            if state[name].shape != value.shape:
                raise ValueError(
                    f"the weights don't fit this model: {name} has shape "
                    f"{tuple(state[name].shape)}, expected {tuple(value.shape)}"
                )
    except ValueError as error:
        raise ValueError(f"{where}: {error}; was it made by another preset?") from None
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})


def save_weights(state: Mapping[str, Tensor], path: Path, dtype: torch.dtype | None = None) -> None:
    """Write tensors to a safetensors file, atomically; ``dtype`` casts matrices to save space."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    cast = {k: v.to(dtype) if dtype and v.dim() > 1 else v for k, v in state.items()}
    part = path.with_name(f".{path.name}.part")
    save_file({k: v.detach().cpu().contiguous() for k, v in cast.items()}, part)
    os.replace(part, path)


def read_weights(path: Path) -> State:
    """Read a safetensors file, or a checkpoint folder's. ValueError in one line where it can't."""
    path = Path(path)
    if path.is_dir() and (path / "model.safetensors").exists():
        path = path / "model.safetensors"
    if not path.is_file():
        raise ValueError(f"no weights at {path}: give a .safetensors file or a checkpoint folder")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error})") from None


@dataclass
class Report:
    """What a start took from other weights and what it left fresh: tensor names by fate."""

    taken: list[str] = field(default_factory=list)
    inflated: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = (f"{len(names)} {fate}" for fate, names in vars(self).items() if names)
        return ", ".join(parts)


def start_pretraining(model: nn.Module, state: State, *, token_head: bool = False) -> Report:
    """Start joint pretraining from an image stream's weights, by inflation as released.

    The image patch embedding is copied for images and inflated for clips: repeated over the
    patch's frames and divided by their number. Swin, norm, mask token and the image decoder are
    taken; the video decoder starts fresh, and so does the token head unless ``token_head`` (the
    released code starts it fresh). Raises ValueError where a taken tensor does not fit.
    """
    state = dict(state)
    report = Report()
    own = model.state_dict()
    video = "patch_embed.video.proj.weight"
    if video in own and video not in state:
        flat = state["patch_embed.image.proj.weight"].float()
        frames = own[video].shape[2]
        state[video] = flat.repeat(1, 1, frames, 1, 1) / frames
        report.inflated.append(video)
        for part in ("proj.bias", "norm.weight", "norm.bias"):
            if f"patch_embed.image.{part}" in state:
                state[f"patch_embed.video.{part}"] = state[f"patch_embed.image.{part}"]
                report.inflated.append(f"patch_embed.video.{part}")
    fresh = ("decoder.video.",) if token_head else ("decoder.video.", "token_head.")
    return _take(model, own, state, fresh, report)


def start_classifier(model: nn.Module, state: State) -> Report:
    """Start a classifier from pretraining weights: Swin, norm and the video patch embedding.

    Decoders, mask token, token head and the image patch embedding are left out; the head is
    fresh. Weights without a video stream are inflated as in :func:`start_pretraining`.
    """
    report = Report()
    own = model.state_dict()
    embed = {k: v for k, v in state.items() if k.startswith("patch_embed.video.")}
    renamed = {k: v for k, v in state.items() if k.startswith(("swin.", "norm."))}
    renamed |= {k.replace("patch_embed.video.", "patch_embed."): v for k, v in embed.items()}
    if not embed:
        frames = own["patch_embed.proj.weight"].shape[2]
        for k, v in state.items():
            if k.startswith("patch_embed.image."):
                name = k.replace("patch_embed.image.", "patch_embed.")
                kernel = name.endswith("proj.weight")
                renamed[name] = v.float().repeat(1, 1, frames, 1, 1) / frames if kernel else v
                report.inflated.append(name)
    report.unused = sorted(
        k for k in state if not k.startswith(("swin.", "norm.", "patch_embed.video."))
    )
    return _take(model, own, renamed, ("head.",), report)


def _take(
    model: nn.Module, own: State, state: State, fresh: tuple[str, ...], report: Report
) -> Report:
    """Load all of ``state`` that ``model`` wants except the names that start fresh."""
    wanted = {name for name in own if not name.startswith(fresh)}
    missing = sorted(wanted - state.keys())
    if missing:
        raise ValueError(f"the weights to start from lack {len(missing)} tensors: {missing[:4]}")
    for name in sorted(wanted):
        if state[name].shape != own[name].shape:
            raise ValueError(
                f"the weights to start from don't fit: {name} has shape "
                f"{tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
            )
    model.load_state_dict({k: state[k].float() for k in wanted}, strict=False)
    report.taken = sorted(wanted - set(report.inflated))
    report.fresh = sorted(own.keys() - wanted)
    return report
