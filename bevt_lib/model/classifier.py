"""The classifier that is fine-tuned from BEVT: Swin, average pooling, one linear layer.

Source: BEVT section 3.3; the released configs for Kinetics-400 and Something-Something-V2.
"""

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from bevt_lib.base.config import Views
from bevt_lib.base.trainable import Term
from bevt_lib.model.bevt import _whole
from bevt_lib.model.hub import Saved
from bevt_lib.model.swin import PatchEmbed, Size3, Swin, initialise


class Classifier(Saved):
    """Video Swin with average pooling and one linear layer, fine-tuned to recognise actions.

    Takes clips of any size. ``smoothing`` is label smoothing (released: 0.1 on SSv2: the true class
    gets 0.9 + 0.1 / classes); ``dropout`` acts before the head (released: 0.5) and, like stochastic
    depth, only where the caller gives noise. ``classes`` are their names, ``views`` how clips are
    read, for :mod:`bevt_lib.predict`; ``save_pretrained(folder)`` writes a model folder.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        embed_dim: int = 128,
        depths: Sequence[int] = (2, 2, 18, 2),
        num_heads: Sequence[int] = (4, 8, 16, 32),
        window: Size3 = (8, 7, 7),
        patch: Size3 = (2, 4, 4),
        patch_norm: bool = True,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        smoothing: float = 0.0,
        released: bool = False,
        linear_std: float = 0.02,
        classes: Sequence[str] = (),
        views: Views | None = None,
    ):
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"a classifier needs at least two classes, got {num_classes}")
        if classes and len(classes) != num_classes:
            raise ValueError(f"{len(classes)} names for {num_classes} classes")
        self.classes = tuple(classes) or tuple(str(c) for c in range(num_classes))
        self.views = views
        self.patch_embed = PatchEmbed(patch, embed_dim, norm=patch_norm)
        self.swin = Swin(
            embed_dim, depths, num_heads, window, drop_path=drop_path, released=released
        )
        dim = self.swin.dims[-1]
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)
        self.dropout, self.smoothing = dropout, smoothing
        initialise(self, linear_std)
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

    def counts(self, batch: Mapping[str, Mapping[str, Tensor]]) -> list[int]:
        """Count the labelled clips."""
        return [len(batch["clip"]["label"])]

    def forward(
        self, batch: Mapping[str, Mapping[str, Tensor]], noise: Mapping[str, Tensor] | None = None
    ) -> dict[str, Term]:
        """Give the classification loss for {"clip": {"pixels", "label": int64 (B,)}}."""
        part = batch["clip"]
        logits = self.logits(part["pixels"], None if noise is None else noise["clip"])
        loss = F.cross_entropy(
            _whole(logits), part["label"], reduction="sum", label_smoothing=self.smoothing
        )
        correct = (logits.argmax(dim=-1) == part["label"]).sum()
        return {"clip": Term(loss, len(logits), {"accuracy": correct})}
