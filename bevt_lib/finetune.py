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
from typing import Any

import torch

from bevt_lib.base import distributed, files
from bevt_lib.base.config import ClipSpec, Finetune, flatten
from bevt_lib.base.seeds import Purpose, Stream, seeded_globals
from bevt_lib.cli import choose, run_command, with_recipe
from bevt_lib.datasets import synthetic
from bevt_lib.datasets.items import LabelledClips, Positions
from bevt_lib.datasets.lists import leave_out_bad, read_entries, read_list
from bevt_lib.model.classifier import Classifier
from bevt_lib.model.normalisation import normalise
from bevt_lib.presets import FINETUNE
from bevt_lib.scoring import cost
from bevt_lib.scoring.classes import ClassScore, score_classes, score_videos, write_scores
from bevt_lib.training import loop
from bevt_lib.training.loop import Batch, Source
from bevt_lib.training.optim import total_steps
from bevt_lib.weights.formats import released_name
from bevt_lib.weights.load import load_strict, read_weights, start_classifier

CLASSES = {"what": synthetic.KINDS, "how": synthetic.MOTIONS}  # elsewhere, the lists' numbers


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
            result = score(
                recipe, model, count=run.test_clips, clips=recipe.test_clips,
                crops=recipe.test_crops, file=folder / f"scores_{which}test.jsonl",
            )  # fmt: skip
        if distributed.rank() == 0:
            step = json.loads((folder / "best" / "state.json").read_text())["step"] if which else 0
            name = f"{recipe.task}, best in validation (step {step})" if which else recipe.task
            print(f"{name}: {result}; model in {folder}/{which}model")


def run_folder(recipe: Finetune) -> str:
    """Give the run's folder: ``run.folder`` or runs/<preset>."""
    return recipe.run.folder or f"runs/{recipe.name}"


def build_model(recipe: Finetune) -> Classifier:
    """Build the classifier with weights drawn from the run's seed."""
    with seeded_globals(recipe.run.seed, Purpose.WEIGHTS):
        return Classifier(
            recipe.model, num_classes=recipe.num_classes, dropout=recipe.dropout,
            smoothing=recipe.smoothing, classes=CLASSES.get(recipe.task, ()), views=views(recipe),
        )  # fmt: skip


def views(recipe: Finetune) -> ClipSpec:
    """Tell how the model reads a video in use: as the recipe tests it."""
    d = recipe.data
    return ClipSpec(
        frames=d.frames, interval=d.interval, size=d.size, short=d.short,
        sampling=recipe.sampling, clips=recipe.test_clips, crops=recipe.test_crops,
    )  # fmt: skip


def start_weights(recipe: Finetune, model: Classifier) -> str:
    """Load the weights the recipe starts from; "scratch" as run.init means random weights."""
    path = recipe.run.init
    if not path and recipe.default_init:
        path = str(files.data_folder() / recipe.default_init)
    if not path:
        raise ValueError(
            f"{recipe.name} starts from pretrained weights: give them with --run.init FILE, or "
            "--run.init scratch"
        )
    report = "random weights"
    if path != "scratch":
        report = f"{Path(path).name}: {start_classifier(model, read_weights(Path(path)))}"
    if recipe.antisymmetric:
        init_antisymmetric(model, recipe.antisymmetric)
        report += f"; {recipe.antisymmetric:.0%} of the 3D patch filters antisymmetric in time"
    return f"start: {report}"


@torch.no_grad()
def init_antisymmetric(model: Classifier, share: float) -> None:
    """Start a share of the 3D patch filters as (+w, -w) in time: later frames minus the first.

    The released inflation gives all frames of a patch the same weights, so the embedding can't
    tell their order. These filters can, and are blind to what stands still, which otherwise drowns
    motion at first. Only a start: they are trained like the others. Our option.
    """
    kernel = model.patch_embed.proj.weight  # (C, 3, frames, 4, 4)
    half, filters = kernel.shape[2] // 2, round(share * len(kernel))
    kernel[:filters, :, half : 2 * half] = -kernel[:filters, :, :half]


