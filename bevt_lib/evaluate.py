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

import torch

from bevt_lib.base import distributed
from bevt_lib.base.config import Finetune, run_folder
from bevt_lib.cli import choose, run_command, with_recipe
from bevt_lib.datasets import sources
from bevt_lib.parts import build_classifier
from bevt_lib.presets import FINETUNE
from bevt_lib.scoring import cost
from bevt_lib.scoring.classes import ClassScore, score_split
from bevt_lib.training import checkpoint, loop
from bevt_lib.weights.load import load_strict, read_weights

LISTED = 20  # unreadable videos named on the screen; the file names all


@dataclass(frozen=True, kw_only=True)
class Evaluate(Finetune):
    """A fine-tuning recipe, and what to do with its result."""

    split: str = "test"  # val, test or test_unseen of the embedded clips; names the scores' file
    allow_missing: bool = False  # give a figure although some videos can't be read


def with_switches(preset):
    """Give a preset the fields of :class:`Evaluate`."""

    @wraps(preset)
    def recipe() -> Evaluate:
        return Evaluate(**vars(preset()))

    return recipe


PRESETS = {name: with_switches(preset) for name, preset in FINETUNE.items()}


def main(arguments: list[str]) -> None:
    """Read the command line, then plan or evaluate."""
    recipe = choose(PRESETS, arguments, "evaluate")
    if recipe.run.dry_run:
        print(with_recipe(plan(recipe), recipe))
        return
    with distributed.world():
        result, file = evaluate(recipe)
        if distributed.rank() == 0:
            print(f"{recipe.task} {recipe.split}: {result}; scores of each video in {file}")


def evaluate(recipe: Evaluate) -> tuple[ClassScore, Path]:
    """Score the model of ``run.init``; give the result and the file of scores.

    Raises ValueError without ``run.init``, for weights that don't fit, and where videos can't be
    read, unless ``allow_missing``.
    """
    if not recipe.run.init:
        raise ValueError("name the model to evaluate: --run.init MODEL")
    if recipe.split not in ("val", "test", "test_unseen"):
        raise ValueError(f"--split {recipe.split}: choose val, test or test_unseen")
    if recipe.split != "test" and recipe.data.val_list:
        raise ValueError(f"--split {recipe.split} is one of the embedded clips: drop it, or the "
                         "--data.val-list")  # fmt: skip
    loop.set_up(recipe.run)
    sources.check_sources(recipe, [recipe.split])
    source = weights_of(Path(recipe.run.init))
    model = build_classifier(recipe).to(distributed.device())
    load_strict(model, read_weights(source), str(source))
    sources.render_embedded(recipe)
    file = Path(run_folder(recipe)) / f"scores_{recipe.split}.jsonl"
    if distributed.rank() == 0:
        print(f"model: {source}")
    sources.print_origins({recipe.split: sources.labelled_items(recipe, recipe.split)})
    result = score_split(recipe, model, recipe.split, recipe.run.test_clips, file)
    if result.unread and distributed.rank() == 0:
        print(*result.unread[:LISTED], sep="\n", file=sys.stderr)
    if result.unread and not recipe.allow_missing:
        raise ValueError(
            f"{len(result.unread)} of {result.clips + len(result.unread)} videos can't be read "
            f"(see {file}): fix them, or add --allow-missing for a figure without them"
        )
    return result, file


def weights_of(path: Path) -> Path:
    """Find the weights a path stands for: of a run's folder its latest checkpoint, or its model."""
    if path.is_dir() and not (path / "model.safetensors").is_file():
        found = checkpoint.latest(path)
        if found is None and (path / "model").is_dir():
            found = path / "model"
        return found or path
    return path


def plan(recipe: Evaluate) -> str:
    """Describe an evaluation before its first video; only one's own list is read."""
    recipe, data = sources.plan_sources(recipe, [recipe.split])
    with torch.device("meta"):
        model = build_classifier(recipe)
    views = recipe.test_clips * recipe.test_crops
    return cost.write({
        "preset": recipe.name,
        "model": recipe.run.init or "--run.init, not given yet",
        "videos": data[f"{recipe.split} data"],
        "test views": f"{recipe.test_clips} clips x {recipe.test_crops} crops, "
                      f"{recipe.views_at_once} at a time",
        "one video": f"multiply-adds: {views} x {cost.clip_item(recipe, model).text}",
    })  # fmt: skip


if __name__ == "__main__":
    run_command(main)
