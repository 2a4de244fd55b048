"""A model as a folder: ``save_pretrained`` writes it, ``weights.load`` reads it."""

from pathlib import Path

from huggingface_hub import PyTorchModelHubMixin
from torch import nn

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
    """A model that ``save_pretrained(folder)`` writes as a folder of weights and config."""

    def _save_pretrained(self, save_directory: Path) -> None:
        save_tensors(self.state_dict(), Path(save_directory) / "model.safetensors")
