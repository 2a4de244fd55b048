"""BEVT itself: hide tokens of a clip or an image, encode, decode, name what was hidden.

Also the classifier that is fine-tuned from it. Source: BEVT sections 3.1 to 3.3; the released
configs for Swin-B.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bevt_lib.base.config import ClipSpec, Model, require
from bevt_lib.base.onednn import Linear
from bevt_lib.base.trainable import Batch, Noise, Term
from bevt_lib.model.hub import Saved, as_architecture
from bevt_lib.model.masking import mask_in_time, mask_on_grid
from bevt_lib.model.swin import PatchEmbed, Swin, initialise

STREAMS = ("video", "image")
IMAGE_FRAMES = 1
STRIDE = 16  # pixels of the clip per token: Swin's stage 3


class Decoder(nn.Module):
    """Lift Swin's last stage to stage 3's grid, fuse the two, and unfold time to frames.

    (B, D, h, w, 4C) and (B, D, ceil(h/2), ceil(w/2), 8C) to (B, T, h, w, 8C). ``frames_per_step``
    is 1 for images, the temporal patch size for clips. No activation and no norm, as released.
    """

    def __init__(self, dim: int, frames_per_step: int):
        super().__init__()
        self.up = nn.ConvTranspose3d(dim, dim, kernel_size=(1, 2, 2), stride=(1, 2, 2))
        self.fuse = Linear(dim // 2 + dim, dim)
        lift = (frames_per_step, 1, 1)  # kernel and stride
        self.lift = nn.ConvTranspose3d(dim, dim, lift, lift) if frames_per_step > 1 else None

    def forward(self, stage3: Tensor, stage4: Tensor) -> Tensor:
        height, width = stage3.shape[2:4]
        if height % 2 or width % 2:
            raise ValueError(
                f"stage 3 gives a {height}x{width} map, and the decoder needs even sides: use a "
                f"height and width that are multiples of 32 px, e.g. {16 * (height + height % 2)}"
                f"x{16 * (width + width % 2)}"
            )
        up = self.up(stage4.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)
        x = self.fuse(torch.cat([stage3, up], dim=-1))
        if self.lift is None:
            return x
        return self.lift(x.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)


class BEVT(Saved):
    """Masked-token prediction for two streams through one shared Swin.

    Shared: the stages, the mask token, the final norm and the token head. Per stream: the patch
    embedding and the decoder. ``vocab_size`` is the tokenizer's. ``streams`` names what is built:
    an image-stream model has no video parts. Instead of the architecture its fields may be given,
    drop path 0 by default. ``views`` says how the model wants clips.
    ``save_pretrained(folder)`` writes a model folder, :func:`bevt_lib.weights.load.load_model`
    reads it.
    """

    def __init__(
        self,
        architecture: Model | None = None,
        *,
        vocab_size: int = 8192,
        streams: Sequence[str] = STREAMS,
        views: ClipSpec | None = None,
        **fields: Any,
    ):
        a = as_architecture(architecture, fields)
        super().__init__(a, views, vocab_size=vocab_size, streams=list(streams))
        known = set() < set(streams) <= set(STREAMS)
        require(known, f"streams must be chosen from {STREAMS}, got {streams}")
        self.frames_per_step = {"video": a.patch[0], "image": IMAGE_FRAMES}
        self.swin = Swin(a)
        self.patch_embed = nn.ModuleDict()
        self.decoder = nn.ModuleDict()
        for stream in streams:
            frames = self.frames_per_step[stream]
            patch = (frames, *a.patch[1:])
            self.patch_embed[stream] = PatchEmbed(patch, a.embed_dim, norm=a.patch_norm)
            self.decoder[stream] = Decoder(self.swin.dims[-1], frames)
        self.mask_token = nn.Parameter(torch.zeros(a.embed_dim))
        self.norm = nn.LayerNorm(self.swin.dims[-1])
        self.token_head = Linear(self.swin.dims[-1], vocab_size)
        initialise(self, a.linear_std)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-2.0, b=2.0)
        self.noise_sizes = {stream: 2 * self.swin.num_blocks for stream in streams}

    def features(
        self, stream: str, pixels: Tensor, mask: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Encode and decode: one vector for each place of the tokenizer's grid.

        ``pixels``: normalised float (B, 3, T, H, W), T = 1 for images. ``mask``: bool (B, D, h, w),
        True = hidden, or None. Returns (B, T, H/16, W/16, 8C). Raises ValueError for a size whose
        stage-3 map is odd.
        """
        x = self.patch_embed[stream](pixels)
        if mask is not None:
            x = self.hide(x, mask)
        *_, stage3, stage4 = self.swin(x, noise)
        return self.norm(self.decoder[stream](stage3, stage4))

    def hide(self, x: Tensor, mask: Tensor) -> Tensor:
        """Replace the patches (B, D, H, W, C) under the mask by the one learned mask token."""
        hidden = mask_on_grid(mask, (x.shape[1], x.shape[2], x.shape[3]))
        return torch.where(hidden[..., None], self.mask_token.to(x.dtype), x)

    def predict(self, stream: str, pixels: Tensor, mask: Tensor) -> Tensor:
        """Give the likeliest token id of every place: int64 (B, T, h, w)."""
        return self.token_head(self.features(stream, pixels, mask)).argmax(dim=-1)

    def stream_loss(
        self, stream: str, pixels: Tensor, ids: Tensor, mask: Tensor, noise: Tensor | None = None
    ) -> Term:
        """Sum the cross-entropy over the hidden places; ``ids``: int64 (B, T, h, w)."""
        x = self.features(stream, pixels, mask, noise)
        hidden = mask_in_time(mask, self.frames_per_step[stream])
        if x.shape[:-1] != ids.shape or hidden.shape != ids.shape:
            shapes = ", ".join(str(tuple(s)) for s in (x.shape[:-1], ids.shape, hidden.shape))
            raise ValueError(f"{stream}: features, ids and mask must agree, got {shapes}: size the "
                             "tokenizer's input and the mask from the token grid")  # fmt: skip
        logits, targets = self.token_head(x[hidden]), ids[hidden]
        loss = F.cross_entropy(_whole(logits), targets, reduction="sum")
        correct = (logits.argmax(dim=-1) == targets).sum()
        return Term(loss, len(targets), {"accuracy": correct})

    def counts(self, batch: Batch) -> list[int]:
        """Count each stream's hidden places in frames, before anything is computed."""
        return [int(p["mask"].sum()) * self.frames_per_step[s] for s, p in batch.items()]

    def forward(self, batch: Batch, noise: Noise | None = None) -> dict[str, Term]:
        """Give each stream's loss for {stream: {"pixels", "ids", "mask"}}; they are summed."""
        return {
            s: self.stream_loss(s, p["pixels"], p["ids"], p["mask"], noise[s] if noise else None)
            for s, p in batch.items()
        }


def _whole(x: Tensor) -> Tensor:
    """Bring half precision to float32; float32 and float64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
