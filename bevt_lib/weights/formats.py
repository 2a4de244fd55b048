"""The names other code gives the same tensors, and how they show whose checkpoint a file is.

| format | whose | holds |
| --- | --- | --- |
| ``ours`` | this kit | BEVT, an image stream, or a classifier |
| ``bevt`` | released BEVT, Video-Swin (mmaction) | the same, perhaps the tokenizer's encoder |
| ``swin`` | the 2D Swin repository; BEVT's released image stream | an image encoder |
| ``timm`` | timm's 2D Swin | an image encoder |
| ``torchvision`` | torchvision's ``swin3d_*`` | a classifier |

Names only: :mod:`bevt_lib.weights.load` decides which tensors a model then takes. Sources: the
released code's loaders and state-dict lists; timm and torchvision models as built.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from bevt_lib.model.swin import Size3, bias_index

State = dict[str, Tensor]
Reasons = dict[str, str]  # a tensor's name: why it was left out
Names = list[tuple[str, str]]  # (our beginning of a name, theirs); the first that fits is taken

STAGES = range(4)
TABLE: Names = [("attn.bias_table", "attn.relative_position_bias_table")]
INDEX = "attn.relative_position_index"
TOKENIZER = "cls_head.vae_encoder."  # the frozen tokenizer inside a released checkpoint
# How names begin, here and in each format; "": it has no such part. timm merges on entering a
# stage, we on leaving one.
FORMATS = ("bevt", "swin", "timm", "torchvision")
BEGINNINGS = [
    *((f"swin.stages.{s}.blocks.", f"backbone.layers.{s}.blocks.", f"layers.{s}.blocks.",
       f"layers.{s}.blocks.", f"features.{2 * s}.") for s in STAGES),
    *((f"swin.stages.{s}.downsample.", f"backbone.layers.{s}.downsample.",
       f"layers.{s}.downsample.", f"layers.{s + 1}.downsample.", f"features.{2 * s + 1}.")
      for s in STAGES),
    ("patch_embed.video.", "backbone.patch_embed.", "", "", ""),
    ("patch_embed.image.", "backbone.patch_embed_2d.", "patch_embed.", "patch_embed.", ""),
    ("patch_embed.", "backbone.patch_embed.", "", "", "patch_embed."),  # a classifier's one stream
    ("decoder.image.up.", "backbone.fpn.0.", "fpn.0.", "", ""),
    ("decoder.image.fuse.", "backbone.lm_down.", "lm_down.", "", ""),
    ("decoder.video.up.", "backbone.fpn_s.0.", "", "", ""),
    ("decoder.video.fuse.", "backbone.lm_down_st.0.", "", "", ""),
    ("decoder.video.lift.", "backbone.fpn_t.0.", "", "", ""),
    ("mask_token", "backbone.mask_token", "mask_token", "", ""),
    ("norm.", "backbone.norm.", "norm.", "norm.", "norm."),
    ("token_head.", "cls_head.lm_head.", "lm_head.", "", ""),
    ("head.", "cls_head.fc_cls.", "head.", "head.fc.", "head."),
]  # fmt: skip
NAMES = {format: [(mine, theirs[i]) for mine, *theirs in BEGINNINGS if theirs[i]]
         for i, format in enumerate(FORMATS)}  # fmt: skip
PARTS = {format: TABLE for format in FORMATS}
PARTS["torchvision"] = [*TABLE, ("mlp.fc1.", "mlp.0."), ("mlp.fc2.", "mlp.3.")]
IMAGE_KERNELS = ("patch_embed.image.proj.weight", "decoder.image.up.weight")  # 2D elsewhere
WRAPPERS = ("state_dict", "model", "module", "model_state_dict")  # where training code puts weights
PREFIXES = ("module.", "model.", "encoder.")  # what wrappers and exports put before a name


@dataclass
class Recognised:
    """A checkpoint in our names. ``left_out`` says why a tensor isn't among them."""

    format: str
    state: State
    tokenizer: State = field(default_factory=dict)  # DALL-E's encoder, in its package's names
    left_out: Reasons = field(default_factory=dict)  # by their names
    tokens: int = 0  # of a window, from an index buffer, if there is one


def translate_name(name: str, names: Names, parts: Names = TABLE) -> str:
    """Translate one of our names. Raises ValueError where the format has no such tensor."""
    for mine, other in names:
        if name.startswith(mine):
            name = other + name.removeprefix(mine)
            for inner, outer in parts:
                name = name.replace(inner, outer)
            return name
    raise ValueError(f"{name} has no counterpart there")


