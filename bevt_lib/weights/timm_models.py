"""Our encoders as timm models: import this module, then ``timm.create_model("bevt_…")``.

| name | reads | window | BEVT's |
| --- | --- | --- | --- |
| ``bevt_swin_base`` | clips (B, 3, T, H, W) | (8, 7, 7) | pretraining, Kinetics-400 |
| ``bevt_swin_base_window16`` | clips | (16, 7, 7) | Something-Something-V2 |
| ``bevt_swin_base_image`` | pictures (B, 3, H, W) | (8, 7, 7) | image stream |
| ``bevt_lesson``, ``bevt_lesson_image`` | clips, pictures | (4, 3, 3) | the shipped lesson models |

Pixels are floats normalised by timm's ImageNet mean and spread, as in BEVT. No weights come with a
name: give ``checkpoint_path=`` a classifier's ``model.safetensors``, or fill the encoder by
:func:`bevt_lib.weights.load.start_classifier`. ``features_only=True`` gives the four stages.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from bevt_lib.base.config import require
from bevt_lib.model.hub import as_architecture
from bevt_lib.model.swin import PatchEmbed, Swin, initialise

LESSON = {"embed_dim": 24, "depths": (1, 1, 3, 1), "num_heads": (1, 2, 4, 8), "window": (4, 3, 3)}
# By name: the side of a picture, pixels, and where the encoder differs from Swin-B for clips.
MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    "bevt_swin_base": (224, {}),
    "bevt_swin_base_window16": (224, {"window": (16, 7, 7)}),
    "bevt_swin_base_image": (224, {"image": True}),
    "bevt_lesson": (96, LESSON),
    "bevt_lesson_image": (96, {**LESSON, "image": True}),
}


class Encoder(nn.Module):
    """Video Swin in timm's manner, parameters named as in ``model.classifier``.

    Reads normalised clips (B, 3, T, H, W), or pictures (B, 3, H, W) if ``image``, of any size.
    ``fields`` are those of the architecture that aren't Swin-B's. In training mode
    stochastic depth draws from torch's global generator.
    """

    def __init__(
        self, num_classes: int = 1000, drop_rate: float = 0.0, drop_path_rate: float = 0.0,
        in_chans: int = 3, *, image: bool = False, **fields: Any,
    ):  # fmt: skip
        super().__init__()
        require(in_chans == 3, f"the encoders read RGB, 3 channels, not {in_chans}")
        a = as_architecture(None, {"drop_path": drop_path_rate, **fields})
        self.image, self.drop_rate, self.drop_path_rate = image, drop_rate, drop_path_rate
        self.patch_embed = PatchEmbed((1, *a.patch[1:]) if image else a.patch, a.embed_dim)
        self.swin = Swin(a)
        self.num_features = self.head_hidden_size = self.swin.dims[-1]
        self.norm = nn.LayerNorm(self.num_features)
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"swin.stages.{i}"}
            for i, dim in enumerate(self.swin.dims)
        ]
        self.reset_classifier(num_classes)
        initialise(self)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head; 0 classes: none, ``forward`` gives pooled features."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        """Give the head."""
        return self.head

    def stages(self, x: Tensor) -> list[Tensor]:
        """Encode to the four stages' maps, (B, D, h, w, C) each."""
        noise = None
        if self.training and self.drop_path_rate:
            noise = torch.rand(len(x), 2 * self.swin.num_blocks, device=x.device)
        return self.swin(self.patch_embed(x[:, :, None] if self.image else x), noise)

    def forward_features(self, x: Tensor) -> Tensor:
        """Encode to the normed last stage: (B, D, h, w, C), D = 1 for pictures."""
        return self.norm(self.stages(x)[-1])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool the features, and score the classes unless ``pre_logits``."""
        x = F.dropout(x.mean(dim=(1, 2, 3)), self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Score the classes: (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self, x: Tensor, indices: list[int] | None = None, norm: bool = False,
        output_fmt: str = "NCHW", intermediates_only: bool = False,
    ) -> Any:  # fmt: skip
        """Give chosen stages channels-first, (B, C, D, h, w), for pictures (B, C, h, w).

        timm's interface for ``features_only``. ``norm`` applies the final norm to the last stage.
        Raises ValueError for another ``output_fmt``.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"features come channels-first (NCHW), not {output_fmt}")
        maps = self.stages(x)
        last = self.norm(maps[-1])
        maps = [*maps[:-1], last] if norm else maps
        chosen = [maps[i].permute(0, 4, 1, 2, 3) for i in (indices or range(len(maps)))]
        chosen = [m[:, :, 0] for m in chosen] if self.image else chosen
        return chosen if intermediates_only else (last, chosen)


def _register(name: str, fields: dict[str, Any]) -> None:
    """Enter a model under its name: timm takes functions, and their names."""

    def create(pretrained: bool = False, **settings: Any) -> Encoder:
        feature_cfg = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}
        given = {**fields, **settings}
        return build_model_with_cfg(Encoder, name, pretrained, feature_cfg=feature_cfg, **given)

    create.__name__ = name
    register_model(create)


default_cfgs = generate_default_cfgs({
    f"{name}.none": {"input_size": (3, side, side), "first_conv": "patch_embed.proj",
                     "classifier": "head"}
    for name, (side, _) in MODELS.items()
})  # fmt: skip
for _name, (_, _fields) in MODELS.items():
    _register(_name, _fields)
