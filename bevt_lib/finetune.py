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

from bevt_lib import cli, parts
from bevt_lib.base import distributed, seeds
from bevt_lib.base.config import Finetune, flatten
from bevt_lib.base.trainable import Batch
from bevt_lib.datasets import sources
from bevt_lib.datasets.items import Positions
from bevt_lib.model.classifier import Classifier
from bevt_lib.model.normalisation import normalise
from bevt_lib.presets import FINETUNE
from bevt_lib.scoring import classes, cost
from bevt_lib.training import loop, optim
from bevt_lib.training.task import Source, Task
from bevt_lib.weights.formats import released_name
from bevt_lib.weights.load import load_strict, read_weights


def main(arguments: list[str]) -> None:
    """Read the command line, then plan or train and test."""
    recipe = cli.choose(FINETUNE, arguments, "finetune")
    if recipe.run.dry_run:
        return cli.print_plan(plan(recipe), recipe)
    with distributed.world():
        model, history, steps = train_of(recipe)
        finish(recipe, model, len(history), steps)


def finish(recipe: Finetune, model: Classifier, done: int, steps: int) -> None:
    """Write and test the last model and the best; see the module's docstring.

    The run has made ``done`` of its ``steps``. Leaves the best weights in ``model``.
    """
    run, folder, best = recipe.run, recipe.folder, recipe.folder / "best"
    wanted = min(steps, run.stop_after or steps)
    tested = done >= wanted and (wanted == steps or run.test_clips > 0)
    titles = {"": recipe.task}
    if best.is_dir():
        step = json.loads((best / "state.json").read_text())["step"]
        titles["best_"] = f"{recipe.task}, best in validation (step {step})"
    for which, title in titles.items():
        if which:
            load_strict(model, read_weights(best), str(best))
        if distributed.rank() == 0:
            model.save_pretrained(folder / f"{which}model")
        result: object = f"not tested at step {done} of {steps}"
        if tested:
            file = folder / f"scores_{which}test.jsonl"
            result = classes.score_split(recipe, model, count=run.test_clips, file=file)
        distributed.say(f"{title}: {result}; model in {folder}/{which}model")


def prepare(batch: Batch, step: int) -> Batch:
    """Normalise the pixels of a batch on the device."""
    part = batch["clip"]
    return {"clip": {**part, "pixels": normalise(part["pixels"])}}


def train(recipe: Finetune) -> tuple[Classifier, list[dict[str, float]]]:
    """Run a fine-tuning recipe; return the model and the record, one dict per step.

    With ``optim.ema`` the model holds the weight average, as the released evaluation does.
    """
    return train_of(recipe)[:2]


def train_of(recipe: Finetune) -> tuple[Classifier, list[dict[str, float]], int]:
    """Do :func:`train`, and also give the steps of the whole run."""
    loop.set_up(recipe.run)
    sources.check_sources(recipe)
    sources.render_embedded(recipe)
    model = parts.build_classifier(recipe)
    report = parts.initialise_classifier(recipe, model)
    distributed.say(report)
    clips = sources.labelled_items(recipe)
    sources.print_origins({"clip": clips, "test": sources.labelled_items(recipe, "test")})
    items = Positions(clips, seed=recipe.run.seed, stream=seeds.Stream.VIDEO,
                      workers=recipe.data.workers)  # fmt: skip
    every = round(recipe.val_epochs * len(items) / recipe.optim.clips)
    task = Task(
        model=model, sources={"clip": Source(items, recipe.optim.clips)}, rename=released_name,
        steps=optim.total_steps(recipe.optim, len(items)), prepare=prepare, config=flatten(recipe),
        validate=validation(recipe, model) if recipe.val_epochs else None, best_by="top1",
        validate_every=max(1, every), bad_share=recipe.data.bad_share)  # fmt: skip
    run = replace(recipe.run, folder=str(recipe.folder))
    return model, loop.fit(task, recipe.optim, run), task.steps


def validation(recipe: Finetune, model: Classifier) -> Callable[[int], dict[str, float]]:
    """Make the function that scores the model in training: the centre of each validation clip.

    Clips that can't be read are left out, and their number stands in the record.
    """
    items = sources.labelled_items(recipe, "val")

    def validate(step: int) -> dict[str, float]:
        result = classes.score_videos(
            model, items, recipe.num_classes, at_once=recipe.views_at_once,
            workers=recipe.data.workers).summary()  # fmt: skip
        numbers = {"top1": result.top1, "top5": result.top5, "mean_class": result.mean_class}
        return numbers | ({"unread": len(result.unread)} if result.unread else {})

    return validate


def plan(recipe: Finetune) -> str:
    """Describe a run before its first step: size, steps, tokens, cost; only own lists are read."""
    recipe, data = sources.plan_sources(recipe)
    lines = cost.describe(recipe, *parts.measure_items(recipe)) | {"test views": recipe.test_views}
    if recipe.val_epochs:
        lines["validation"] = f"every {recipe.val_epochs:g} epochs, 1 view; the best is kept"
    lines["starts from"] = recipe.run.init or recipe.default_init or "--run.init, not given yet"
    return cost.write(lines | data)


if __name__ == "__main__":
    cli.run_command(main)
