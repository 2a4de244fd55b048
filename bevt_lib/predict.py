"""Use a trained model on a video: ``python -m bevt_lib.predict FOLDER VIDEO``.

FOLDER is a model folder (``RUN/model``, or what convert_weights wrote) of a classifier, which names
the classes, or of a pretraining model, which names the tokens of a hidden tube.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bevt_lib import cli, parts
from bevt_lib.base import distributed
from bevt_lib.base.config import ClipSpec, require
from bevt_lib.base.trainable import collate
from bevt_lib.datasets import items, sources
from bevt_lib.datasets.lists import Entry
from bevt_lib.model import masking
from bevt_lib.model.bevt import BEVT, STRIDE
from bevt_lib.model.classifier import Classifier
from bevt_lib.scoring.classes import score_views
from bevt_lib.tokenizers.base import FrozenTokenizer, add_tokens
from bevt_lib.tokenizers.load import load_tokenizer
from bevt_lib.weights.load import load_model

TUBE = (0.5, 1.0)  # of the clip's time steps; released


@dataclass
class Options:
    """What the command line says."""

    folder: Path  # a model folder
    video: Path  # a video file
    top: int = 5  # classes printed
    tokens: str = ""  # tokenizer file; empty: the shipped one


def main(arguments: list[str]) -> None:
    """Read the command line and print what the model says."""
    given = cli.parse(Options, arguments, "python -m bevt_lib.predict", __doc__ or "")
    model = load_model(given.folder).to(distributed.device())
    if isinstance(model, Classifier):
        for name, probability in classify(model, given.video)[: given.top]:
            print(f"{probability:6.1%}  {name}")
        return
    tokenizer = load_tokenizer(given.tokens or parts.shipped_tokenizer()).to(distributed.device())
    guess = name_hidden(model, tokenizer, given.video)
    right = (guess.named == guess.ids)[guess.hidden]
    print(f"{len(right)} of {guess.hidden.size} places hidden; {right.mean():.1%} named right")


def needs_views(model: BEVT | Classifier) -> ClipSpec:
    """Give how the model reads videos. Raises ValueError for a folder that doesn't say."""
    if model.views is None:
        raise ValueError("the model's config.json doesn't say how to read videos: add, with its "
                         'values, "views": {"frames": 32, "interval": 2, "size": 224, "short": '
                         "[224, 224]}")  # fmt: skip
    return model.views


@torch.no_grad()
def classify(model: Classifier, video: str | Path) -> list[tuple[str, float]]:
    """Recognise a video: (class name, probability) of every class, likeliest first.

    Reads it as ``model.views`` tells and averages the probabilities over the views. Raises
    VideoError for a file that can't be decoded, ValueError for a model without views.
    """
    clips = items.LabelledClips([Entry(Path(video), -1)], needs_views(model), seed=0, train=False)
    pixels = torch.from_numpy(clips.test_views(0))[None]
    model.eval()
    shares = score_views(model, pixels.to(next(model.parameters()).device))[0].tolist()
    return sorted(zip(model.classes, shares, strict=True), key=lambda pair: -pair[1])


class Guess(NamedTuple):
    """What a pretraining model makes of a hidden tube."""

    sample: dict[str, np.ndarray]  # "pixels", "tokenizer_input", "mask", for prediction_rows
    hidden: np.ndarray  # bool (T, h, w)
    ids: np.ndarray  # int64 (T, h, w): what the tokenizer says
    named: np.ndarray  # int64 (T, h, w): what the model says


@torch.no_grad()
def name_hidden(model: BEVT, tokenizer: FrozenTokenizer, video: str | Path, seed: int = 0) -> Guess:
    """Hide a tube of a video and let a pretraining model name it; ``seed`` draws clip and tube.

    Raises VideoError for a file that can't be decoded, ValueError for a model without views or
    with another vocabulary than the tokenizer's.
    """
    spec = needs_views(model)
    named, known = model.token_head.out_features, tokenizer.vocab_size
    require(named == known, f"the model names {named} tokens, the tokenizer has {known}: give the "
                            "one it was trained with (--tokens)")  # fmt: skip
    side = spec.size // STRIDE
    grid = (spec.frames // model.frames_per_step["video"], side, side)
    target, _ = masking.mask_budget((side, side))
    hide = partial(sources.hide_tubes, grid=grid, target=target, length=TUBE)
    clips = items.PretrainClips([Entry(Path(video), -1)], spec, mask=hide, seed=seed,
                                input_size=side * tokenizer.factor)  # fmt: skip
    sample = clips.sample(0, 0)
    batch = {"video": collate([sample], next(model.parameters()).device)}
    part = add_tokens(batch, tokenizer)["video"]
    guess = model.eval().predict("video", part["pixels"], part["mask"])[0]
    hidden = masking.mask_in_time(part["mask"], model.frames_per_step["video"])[0]
    return Guess(sample, *(x.cpu().numpy() for x in (hidden, part["ids"][0], guess)))


if __name__ == "__main__":
    cli.run_command(main)
