"""The classifier that is fine-tuned from BEVT: Swin, average pooling, one linear layer.

Source: BEVT section 3.3; the released configs for Kinetics-400 and Something-Something-V2.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bevt_lib.base.config import ClipSpec, Model, require
from bevt_lib.base.trainable import Batch, Noise, Term
from bevt_lib.model.bevt import _whole
from bevt_lib.model.hub import Saved, as_architecture
from bevt_lib.model.swin import PatchEmbed, Swin, initialise


class Classifier(Saved):
    """Video Swin with average pooling and one linear layer, fine-tuned to recognise actions.

    Takes clips of any size. Instead of the architecture its fields may be given, drop path 0 by
    default. ``smoothing`` is label smoothing (released: 0.1 on SSv2: the true class
    gets 0.9 + 0.1 / classes); ``dropout`` acts before the head (released: 0.5) and, like stochastic
    depth, only where the caller gives noise. ``classes`` are their names, ``views`` how clips are
    read, for :mod:`bevt_lib.predict`; ``save_pretrained(folder)`` writes a model folder.
    """

    def __init__(
        self,
        architecture: Model | None = None,
        *,
        num_classes: int,
        dropout: float = 0.0,
        smoothing: float = 0.0,
        classes: Sequence[str] = (),
        views: ClipSpec | None = None,
        **fields: Any,
    ):
        a = as_architecture(architecture, fields)
        super().__init__(
            a, views, num_classes=num_classes, dropout=dropout, smoothing=smoothing,
            classes=list(classes),
        )  # fmt: skip
        require(num_classes > 1, f"a classifier needs at least two classes, got {num_classes}")
        given = len(classes)
        require(given in (0, num_classes), f"{given} names for {num_classes} classes")
        self.classes = tuple(classes) or tuple(str(c) for c in range(num_classes))
        self.patch_embed = PatchEmbed(a.patch, a.embed_dim, norm=a.patch_norm)
        self.swin = Swin(a)
        dim = self.swin.dims[-1]
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)
        self.dropout, self.smoothing = dropout, smoothing
        initialise(self, a.linear_std)
        nn.init.normal_(self.head.weight, std=0.01)
        self.noise_sizes = {"clip": 2 * self.swin.num_blocks + (dim if dropout else 0)}

    def features(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Encode normalised clips (B, 3, T, H, W) to the normed last stage (B, D, h, w, C)."""
        return self.norm(self.swin(self.patch_embed(pixels), noise)[-1])

    def logits(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Score the classes of normalised float clips: (B, num_classes)."""
        blocks = 2 * self.swin.num_blocks
        x = self.features(pixels, None if noise is None else noise[:, :blocks])
        x = x.mean(dim=(1, 2, 3))
        if noise is not None and self.dropout:
            x = x * (noise[:, blocks:] >= self.dropout) / (1 - self.dropout)
        return self.head(x)

    def counts(self, batch: Batch) -> list[int]:
        """Count the labelled clips."""
        return [len(batch["clip"]["label"])]

    def forward(self, batch: Batch, noise: Noise | None = None) -> dict[str, Term]:
        """Give the classification loss for {"clip": {"pixels", "label": int64 (B,)}}."""
        part = batch["clip"]
        logits = self.logits(part["pixels"], None if noise is None else noise["clip"])
        loss = F.cross_entropy(
            _whole(logits), part["label"], reduction="sum", label_smoothing=self.smoothing
        )
        correct = (logits.argmax(dim=-1) == part["label"]).sum()
        return {"clip": Term(loss, len(logits), {"accuracy": correct})}


@torch.no_grad()
def init_antisymmetric(model: Classifier, share: float) -> None:
    """Start a share of the 3D patch filters as (+w, -w) in time: later frames minus the first.

    The released inflation gives all frames of a patch the same weights, so the embedding can't
    tell their order. These filters can, and are blind to what stands still. The later half of
    pretrained filters is overwritten. Only a start: they are trained like the others. Our option.
    """
    kernel = model.patch_embed.proj.weight  # (C, 3, frames, 4, 4)
    half, filters = kernel.shape[2] // 2, round(share * len(kernel))
    kernel[:filters, :, half : 2 * half] = -kernel[:filters, :, :half]
