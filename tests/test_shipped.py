"""The shipped weights: where they come from, what they are worth, that they can be made again."""

import json
from dataclasses import MISSING, fields, is_dataclass, replace

import numpy as np
import pytest
import torch

from bevt_lib import finetune, parts, pretrain, train_tokenizer
from bevt_lib.base import files
from bevt_lib.base.config import flatten
from bevt_lib.datasets import sources, synthetic
from bevt_lib.presets import FINETUNE, PRETRAIN, TRAIN_TOKENIZER, lesson_image
from bevt_lib.scoring import classes
from bevt_lib.tokenizer_scores import distance_under
from bevt_lib.tokenizers import base, baselines
from bevt_lib.tokenizers.load import load_tokenizer
from bevt_lib.tokenizers.perceptual import SUPERVISED, PerceptualDistance
from bevt_lib.weights.load import load_strict, read_weights

WEIGHTS = files.data_folder() / "weights"
NAMES = ["lesson_dvae", "lesson_peco", "lesson_image", "lesson_joint", "lesson_how", "lesson_what"]
PRESETS = TRAIN_TOKENIZER | PRETRAIN | FINETUNE
DOORS = {"lesson_dvae": train_tokenizer, "lesson_peco": train_tokenizer,
         "lesson_image": pretrain, "lesson_joint": pretrain}  # fmt: skip


def card(name):
    return json.loads((WEIGHTS / f"{name}.json").read_text())


def defaults(recipe, prefix=""):
    """The defaults of a recipe's fields, as a card would hold them."""
    found = {}
    for f in fields(recipe):
        value = getattr(recipe, f.name)
        if is_dataclass(value):
            found |= defaults(value, f"{prefix}{f.name}.")
        elif f.default is not MISSING:
            found[prefix + f.name] = json.loads(json.dumps(f.default))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_card_tells_command_configuration_and_curve(name):
    told = card(name)
    assert f"bevt_lib.{DOORS.get(name, finetune).__name__.split('.')[-1]} {name}" in told["command"]
    recipe = json.loads(json.dumps(flatten(PRESETS[name]())))
    # A field younger than the card was at its default when the model was trained.
    config = defaults(PRESETS[name]()) | told["config"]
    differing = {k for k, v in recipe.items() if not k.startswith("run.") and config[k] != v}
    assert not differing
    assert all(len(c) == -(-told["steps"] // told["curve_step"]) for c in told["curve"].values())


@pytest.mark.parametrize("name", NAMES)
def test_no_training_file_is_in_the_test_split(name):
    from hashlib import sha256

    trained = set(card(name)["training_files"].values())
    held_out = synthetic.photo_splits()["test"] + synthetic.photo_splits()["val"]
    held_out += [p for kind in synthetic.cutout_splits()["unseen"] for p in kind]
    assert not trained & {sha256(p.read_bytes()).hexdigest() for p in held_out}
    mine = {p.name for p in synthetic.photo_splits()["train"]}
    assert mine <= {f.split("/")[-1] for f in card(name)["training_files"]}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_first_steps_can_be_replayed(name, tmp_path):
    """The same command on the same start gives the recorded losses, nearly.

    Not to rounding: the runs were made on an earlier encoding of the same clips.
    """
    told = card(name)
    recipe = PRESETS[name]()
    run = replace(recipe.run, stop_after=20, threads=1, folder=str(tmp_path / "run"))
    door = DOORS.get(name, finetune)
    _, history = door.train(replace(recipe, run=run))
    mine = [entry["loss"] for entry in history]
    assert np.allclose(mine, told["first_losses"], rtol=0.05), (mine, told["first_losses"])
    assert np.allclose(mine[:3], told["first_losses"][:3], rtol=1e-2)


@pytest.fixture(scope="module")
def views():
    items = sources.pretraining_items(lesson_image(), "image", "test")
    return torch.from_numpy(
        np.stack([items.sample(0, i)["tokenizer_input"][0] for i in range(512)])
    )


def test_the_tokenizer_beats_kmeans_and_uses_its_words(views):
    from sklearn.cluster import MiniBatchKMeans

    tokenizer = parts.build_tokenizer(lesson_image())
    train = sources.pretraining_items(lesson_image(), "image", "train")
    fit = torch.from_numpy(
        np.stack([train.sample(0, i)["tokenizer_input"][0] for i in range(0, 3072, 3)])
    )
    kmeans = MiniBatchKMeans(tokenizer.vocab_size, n_init=3, random_state=0, batch_size=4096)
    kmeans.fit(baselines.cells_of(fit).numpy())
    codes = torch.from_numpy(kmeans.cluster_centers_).float()
    ids = tokenizer.encode(views)
    mine = base.psnr(views, tokenizer.decode(ids))
    assert mine > base.psnr(views, baselines.nearest_code(views, codes))
    assert base.usage(ids, tokenizer.vocab_size)[0] >= 0.5


@pytest.mark.slow
def test_peco_looks_nearer_than_the_dvae_and_uses_its_codes(views):
    """To its own network; in pixels it is behind the dVAE, and clearly ahead of mean colours.

    The stored table says the same.
    """
    table = json.loads((WEIGHTS.parent / "results" / "tokenizers.json").read_text())
    network = PerceptualDistance(SUPERVISED, side=96)
    distances = []
    for name in ("lesson_peco", "lesson_dvae"):
        tokenizer = load_tokenizer(WEIGHTS / f"{name}.safetensors")
        ids = tokenizer.encode(views)
        painted = tokenizer.decode(ids)
        assert base.psnr(views, painted) > base.psnr(views, baselines.mean_colours(views)) + 0.7
        assert base.usage(ids, tokenizer.vocab_size)[0] >= 0.9
        distances.append(distance_under(network, views, painted))
        assert base.psnr(views, painted) == pytest.approx(table[name]["psnr"], abs=0.02)
        assert distances[-1] == pytest.approx(table[name]["perceptual"][SUPERVISED], rel=0.01)
    assert distances[0] < distances[1] - 0.05, distances


@pytest.mark.parametrize("name", ["lesson_image", "lesson_joint"])
def test_pretraining_learned_more_than_frequencies(name):
    recipe = PRETRAIN[name]()
    model = parts.build_bevt(recipe)
    load_strict(model, read_weights(WEIGHTS / f"{name}.safetensors"), name)
    for stream in recipe.streams:
        score = pretrain.score(recipe, model, stream, 256)
        assert score.loss < score.entropy - 0.2 and score.accuracy > 1.5 * score.majority, score


@pytest.mark.parametrize("name", ["lesson_how", "lesson_what"])
def test_fine_tuning_is_clearly_above_chance(name):
    recipe = FINETUNE[name]()
    model = parts.build_classifier(recipe)
    load_strict(model, read_weights(WEIGHTS / f"{name}.safetensors"), name)
    score = classes.score_split(recipe, model)
    assert score.clips == 1024 and score.lower95 > 1 / 8 + 0.15, score