def build_items(recipe: Finetune, split: str = "train") -> LabelledClips:
    """Build a split's clips: embedded ("train", "val", "test", "test_unseen") or the paths'."""
    d = recipe.data
    train = split == "train"
    if recipe.sampling == "uniform" and recipe.test_clips != 1:  # say so before training
        raise ValueError(
            f"uniform sampling has 1 test clip, not {recipe.test_clips}: --test-clips 1"
        )
    own = {"train": d.video_list}.get(split, d.val_list)
    if own:
        root = Path(d.video_root or ".")
        entries = read_entries(
            Path(own), root, num_classes=recipe.num_classes, class_list=d.class_list
        )
        entries = leave_out_bad(entries, d.checked, root)
    else:
        if recipe.task not in ("what", "how"):
            raise ValueError(
                f"{recipe.name} needs {'--data.video-list' if train else '--data.val-list'} FILE "
                "with one `path label` a line, or the set's official list"
            )
        folder = synthetic.render()
        entries = read_list(
            folder / f"{recipe.task}_{split}.txt", folder, num_classes=recipe.num_classes
        )
    return LabelledClips(
        entries, frames=d.frames, interval=d.interval, size=d.size, short=d.short,
        seed=recipe.run.seed, train=train, flip=recipe.flip, crop=recipe.crop,
        sampling=recipe.sampling, rand_augment=recipe.rand_augment, erasing=recipe.erasing,
        timeout=d.timeout,
    )  # fmt: skip


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
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    loop.be_deterministic(recipe.run.deterministic)
    distributed.once_per_node(synthetic.render, needed=not recipe.data.video_list)
    model = build_model(recipe)
    report = start_weights(recipe, model)
    if distributed.rank() == 0:
        print(report)
    items = Positions(build_items(recipe), seed=recipe.run.seed, stream=Stream.VIDEO,
                      workers=recipe.data.workers)  # fmt: skip
    steps = total_steps(recipe.optim, len(items))
    validated: dict[str, Any] = {}
    if recipe.val_epochs:
        every = round(recipe.val_epochs * len(items) / recipe.optim.clips)
        validated = {"validate": validation(recipe, model), "validate_every": max(1, every),
                     "best_by": "top1"}  # fmt: skip
    history = loop.fit(
        model, {"clip": Source(items, recipe.optim.clips)}, recipe.optim,
        loop.in_folder(recipe.run, run_folder(recipe)),
        steps=steps, prepare=prepare, config=flatten(recipe), rename=released_name,
        bad_share=recipe.data.bad_share, **validated,
    )  # fmt: skip
    return model, history, steps


def validation(recipe: Finetune, model: Classifier) -> Callable[[int], dict[str, float]]:
    """Make the function that scores the model in training: the centre of each validation clip.

    Clips that can't be read are left out, and their number stands in the record.
    """
    items = build_items(recipe, "val")

    def validate(step: int) -> dict[str, float]:
        result = score_classes(model, items, recipe.num_classes, at_once=recipe.views_at_once,
                               workers=recipe.data.workers)  # fmt: skip
        numbers = {"top1": result.top1, "top5": result.top5, "mean_class": result.mean_class}
        return numbers | ({"unread": len(result.unread)} if result.unread else {})

    return validate


def score(
    recipe: Finetune,
    model: Classifier,
    split: str = "test",
    count: int = 0,
    file: Path | None = None,
    **views: int,
) -> ClassScore:
    """Score a model on held-out clips; ``views``: clips and crops, by default the recipe's.

    Rank 0 writes what it says of each to ``file``.
    """
    views = {"clips": recipe.test_clips, "crops": recipe.test_crops} | views
    # A figure is of the whole list: what check_data calls bad counts as unread.
    items, bad = build_items(replace(recipe, data=replace(recipe.data, checked=())), split), {}
    if recipe.data.checked:
        kept = set(build_items(recipe, split).entries)
        bad = {i: f"{entry.path}: is bad by --data.checked" for i, entry in enumerate(items.entries)
               if entry not in kept}  # fmt: skip
    found = score_videos(
        model, items, recipe.num_classes, count=count, at_once=recipe.views_at_once,
        workers=recipe.data.workers, bad=bad, **views,
    )  # fmt: skip
    if file and distributed.rank() == 0:
        root = Path(recipe.data.video_root or ".") if recipe.data.val_list else synthetic.render()
        paths = [entry.path for entry in items.entries]
        names = [(p.relative_to(root) if p.is_relative_to(root) else p).as_posix() for p in paths]
        write_scores(found, names, file)
    return found.summary()


def plan(recipe: Finetune) -> str:
    """Describe a run before its first step: size, steps, tokens, cost; nothing is read."""
    with torch.device("meta"):
        model = build_model(recipe)
    items = {"clip": cost.clip_item(recipe, model)}
    lines = cost.describe(recipe, model, {"clip": recipe.optim.clips}, items)
    lines["test views"] = (
        f"{recipe.test_clips} clips x {recipe.test_crops} crops, {recipe.views_at_once} at a time"
    )
    if recipe.val_epochs:
        lines["validation"] = f"every {recipe.val_epochs:g} epochs, 1 view; the best is kept"
    lines["starts from"] = recipe.run.init or recipe.default_init or "--run.init, not given yet"
    return cost.write(lines)


if __name__ == "__main__":
    run_command(main)
