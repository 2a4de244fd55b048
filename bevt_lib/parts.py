"""From a recipe to its model and its tokenizer, and to the weights that they start from."""

from dataclasses import replace
from pathlib import Path

import torch

from bevt_lib.base import distributed
from bevt_lib.base.config import Finetune, Pretrain, require
from bevt_lib.base.files import data_folder
from bevt_lib.base.seeds import Purpose, seeded_globals
from bevt_lib.datasets.synthetic import CLASSES
from bevt_lib.model.bevt import BEVT
from bevt_lib.model.classifier import Classifier, init_antisymmetric
from bevt_lib.scoring import cost
from bevt_lib.tokenizers.base import FrozenTokenizer
from bevt_lib.tokenizers.load import load_tokenizer
from bevt_lib.weights.load import read_weights, start_classifier, start_pretraining


def build_bevt(recipe: Pretrain) -> BEVT:
    """Build the model with weights drawn from the run's seed."""
    with seeded_globals(recipe.run.seed, Purpose.WEIGHTS):
        return BEVT(recipe.model, vocab_size=recipe.tokens.vocab_size, streams=recipe.streams,
                    views=recipe.data.clip_spec())  # fmt: skip


def shipped_tokenizer() -> Path:
    """Find the lesson tokenizer's file."""
    return data_folder() / "weights" / "lesson_dvae.safetensors"


def build_tokenizer(recipe: Pretrain) -> FrozenTokenizer:
    """Load the recipe's frozen tokenizer; the shipped lesson tokenizer where none is named.

    Raises ValueError where none is named and the recipe is made for another than the shipped one.
    """
    wanted = recipe.tokens
    tokenizer = load_tokenizer(wanted.weights or shipped_tokenizer()).to(distributed.device())
    require(bool(wanted.weights) or sized_for(recipe, tokenizer) == recipe,
            f"{recipe.name} needs a tokenizer of {wanted.vocab_size} tokens of {wanted.factor} px, "
            f"and the shipped one has {tokenizer.vocab_size} of {tokenizer.factor} px: name its "
            "file or folder with --tokens.weights")  # fmt: skip
    return tokenizer


def sized_for(recipe: Pretrain, tokenizer: FrozenTokenizer) -> Pretrain:
    """Give the recipe with the tokenizer's vocabulary and factor."""
    tokens = replace(recipe.tokens, vocab_size=tokenizer.vocab_size, factor=tokenizer.factor)
    return replace(recipe, tokens=tokens)


def initialise_bevt(recipe: Pretrain, model: BEVT) -> str:
    """Load the weights the recipe starts from, if any; return one line that says what was done.

    Raises ValueError where the recipe needs weights and none are given.
    """
    path = start_path(recipe)
    if not path:
        message = f"{recipe.name} starts from image-stream weights: give --run.init FILE"
        require(not recipe.needs_init, message)
        return "start: random weights"
    report = start_pretraining(model, read_weights(path), token_head=recipe.keep_token_head)
    return f"start: {path.name}: {report}"


def start_path(recipe: Pretrain | Finetune) -> Path | None:
    """Give the weights to start from: ``run.init``, else the shipped ones of the preset."""
    shipped = data_folder() / recipe.default_init if recipe.default_init else None
    return Path(recipe.run.init) if recipe.run.init else shipped


def build_classifier(recipe: Finetune) -> Classifier:
    """Build the classifier with weights drawn from the run's seed."""
    with seeded_globals(recipe.run.seed, Purpose.WEIGHTS):
        return Classifier(recipe.model, num_classes=recipe.num_classes, dropout=recipe.dropout,
                          smoothing=recipe.smoothing, classes=CLASSES.get(recipe.task, ()),
                          views=recipe.clip_spec())  # fmt: skip


def initialise_classifier(recipe: Finetune, model: Classifier) -> str:
    """Load the weights the recipe starts from; "scratch" as run.init means random weights."""
    path, report = start_path(recipe), "random weights"
    if not path:
        raise ValueError(f"{recipe.name} starts from pretrained weights: give --run.init FILE, or "
                         "--run.init scratch")  # fmt: skip
    if recipe.run.init != "scratch":
        report = f"{path.name}: {start_classifier(model, read_weights(path))}"
    if recipe.antisymmetric:
        init_antisymmetric(model, recipe.antisymmetric)
        report += f"; {recipe.antisymmetric:.0%} of the 3D patch filters antisymmetric in time"
    return f"start: {report}"


def measure_items(
    recipe: Pretrain | Finetune, tokenizer: FrozenTokenizer | None = None
) -> tuple[BEVT | Classifier, dict[str, cost.Item]]:
    """Build a recipe's model without values, and measure one item of each of its streams.

    Pretraining needs its ``tokenizer``, which goes to the meta device, too.
    """
    if isinstance(recipe, Finetune):
        with torch.device("meta"):
            classifier = build_classifier(recipe)
        return classifier, {"clip": cost.clip_item(recipe, classifier)}
    assert tokenizer is not None
    tokenizer.to("meta")
    with torch.device("meta"):
        model = build_bevt(recipe)
    return model, {s: cost.token_item(recipe, model, tokenizer, s) for s in recipe.batches}
