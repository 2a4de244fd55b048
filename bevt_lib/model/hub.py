"""A model as a folder: ``save_pretrained`` writes it, ``weights.load`` reads it.

``config.json`` is flat: the fields of the architecture beside the model's other arguments.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import PyTorchModelHubMixin
from torch import nn

from bevt_lib.base.config import ClipSpec, Model
from bevt_lib.base.files import save_tensors

MODEL_CARD = """---
{{ card_data }}
---
A model of the BEVT kit: `bevt_lib.weights.load.load_model(FOLDER)` loads it,
`python -m bevt_lib.predict FOLDER VIDEO` uses it on a video. `config.json` holds its architecture
and how it reads clips.
"""


class Saved(
    nn.Module, PyTorchModelHubMixin, library_name="bevt-kit", model_card_template=MODEL_CARD
):
    """A model that ``save_pretrained(folder)`` writes as a folder of weights and config.

    ``views``: how the model wants clips, for whoever uses it. ``arguments``: the model's others.
    """

    def __init__(self, architecture: Model, views: ClipSpec | None, **arguments: Any):
        super().__init__()
        self.views = views
        how = asdict(views) if views else None
        self._hub_mixin_config = {**asdict(architecture), **arguments, "views": how}

    def _save_pretrained(self, save_directory: Path) -> None:
        save_tensors(self.state_dict(), Path(save_directory) / "model.safetensors")


def as_architecture(architecture: Model | None, fields: Mapping[str, Any]) -> Model:
    """Give the architecture, or make it of its fields: those of a config.json, old or new.

    Raises TypeError for a field that there isn't, and where both are given.
    """
    if architecture and fields:
        raise TypeError(f"give an architecture or its fields, not both: {', '.join(fields)}")
    if architecture:
        return architecture
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    if "released" in given:  # as the field was called before
        given["released_quirks"] = given.pop("released")
    return Model(**{"drop_path": 0.0} | given)
