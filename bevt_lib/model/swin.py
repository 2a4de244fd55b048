"""Video Swin for clips and images: patch embedding, shifted windows, relative bias, merging.

Feature maps are channels-last, (B, D, H, W, C), with D temporal tokens. An image is a one-frame
clip: D = 1 after its own patch embedding, and every later line is shared. Source: Video Swin
Transformer as released with BEVT (Swin-B: 128 channels, depths 2-2-18-2, window (8, 7, 7)).
"""

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bevt_lib.base.config import Model, require
from bevt_lib.base.onednn import Linear
from bevt_lib.model.attention import Kinds, attend

Size3 = tuple[int, int, int]
MASKED_LOGIT = -100.0  # added to logits across shift regions; the released value, not -inf


class WindowPlan(NamedTuple):
    """How one block cuts a (D, H, W) map into windows."""

    window: Size3  # effective window: never larger than the map
    shift: Size3  # roll before cutting; 0 on an axis with one window
    padded: Size3  # the map, padded at its ends to whole windows
    bias_index: Tensor  # int64 (N, N): rows of the bias table for each pair of a window's tokens
    mask: Tensor | None  # float (windows, N, N), 0 or -100 across shift regions
    kinds: Kinds  # the windows that share a mask, with it; none without a mask


@lru_cache(maxsize=256)
def window_plan(
    size: Size3, window: Size3, shifted: bool, released_quirks: bool, device: torch.device
) -> WindowPlan:
    """Plan the windows of one block: effective window, shift, padding, bias index, mask.

    ``released_quirks=False`` is the clean path: standard Swin masking, true geometry in small
    windows.
    ``released_quirks=True`` reproduces three quirks of the released code, all here:

    - a window smaller than the full one takes the top-left corner of the full bias index, which
      scrambles the bias where height or width shrank;
    - a one-frame map (the image stream) takes square windows of the window's height and is
      neither padded nor adapted, so a size that does not fit raises ValueError;
    - on a one-frame map the shift mask is applied in *every* block, shifted or not.
    """
    if released_quirks and size[0] == 1:
        return _released_image_plan(size, window, shifted, device)
    effective = _three(min(s, w) for s, w in zip(size, window, strict=True))
    shift = _three(w // 2 if shifted and s > w else 0 for s, w in zip(size, window, strict=True))
    padded = _three(math.ceil(s / w) * w for s, w in zip(size, effective, strict=True))
    tokens = math.prod(effective)
    index = bias_index(window if released_quirks else effective, window)[:tokens, :tokens]
    mask = shift_mask(padded, effective, shift) if any(shift) else None
    return WindowPlan(effective, shift, padded, index.to(device), *on(device, mask))


def _three(values: Iterable[int]) -> Size3:
    d, h, w = values
    return d, h, w


def _released_image_plan(
    size: Size3, window: Size3, shifted: bool, device: torch.device
) -> WindowPlan:
    side = window[1]
    if size[1] % side or size[2] % side:
        raise ValueError(
            f"the released image path needs maps that are multiples of the window {side}, got "
            f"{size[1]}x{size[2]}: use images of 32 x {side} = {32 * side} px, or "
            "released_quirks=False"
        )
    square = (1, side, side)
    region_shift = (0, side // 2, side // 2)
    index = bias_index(window, window)[: side * side, : side * side].to(device)
    mask = shift_mask(size, square, region_shift)
    roll = region_shift if shifted else (0, 0, 0)
    return WindowPlan(square, roll, size, index, *on(device, mask))


def bias_index(window: Size3, table_window: Size3) -> Tensor:
    """Index the bias table of ``table_window`` for all token pairs of ``window``: int64 (N, N).

    Pair (i, j) of tokens in (d, h, w) order takes row
    (di-dj+Wd-1)(2Wh-1)(2Ww-1) + (hi-hj+Wh-1)(2Ww-1) + (wi-wj+Ww-1) of the table.
    """
    axes = torch.meshgrid(*(torch.arange(w) for w in window), indexing="ij")
    place = torch.stack(axes).flatten(1)  # (3, N)
    offset = place[:, :, None] - place[:, None, :]  # (3, N, N)
    depth, height, width = table_window
    rows = (offset[0] + depth - 1) * (2 * height - 1) + offset[1] + height - 1
    return rows * (2 * width - 1) + offset[2] + width - 1


def shift_mask(padded: Size3, window: Size3, shift: Size3) -> Tensor:
    """Keep tokens that a cyclic shift brought together apart: (windows, N, N) of 0 or -100.

    Each shifted axis has three regions, [0, -window), [-window, -shift) and [-shift, end).
    """
    region = torch.zeros(padded, dtype=torch.int64, device="cpu")  # with values, in a plan, too
    for axis, (length, w, s) in enumerate(zip(padded, window, shift, strict=True)):
        label = torch.zeros(length, dtype=torch.int64, device="cpu")
        if s:
            label[-w:] += 1
            label[-s:] += 1
        view = [1, 1, 1]
        view[axis] = length
        region = region * 3 + label.view(view)
    windows = split_windows(region[None, ..., None], window).squeeze(-1)  # (windows, N)
    apart = windows[:, :, None] != windows[:, None, :]
    return apart.float() * MASKED_LOGIT


def on(device: torch.device, mask: Tensor | None) -> tuple[Tensor | None, Kinds]:
    """Bring a shift mask (windows, N, N) to a device, and group its windows by what it says."""
    if mask is None:
        return None, ()
    distinct, kind = mask.unique(dim=0, return_inverse=True)
    windows = [(kind == i).nonzero().flatten().to(device) for i in range(len(distinct))]
    return mask.to(device), tuple(zip(windows, distinct.to(device), strict=True))


def split_windows(x: Tensor, window: Size3) -> Tensor:
    """Cut (B, D, H, W, C) into windows: (B * windows, tokens of a window, C)."""
    d, h, w = window
    return rearrange(x, "b (nd d) (nh h) (nw w) c -> (b nd nh nw) (d h w) c", d=d, h=h, w=w)


def join_windows(x: Tensor, window: Size3, padded: Size3) -> Tensor:
    """Undo :func:`split_windows`: back to (B, D, H, W, C) of the padded size."""
    (d, h, w), (big_d, big_h, big_w) = window, padded
    return rearrange(
        x, "(b nd nh nw) (d h w) c -> b (nd d) (nh h) (nw w) c",
        nd=big_d // d, nh=big_h // h, nw=big_w // w, d=d, h=h, w=w,
    )  # fmt: skip


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows, with a learned bias per relative position."""

    def __init__(self, dim: int, num_heads: int, window: Size3):
        super().__init__()
        self.num_heads = num_heads
        rows = math.prod(2 * w - 1 for w in window)
        self.bias_table = nn.Parameter(torch.zeros(rows, num_heads))
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, plan: WindowPlan) -> Tensor:
        """Attend within (B * windows, N, C), cut as planned."""
        count = 1 if plan.mask is None else len(plan.mask)  # windows with masks of their own
        qkv = rearrange(self.qkv(x), "(b w) n (three heads c) -> b w n three heads c",
                        w=count, three=3, heads=self.num_heads)  # fmt: skip
        bias = self.bias_table[plan.bias_index].permute(2, 0, 1)
        out = attend(qkv, bias, plan.mask, plan.kinds)
        return self.proj(rearrange(out, "b w n heads c -> (b w) n (heads c)"))


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, dim: int, ratio: float = 4.0):
        super().__init__()
        self.fc1 = Linear(dim, int(dim * ratio))
        self.fc2 = Linear(int(dim * ratio), dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """One Swin block: windowed attention, then the MLP, each residual with stochastic depth."""

    compiles_alone = True  # with --run.compile: the step, as a whole, would take far longer

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: Size3,
        *,
        shifted: bool,
        drop_path: float,
        released_quirks: bool,
    ):
        super().__init__()
        self.window, self.shifted, self.released_quirks = _three(window), shifted, released_quirks
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim)

    def forward(self, x: Tensor, noise: Tensor | None) -> Tensor:
        """Transform (B, D, H, W, C); ``noise`` is uniform (B, 2) for stochastic depth, or None."""
        first, second = (None, None) if noise is None else noise.unbind(1)
        x = x + drop_path(self.attend(self.norm1(x)), self.drop_path, first)
        return x + drop_path(self.mlp(self.norm2(x)), self.drop_path, second)

    def attend(self, x: Tensor) -> Tensor:
        """Pad, shift, cut, attend, join, shift back, crop. Padding is attended to, as released."""
        size = (x.shape[1], x.shape[2], x.shape[3])
        plan = window_plan(size, self.window, self.shifted, self.released_quirks, x.device)
        d, h, w = (p - s for p, s in zip(plan.padded, size, strict=True))
        if d or h or w:
            x = F.pad(x, (0, 0, 0, w, 0, h, 0, d))
        if any(plan.shift):
            x = x.roll([-s for s in plan.shift], dims=(1, 2, 3))
        x = self.attn(split_windows(x, plan.window), plan)
        x = join_windows(x, plan.window, plan.padded)
        if any(plan.shift):
            x = x.roll(plan.shift, dims=(1, 2, 3))
        return x[:, : size[0], : size[1], : size[2]]


def drop_path(x: Tensor, rate: float, noise: Tensor | None) -> Tensor:
    """Drop a residual branch where uniform ``noise`` (B,) is below ``rate``; rescale the rest."""
    if noise is None or rate == 0:
        return x
    keep = (noise >= rate).to(x.dtype) / (1 - rate)
    return x * keep.view(-1, *[1] * (x.dim() - 1))


class PatchMerging(nn.Module):
    """Halve height and width, double the channels; time is never merged."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W, C) to (B, D, ceil(H/2), ceil(W/2), 2C); odd sizes are padded with zeros."""
        x = F.pad(x, (0, 0, 0, x.shape[3] % 2, 0, x.shape[2] % 2))
        x = rearrange(x, "b d (h dh) (w dw) c -> b d h w (dw dh c)", dh=2, dw=2)
        return self.reduction(self.norm(x))


class PatchEmbed(nn.Module):
    """Cut a clip or image into patches and embed each: (B, 3, T, H, W) to (B, D, H', W', C).

    ``patch`` is (frames, height, width): (2, 4, 4) for clips, (1, 4, 4) for images. Sizes that are
    not multiples of the patch are padded with zeros at the end of each axis.
    """

    def __init__(self, patch: Size3, dim: int, *, norm: bool = True):
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv3d(3, dim, kernel_size=_three(patch), stride=_three(patch))
        self.norm = nn.LayerNorm(dim) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        t, h, w = (-s % p for s, p in zip(x.shape[2:], self.patch, strict=True))
        x = self.proj(F.pad(x, (0, w, 0, h, 0, t)))
        x = rearrange(x, "b c d h w -> b d h w c")
        return x if self.norm is None else self.norm(x)


class Stage(nn.Module):
    """Blocks at one resolution, every second one shifted, and the merging that follows them."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: Size3,
        drop_paths: list[float],
        *,
        merge: bool,
        released_quirks: bool,
    ):
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(
                dim,
                num_heads,
                window,
                shifted=i % 2 == 1,
                drop_path=rate,
                released_quirks=released_quirks,
            )
            for i, rate in enumerate(drop_paths)
        )
        self.downsample = PatchMerging(dim) if merge else None


class Swin(nn.Module):
    """The four stages of Video Swin, shared by clips and images.

    Takes embedded patches (B, D, H, W, C) and returns the output of each stage before merging,
    with C, 2C, 4C, 8C channels at H, H/2, H/4, H/8. ``drop_path`` rises linearly from 0 to its
    value over all blocks. ``released_quirks`` reproduces the released code's, see
    :func:`window_plan`. Raises ValueError if a width is not a multiple of its number of heads.

    With the attribute ``checkpoint_activations`` a block keeps only its input for the backward
    pass and is computed once more there: less memory, about a third more work, the same bits (the
    noise of stochastic depth is an input).
    """

    checkpoint_activations = False

    def __init__(self, architecture: Model):
        super().__init__()
        depths, num_heads = architecture.depths, architecture.num_heads
        four = len(depths) == len(num_heads) == 4
        require(four, f"Swin has four stages: got depths {depths}, num_heads {num_heads}")
        self.dims = [architecture.embed_dim * 2**i for i in range(4)]
        for dim, heads in zip(self.dims, num_heads, strict=True):
            require(dim % heads == 0, f"a width of {dim} can't be split into {heads} heads")
        last = max(1, sum(depths) - 1)
        rates = [architecture.drop_path * i / last for i in range(sum(depths))]
        self.num_blocks = sum(depths)
        self.stages = nn.ModuleList()
        for i, (dim, heads) in enumerate(zip(self.dims, num_heads, strict=True)):
            mine = rates[sum(depths[:i]) : sum(depths[: i + 1])]
            stage = Stage(
                dim, heads, architecture.window, mine, merge=i < 3,
                released_quirks=architecture.released_quirks,
            )  # fmt: skip
            self.stages.append(stage)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> list[Tensor]:
        """Run all stages; ``noise`` is uniform (B, 2 * num_blocks) for stochastic depth, or None.

        Without noise no branch is dropped, in training mode too: randomness is the caller's.
        """
        outputs = []
        noises = iter([None] * self.num_blocks if noise is None else noise.split(2, dim=1))
        for stage in self.stages:
            assert isinstance(stage, Stage)
            for block in stage.blocks:
                if self.checkpoint_activations and torch.is_grad_enabled():
                    x = checkpoint(block, x, next(noises), use_reentrant=False,
                                   preserve_rng_state=False)  # fmt: skip
                else:
                    x = block(x, next(noises))
            outputs.append(x)
            if stage.downsample is not None:
                x = stage.downsample(x)
        return outputs


def initialise(module: nn.Module, std: float = 0.02) -> None:
    """Initialise linear layers, norms and bias tables in place.

    ``std`` > 0: truncated normal of that spread for linear weights (released: 0.02, cut at +-2);
    ``std`` = 0: a spread of 1/sqrt(fan-in), which small models need to leave the start (measured
    in the kit's pilot). Biases 0, norms 1 and 0, bias tables 0.02; convolutions keep PyTorch's own.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            spread = std or layer.in_features**-0.5
            nn.init.trunc_normal_(layer.weight, std=spread, a=-2.0, b=2.0)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.LayerNorm):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, WindowAttention):
            nn.init.trunc_normal_(layer.bias_table, std=0.02, a=-2.0, b=2.0)