def released_name(name: str) -> str:
    """Translate a parameter name of BEVT or Classifier to the released recogniser's."""
    return translate_name(name, NAMES["bevt"])


def released_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Give the shape other code has for our tensor: 2D image kernels, mask token (1, 1, C)."""
    if name in IMAGE_KERNELS:
        return (*shape[:2], *shape[3:])
    return (1, 1, *shape) if name == "mask_token" else shape


def recognise(raw: Mapping) -> Recognised:
    """Find out whose checkpoint this is, unwrap it, and rename its tensors to ours.

    ``raw`` is what the file holds: tensors by name, or a dict around them ("state_dict", "model",
    "module"). Prefixes of wrappers ("module.", "encoder.", a missing "backbone.") are taken off.
    Raises ValueError if no known names fit, and for tensors that a released or torchvision
    checkpoint should not hold; 2D checkpoints may hold others, which are listed as left out.
    """
    flat = _unwrap(raw)
    if any(name.startswith("swin.stages.") for name in flat):
        return Recognised("ours", dict(flat))
    kernel = flat.get("patch_embed.proj.weight", flat.get("backbone.patch_embed.proj.weight"))
    if kernel is None or kernel.dim() not in (4, 5):
        raise ValueError(f"not Swin weights: no patch embedding among {sorted(flat)[:4]}, ...")
    if any(name.startswith("features.") for name in flat):
        return _rename("torchvision", flat, strict=True)
    if kernel.dim() == 5:
        full = {k if k.startswith(("backbone.", "cls_head.")) else f"backbone.{k}": v
                for k, v in flat.items()}  # fmt: skip
        return _rename("bevt", full, strict=True)
    bare = {k.removeprefix("backbone.").removeprefix("cls_head."): v for k, v in flat.items()}
    mine = "timm" if any(k.startswith("layers.3.downsample.") for k in bare) else "swin"
    return _rename(mine, bare, strict=False)


def _unwrap(raw: Mapping) -> dict[str, Tensor]:
    """Find the tensors, and take the prefixes of wrappers off their names."""
    while not any(isinstance(value, Tensor) for value in raw.values()):
        inner = next((raw[k] for k in WRAPPERS if isinstance(raw.get(k), Mapping)), None)
        if inner is None:
            raise ValueError(f"no weights inside: it holds {sorted(map(str, raw))[:6]}")
        raw = inner
    flat = {str(k): v for k, v in raw.items() if isinstance(v, Tensor)}
    for prefix in PREFIXES:
        flat = {k.removeprefix(prefix): v for k, v in flat.items()}
    return flat


def _rename(format: str, flat: Mapping[str, Tensor], *, strict: bool) -> Recognised:
    found = Recognised(format, {})
    pretraining = {"backbone.mask_token", "backbone.patch_embed_2d.proj.weight"} & flat.keys()
    back = [(other, mine) for mine, other in NAMES[format]
            if mine != ("patch_embed." if pretraining else "patch_embed.video.")]  # fmt: skip
    parts = [(other, mine) for mine, other in PARTS[format]]
    unknown = []
    # Sort the tensors: ours under another name, rebuilt, the tokenizer's, or unknown.
    for name, value in flat.items():
        if name.endswith((INDEX, "attn_mask")):
            found.left_out[name] = "rebuilt from the window"
            if name.endswith(INDEX) and value.dim() == 2:
                found.tokens = len(value)
        elif name.startswith(TOKENIZER):
            found.tokenizer[name.removeprefix(TOKENIZER)] = value
        elif any(name.startswith(begin) for begin, _ in back):
            mine = translate_name(name, back, parts)
            if mine in IMAGE_KERNELS and value.dim() == 4:
                value = value.unsqueeze(2)
            found.state[mine] = value.flatten() if mine == "mask_token" else value
        elif not name.startswith("fc_norm."):
            unknown.append(name)
    for name in [n for n in flat if n.startswith("fc_norm.") and format == "swin"]:
        # As the released inflation: the norm before the head replaces the encoder's.
        found.state[name.replace("fc_norm.", "norm.")] = flat[name]
        found.left_out[name.replace("fc_norm.", "norm.")] = "replaced by fc_norm"
    if unknown and strict:
        raise ValueError(f"left over {len(unknown)} tensors that aren't {format}'s: {unknown[:4]}")
    found.left_out |= {name: "has no counterpart here" for name in unknown}
    return found


def export(state: State, format: str, tokenizer: State | None = None) -> tuple[State, Reasons]:
    """Write our tensors under another code's names; also give what is left out (our name: why).

    Index buffers are written, too. A 2D format takes what an image stream has of its parts, with
    the middle slice of the bias tables; ``bevt`` also a ``tokenizer``'s encoder.
    Raises ValueError where the format's model needs a part that ``state`` lacks, or has no place
    for one it holds.
    """
    flat = format in ("swin", "timm")
    if flat and "patch_embed.image.proj.weight" not in state:
        raise ValueError(f"{format} weights are an image encoder's; these have no image stream")
    if format == "torchvision" and "patch_embed.proj.weight" not in state:
        raise ValueError("torchvision weights are a classifier's; these are not")
    kept = tuple(mine for mine, _ in NAMES[format])
    window = architecture(state)["window"]
    result: State = {}
    left: Reasons = {}
    for name, value in state.items():
        if flat and not name.startswith(kept):
            left[name] = f"{format} weights have no such part"
            continue
        if flat and name.endswith("bias_table"):  # an image uses the rows of no temporal offset
            value = value.unflatten(0, (2 * window[0] - 1, -1))[window[0] - 1]
        other = translate_name(name, NAMES[format], PARTS[format])
        result[other] = value.reshape(released_shape(name, tuple(value.shape)))
        if name.endswith("bias_table") and format != "timm":  # timm keeps no index in its files
            own = (1, *window[1:]) if flat else window
            result[other.replace(TABLE[0][1], INDEX)] = bias_index(own, own)
    return result | {TOKENIZER + k: v for k, v in (tokenizer or {}).items()}, left


def window_of(
    rows: int, *, near: Size3 | None = None, flat: bool = False, tokens: int = 0
) -> Size3:
    """Find the window (d, h, w) whose bias table has so many rows: (2d-1)(2h-1)(2w-1).

    Windows are square but for ``near``, the window of the model that is to take the table. Of
    several that fit, one of ``near``'s height and width is taken; then a 2D one (d = 1) if the
    weights are ``flat``, one for clips otherwise; then the largest. ``tokens`` of a window, where
    an index buffer gives them, decide. Raises ValueError if none fits.
    """
    wanted = near[1:] if near else (0, 0)
    sides = {(s, s) for s in range(2, (math.isqrt(rows) + 3) // 2)} | ({wanted} if near else set())
    found = []
    for h, w in sides:
        depth, rest = divmod(rows, (2 * h - 1) * (2 * w - 1))
        if depth % 2 and not rest and tokens in (0, (depth + 1) // 2 * h * w):
            found.append(((depth + 1) // 2, h, w))
    if not found:
        raise ValueError(f"a bias table of {rows} rows fits no window")
    return max(found, key=lambda w: (w[1:] == wanted, (w[0] == 1) == flat, w[1]))


def architecture(state: Mapping[str, Tensor], tokens: int = 0) -> dict:
    """Read a model's architecture off its tensors (our names): arguments of BEVT or Classifier.

    ``tokens`` of a window, where known, decides between windows whose tables are equally long.
    """
    tables = [state[f"swin.stages.{s}.blocks.0.attn.bias_table"] for s in STAGES]
    kernels = {n.removesuffix(".proj.weight"): v for n, v in state.items()
               if n.startswith("patch_embed") and n.endswith(".proj.weight")}  # fmt: skip
    kernel = kernels[max(kernels)]  # of the clips, if there are two
    # An image stream doesn't show the clip's patch: the released two frames.
    frames = 2 if max(kernels) == "patch_embed.image" else kernel.shape[2]
    found = {
        "embed_dim": len(kernel),
        "depths": tuple(
            len({n.split(".")[4] for n in state if n.startswith(f"swin.stages.{s}.b")})
            for s in STAGES
        ),
        "num_heads": tuple(table.shape[1] for table in tables),
        "window": window_of(len(tables[0]), tokens=tokens),
        "patch": (frames, *kernel.shape[3:]),
        "patch_norm": any(n.startswith("patch_embed") and ".norm." in n for n in state),
    }
    if "token_head.weight" in state:
        found["vocab_size"] = len(state["token_head.weight"])
        found["streams"] = tuple(s for s in ("video", "image") if f"patch_embed.{s}" in kernels)
    elif "head.weight" in state:
        found["num_classes"] = len(state["head.weight"])
    return found
