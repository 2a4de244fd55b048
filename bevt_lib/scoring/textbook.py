"""What people would use instead of the kit: the other side of ``python -m bevt_lib.bench train``.

The student is torchvision's Swin with attention as one writes it down, and names the tokens of all
places; the tokenizer is the DALL-E package's encoder as it stands, on every frame; clips and images
pass one after the other. So computes the code released with BEVT, whose Swin and torchvision's run
at the same speed. Weights are taken from the kit's models, so that both sides have equal losses.
"""

from typing import Any

import dall_e
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.video import swin_transformer

from bevt_lib.base.config import Model
from bevt_lib.base.trainable import Batch
from bevt_lib.model.bevt import BEVT
from bevt_lib.model.classifier import Classifier
from bevt_lib.model.masking import mask_in_time
from bevt_lib.model.normalisation import normalise
from bevt_lib.weights.formats import NAMES, PARTS, export, translate_name


def build_swin(a: Model, classes: int = 1) -> nn.Module:
    """Build torchvision's video Swin of an architecture, without stochastic depth."""
    return swin_transformer.SwinTransformer3d(
        list(a.patch), a.embed_dim, list(a.depths), list(a.num_heads), list(a.window),
        stochastic_depth_prob=0.0, num_classes=classes, norm_layer=nn.LayerNorm,
        patch_embed=swin_transformer.PatchEmbed3d,
    )  # fmt: skip


def build_classifier(model: Classifier, a: Model) -> nn.Module:
    """Give torchvision's classifier with a model's weights: takes float (B, 3, T, H, W)."""
    theirs = build_swin(a, len(model.classes))
    theirs.load_state_dict(export(model.state_dict(), "torchvision")[0])
    return theirs.train(model.training)


class TextbookBEVT(nn.Module):
    """BEVT as the released code computes it, with a kit's model's weights (clean image path).

    Patch embeddings, decoder and token head are the kit's own layers.
    """

    def __init__(self, model: BEVT, a: Model):
        super().__init__()
        stages = build_swin(a)
        names, parts = NAMES["torchvision"], PARTS["torchvision"]
        own = {translate_name(k, names, parts): v for k, v in model.state_dict().items()
               if k.startswith("swin.")}  # fmt: skip
        unmatched = stages.load_state_dict(own, strict=False).unexpected_keys
        assert not unmatched, unmatched
        self.stages = nn.ModuleList(stages.get_submodule("features").children())
        # What surrounds the stages is plain on either side: copies of the kit's.
        self.rest = BEVT(a, vocab_size=model.token_head.out_features)
        self.rest.load_state_dict(model.state_dict())
        del self.rest.swin

    def stream_loss(self, stream: str, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Give the mean cross-entropy over the hidden places, of logits at all places."""
        x = self.rest.hide(self.rest.patch_embed[stream](pixels), mask)
        maps = []
        for layer in self.stages:  # stages and mergings in turn
            x = layer(x)
            maps.append(x)
        logits = self.rest.token_head(self.rest.norm(self.rest.decoder[stream](maps[4], maps[6])))
        hidden = mask_in_time(mask, self.rest.frames_per_step[stream])
        return F.cross_entropy(logits[hidden].float(), ids[hidden])

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Give each stream's mean loss for {stream: {"pixels", "ids", "mask"}}."""
        return {s: self.stream_loss(s, p["pixels"], p["ids"], p["mask"]) for s, p in batch.items()}


@torch.no_grad()
def name_frames(encoder: dall_e.Encoder, pictures: Tensor) -> Tensor:
    """Give the ids of uint8 (N, h, w, 3): int64 (N, h / 8, w / 8), as the package's README does."""
    pixels = pictures.permute(0, 3, 1, 2).contiguous().float() / 255
    return encoder(dall_e.map_pixels(pixels)).argmax(dim=1)


def add_all_tokens(batch: Batch, encoder: dall_e.Encoder) -> dict[str, Any]:
    """Name every frame of every stream, and normalise the pixels; compare ``base.add_tokens``."""
    result = {}
    for stream, part in batch.items():
        frames = part["tokenizer_input"]
        ids = name_frames(encoder, frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        result[stream] = {**part, "pixels": normalise(part["pixels"]), "ids": ids}
    return result
