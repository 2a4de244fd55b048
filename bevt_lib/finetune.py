"""Fine-tune: ``python -m bevt_lib.finetune PRESET --overrides``, also under torchrun.

    RUN/model/             the last weights as a model folder
    RUN/best_model/        those of the best validation, where the recipe validates (val_epochs)
    RUN/scores_test.jsonl  what the last says of each test video, and scores_best_test.jsonl

Both are tested with all views once training is done (released: --validate --test-best --test-last);
after --run.stop-after only if --run.test-clips says on how many clips, after SIGTERM not at all.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from bevt_lib.base import distributed
from bevt_lib.base.config import Finetune, flatten, run_folder
from bevt_lib.base.seeds import Stream
from bevt_lib.base.trainable import Batch
from bevt_lib.cli import choose, run_command, with_recipe
from bevt_lib.datasets import sources
from bevt_lib.datasets.items import Positions
from bevt_lib.model.classifier import Classifier
from bevt_lib.model.normalisation import normalise
from bevt_lib.parts import build_classifier, initialise_classifier
from bevt_lib.presets import FINETUNE
from bevt_lib.scoring import cost
from bevt_lib.scoring.classes import ClassScore, score_split, score_videos
from bevt_lib.training import loop
from bevt_lib.training.optim import total_steps
from bevt_lib.training.task import Source, Task
from bevt_lib.weights.formats import released_name
from bevt_lib.weights.load import load_strict, read_weights


def main(arguments: list[str]) -> None:
    """Read the command line, then plan or train and test."""
    recipe = choose(FINETUNE, arguments, "finetune")
    if recipe.run.dry_run:
        print(with_recipe(plan(recipe), recipe))
        return
    with distributed.world():
        model, history, steps = train_of(recipe)
        finish(recipe, model, len(history), steps)


def finish(recipe: Finetune, model: Classifier, done: int, steps: int) -> None:
    """Write and test the last model and the best; see the module's docstring.

    The run has made ``done`` of its ``steps``. Leaves the best weights in ``model``.
    """
    run, folder = recipe.run, Path(run_folder(recipe))
    wanted = min(steps, run.stop_after or steps)
    tested = done >= wanted and (wanted == steps or run.test_clips > 0)
    for which in ("", "best_"):
        if which and not (folder / "best").is_dir():
            break
        if which:
            load_strict(model, read_weights(folder / "best"), str(folder / "best"))
        result: ClassScore | str = f"not tested at step {done} of {steps}"
        if distributed.rank() == 0:
            model.save_pretrained(folder / f"{which}model")
        if tested:
            result = score_split(
                recipe, model, count=run.test_clips, clips=recipe.test_clips,
                crops=recipe.test_crops, file=folder / f"scores_{which}test.jsonl",
            )  # fmt: skip
        if distributed.rank() == 0:
            step = json.loads((folder / "best" / "state.json").read_text())["step"] if which else 0
            name = f"{recipe.task}, best in validation (step {step})" if which else recipe.task
            print(f"{name}: {result}; model in {folder}/{which}model")


def prepare(batch: Batch, step: int) -> Batch:
    """Normalise the pixels of a batch on the device."""
    part = batch["clip"]
    return {"clip": {**part, "pixels": normalise(part["pixels"])}}


def train(recipe: Finetune) -> tuple[Classifier, list[dict[str, float]]]:
    """Run a fine-tuning recipe; return the model and the record, one dict per step.

    With ``optim.ema`` the model holds the weight average, as the released evaluation does.
    """
    model, history, _ = train_of(recipe)
    return model, history


def train_of(recipe: Finetune) -> tuple[Classifier, list[dict[str, float]], int]:
    """Do :func:`train`, and also give the steps of the whole run."""
    loop.set_up(recipe.run)
    sources.check_sources(recipe)
    sources.render_embedded(recipe)
    model = build_classifier(recipe)
    report = initialise_classifier(recipe, model)
    if distributed.rank() == 0:
        print(report)
    clips = sources.labelled_items(recipe)
    sources.print_origins({"clip": clips, "test": sources.labelled_items(recipe, "test")})
    items = Positions(clips, seed=recipe.run.seed, stream=Stream.VIDEO,
                      workers=recipe.data.workers)  # fmt: skip
    every = round(recipe.val_epochs * len(items) / recipe.optim.clips)
    task = Task(
        model=model, sources={"clip": Source(items, recipe.optim.clips)}, rename=released_name,
        steps=total_steps(recipe.optim, len(items)), prepare=prepare, config=flatten(recipe),
        validate=validation(recipe, model) if recipe.val_epochs else None,
        validate_every=max(1, every), best_by="top1" if recipe.val_epochs else "",
        bad_share=recipe.data.bad_share,
    )  # fmt: skip
    run = replace(recipe.run, folder=run_folder(recipe))
    return model, loop.fit(task, recipe.optim, run), task.steps


def validation(recipe: Finetune, model: Classifier) -> Callable[[int], dict[str, float]]:
    """Make the function that scores the model in training: the centre of each validation clip.

    Clips that can't be read are left out, and their number stands in the record.
    """
    items = sources.labelled_items(recipe, "val")

    def validate(step: int) -> dict[str, float]:
        result = score_videos(model, items, recipe.num_classes, at_once=recipe.views_at_once,
                              workers=recipe.data.workers).summary()  # fmt: skip
        numbers = {"top1": result.top1, "top5": result.top5, "mean_class": result.mean_class}
        return numbers | ({"unread": len(result.unread)} if result.unread else {})

    return validate


def plan(recipe: Finetune) -> str:
    """Describe a run before its first step: size, steps, tokens, cost; only own lists are read."""
    recipe, data = sources.plan_sources(recipe)
    with torch.device("meta"):
        model = build_classifier(recipe)
    items = {"clip": cost.clip_item(recipe, model)}
    lines = cost.describe(recipe, model, items)
    lines["test views"] = (
        f"{recipe.test_clips} clips x {recipe.test_crops} crops, {recipe.views_at_once} at a time"
    )
    if recipe.val_epochs:
        lines["validation"] = f"every {recipe.val_epochs:g} epochs, 1 view; the best is kept"
    lines["starts from"] = recipe.run.init or recipe.default_init or "--run.init, not given yet"
    return cost.write(lines | data)


if __name__ == "__main__":
    run_command(main)
