"""Fine-tune: ``python -m bevt_lib.finetune PRESET --overrides``, also under torchrun."""

from pathlib import Path

import torch

from bevt_lib import cost, dist, engine, synthetic
from bevt_lib.augment import normalise
from bevt_lib.bevt import Classifier
from bevt_lib.config import Finetune, choose, flatten, open_door
from bevt_lib.datasets import LabelledClips, Positions, read_list
from bevt_lib.engine import Batch, Source
from bevt_lib.formats import released_name
from bevt_lib.metrics import ClassScore, score_classes
from bevt_lib.optim import total_steps
from bevt_lib.presets import FINETUNE
from bevt_lib.seeds import Purpose, Stream, seeded_globals
from bevt_lib.terms import Views
from bevt_lib.weights import read_weights, start_classifier

CLASSES = {"what": synthetic.KINDS, "how": synthetic.MOTIONS}  # elsewhere, the lists' numbers


def main(arguments: list[str]) -> None:
    """Read the command line, then plan or train and test."""
    recipe = choose(FINETUNE, arguments, "finetune")
    if recipe.run.dry_run:
        print(plan(recipe))
        return
    with dist.world():
        model, _ = train(recipe)
        if dist.rank() == 0:
            model.save_pretrained(Path(run_folder(recipe)) / "model")
        result = score(recipe, model, count=recipe.run.test_clips)
        if dist.rank() == 0:
            print(f"{recipe.task}: {result}; model in {run_folder(recipe)}/model")


def run_folder(recipe: Finetune) -> str:
    """Give the run's folder: ``run.folder`` or runs/<preset>."""
    return recipe.run.folder or f"runs/{recipe.name}"


def build_model(recipe: Finetune) -> Classifier:
    """Build the classifier with weights drawn from the run's seed."""
    m = recipe.model
    with seeded_globals(recipe.run.seed, Purpose.WEIGHTS):
        return Classifier(
            num_classes=recipe.num_classes, embed_dim=m.embed_dim, depths=m.depths,
            num_heads=m.num_heads, window=m.window, patch=m.patch, drop_path=m.drop_path,
            dropout=recipe.dropout, smoothing=recipe.smoothing, released=m.released,
            linear_std=m.linear_std, classes=CLASSES.get(recipe.task, ()), views=views(recipe),
        )  # fmt: skip


def views(recipe: Finetune) -> Views:
    """Tell how the model reads a video in use: as the recipe tests it."""
    d = recipe.data
    return Views(
        frames=d.frames, interval=d.interval, size=d.size, short=d.short,
        sampling=recipe.sampling, clips=recipe.test_clips, crops=recipe.test_crops,
    )  # fmt: skip


def start_weights(recipe: Finetune, model: Classifier) -> str:
    """Load the weights the recipe starts from; "scratch" as run.init means random weights."""
    path = recipe.run.init
    if not path and recipe.default_init:
        path = str(synthetic.data_folder() / recipe.default_init)
    if not path:
        raise ValueError(
            f"{recipe.name} starts from pretrained weights: give them with --run.init FILE, or "
            "--run.init scratch"
        )
    report = "random weights"
    if path != "scratch":
        report = f"{Path(path).name}: {start_classifier(model, read_weights(Path(path)))}"
    if recipe.antisymmetric:
        see_change(model, recipe.antisymmetric)
        report += f"; {recipe.antisymmetric:.0%} of the 3D patch filters antisymmetric in time"
    return f"start: {report}"


@torch.no_grad()
def see_change(model: Classifier, share: float) -> None:
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
        entries = read_list(Path(own), Path(d.video_root or "."), num_classes=recipe.num_classes)
    else:
        if recipe.task not in ("what", "how"):
            raise ValueError(
                f"{recipe.name} needs {'--data.video-list' if train else '--data.val-list'} FILE "
                "with one `path label` a line"
            )
        folder = synthetic.render()
        entries = read_list(
            folder / f"{recipe.task}_{split}.txt", folder, num_classes=recipe.num_classes
        )
    return LabelledClips(
        entries, frames=d.frames, interval=d.interval, size=d.size, short=d.short,
        seed=recipe.run.seed, train=train, flip=recipe.flip, crop=recipe.crop,
        sampling=recipe.sampling, rand_augment=recipe.rand_augment, erasing=recipe.erasing,
    )  # fmt: skip


def prepare(batch: Batch, step: int) -> Batch:
    """Normalise the pixels of a batch on the device."""
    part = batch["clip"]
    return {"clip": {**part, "pixels": normalise(part["pixels"])}}


def train(recipe: Finetune) -> tuple[Classifier, list[dict[str, float]]]:
    """Run a fine-tuning recipe; return the model and the record, one dict per step.

    With ``optim.ema`` the model holds the weight average, as the released evaluation does.
    """
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    engine.be_deterministic(recipe.run.deterministic)
    dist.first_alone(synthetic.render, needed=not recipe.data.video_list)
    model = build_model(recipe)
    report = start_weights(recipe, model)
    if dist.rank() == 0:
        print(report)
    items = Positions(build_items(recipe), seed=recipe.run.seed, stream=Stream.VIDEO,
                      workers=recipe.data.workers)  # fmt: skip
    history = engine.fit(
        model, {"clip": Source(items, recipe.optim.clips)}, recipe.optim,
        engine.in_folder(recipe.run, run_folder(recipe)),
        steps=total_steps(recipe.optim, len(items)), prepare=prepare,
        config=flatten(recipe), rename=released_name,
    )  # fmt: skip
    return model, history


def score(
    recipe: Finetune, model: Classifier, split: str = "test", count: int = 0, **views: int
) -> ClassScore:
    """Score a model on held-out clips; ``views``: clips and crops, by default the recipe's."""
    views = {"clips": recipe.test_clips, "crops": recipe.test_crops} | views
    items = build_items(recipe, split)
    return score_classes(model, items, recipe.num_classes, count=count, **views)


def plan(recipe: Finetune) -> str:
    """Describe a run before its first step: size, steps, tokens, cost; nothing is read."""
    with torch.device("meta"):
        model = build_model(recipe)
    items = {"clip": cost.clip_item(recipe, model)}
    lines = cost.describe(recipe, model, {"clip": recipe.optim.clips}, items)
    lines["test views"] = f"{recipe.test_clips} clips x {recipe.test_crops} crops"
    lines["starts from"] = recipe.run.init or recipe.default_init or "--run.init, not given yet"
    return cost.write(lines)


if __name__ == "__main__":
    open_door(main)
