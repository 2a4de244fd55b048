"""Evaluate a classifier: ``python -m bevt_lib.evaluate PRESET --run.init MODEL``, also torchrun.

MODEL: a weights file, a folder of a model or a checkpoint, or a run's (its latest checkpoint). It
must fit the preset's classifier whole, head included. What is tested: the videos of
--data.val-list under --data.video-root, or an embedded split (--split val | test | test_unseen),
each by the preset's test views. RUN/scores_<split>.jsonl (--run.folder RUN) holds what the model
says of each video.

A published figure is one of all videos: where some can't be read the scores are written, the
videos are listed, and the command ends in an error. With --allow-missing it prints the figure of
the others, and how many are left out.
"""

import sys
from dataclasses import dataclass
from functools import wraps
from pathlib import Path

from bevt_lib import cli, parts
from bevt_lib.base import distributed
from bevt_lib.base.config import Finetune, require
from bevt_lib.datasets import sources
from bevt_lib.presets import FINETUNE
from bevt_lib.scoring import classes, cost
from bevt_lib.training import checkpoint, loop
from bevt_lib.weights.load import load_strict, read_weights

LISTED = 20  # unreadable videos named on the screen; the file names all


@dataclass(frozen=True, kw_only=True)
class Evaluate(Finetune):
    """A fine-tuning recipe, and what to do with its result."""

    split: str = "test"  # val, test or test_unseen of the embedded clips; names the scores' file
    allow_missing: bool = False  # give a figure although some videos can't be read


# The presets of fine-tuning with the fields of Evaluate, under their own names and docstrings.
PRESETS = {name: wraps(preset)(lambda preset=preset: Evaluate(**vars(preset())))
           for name, preset in FINETUNE.items()}  # fmt: skip


def main(arguments: list[str]) -> None:
    """Read the command line, then plan or evaluate."""
    recipe = cli.choose(PRESETS, arguments, "evaluate")
    if recipe.run.dry_run:
        return cli.print_plan(plan(recipe), recipe)
    with distributed.world():
        result, file = evaluate(recipe)
        distributed.say(f"{recipe.task} {recipe.split}: {result}; scores of each video in {file}")


def evaluate(recipe: Evaluate) -> tuple[classes.ClassScore, Path]:
    """Score the model of ``run.init``; give the result and the file of scores.

    Raises ValueError without ``run.init``, for weights that don't fit, and where videos can't be
    read, unless ``allow_missing``.
    """
    init, split = recipe.run.init, recipe.split
    require(init != "", "name the model to evaluate: --run.init MODEL")
    embedded = split in ("val", "test", "test_unseen")
    require(embedded, f"--split {split}: choose val, test or test_unseen")
    text = f"--split {split} is one of the embedded clips: drop it, or the --data.val-list"
    require(split == "test" or not recipe.data.val_list, text)
    loop.set_up(recipe.run)
    sources.check_sources(recipe, [split])
    source = weights_of(Path(init))
    model = parts.build_classifier(recipe).to(distributed.device())
    load_strict(model, read_weights(source), str(source))
    sources.render_embedded(recipe)
    distributed.say(f"model: {source}")
    sources.print_origins({split: sources.labelled_items(recipe, split)})
    file = recipe.folder / f"scores_{split}.jsonl"
    result = classes.score_split(recipe, model, split, recipe.run.test_clips, file)
    missing = len(result.unread)
    if missing and distributed.rank() == 0:
        print(*result.unread[:LISTED], sep="\n", file=sys.stderr)
    require(not missing or recipe.allow_missing,
            f"{missing} of {result.clips + missing} videos can't be read (see {file}): fix them, "
            "or add --allow-missing for a figure without them")  # fmt: skip
    return result, file


def weights_of(path: Path) -> Path:
    """Find the weights a path stands for: of a run's folder its latest checkpoint, or its model."""
    if not path.is_dir() or (path / "model.safetensors").is_file():
        return path
    model = path / "model"
    return checkpoint.latest(path) or (model if model.is_dir() else path)


def plan(recipe: Evaluate) -> str:
    """Describe an evaluation before its first video; only your own list is read."""
    recipe, data = sources.plan_sources(recipe, [recipe.split])
    _, items = parts.measure_items(recipe)
    views = recipe.test_clips * recipe.test_crops
    return cost.write({
        "preset": recipe.name,
        "model": recipe.run.init or "--run.init, not given yet",
        "videos": data[f"{recipe.split} data"],
        "test views": recipe.test_views,
        "one video": f"multiply-adds: {views} x {items['clip'].text}",
    })  # fmt: skip


if __name__ == "__main__":
    cli.run_command(main)
