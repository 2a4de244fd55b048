"""How well a classifier recognises held-out videos, exactly, on any number of processes."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bevt_lib.base import distributed, files
from bevt_lib.base.config import Finetune
from bevt_lib.datasets import augment, sources, synthetic
from bevt_lib.datasets.video import BadFile
from bevt_lib.model.classifier import Classifier
from bevt_lib.model.normalisation import normalise


@dataclass(frozen=True)
class ClassScore:
    """Recognition on held-out clips, views averaged: shares of the clips that could be read."""

    clips: int
    classes: int
    top1: float
    lower95: float  # Wilson's lower 95 % bound of top1
    per_class: tuple[float, ...]  # NaN: no clip of this class
    top5: float
    mean_class: float  # mean of per_class over the classes that have a clip
    unread: tuple[str, ...] = ()  # a line for each further clip, which can't be read

    def __str__(self) -> str:
        present = sum(not math.isnan(share) for share in self.per_class)
        only = f" (of the {present} classes with a clip)" if present < self.classes else ""
        left = f"; LEFT OUT {len(self.unread)} clips that can't be read" if self.unread else ""
        top1 = f"top-1 {self.top1:.3f} (lower 95 % bound {self.lower95:.3f}) on {self.clips} clips"
        return (f"{top1}, chance {1 / self.classes:.3f}; top-5 {self.top5:.3f}, mean class "
                f"{self.mean_class:.3f}{only}{left}")  # fmt: skip


@dataclass(frozen=True)
class Scores:
    """What a model says of each video of a list, in its order."""

    labels: Tensor  # int64 (n,)
    probabilities: Tensor  # float32 (n, classes), mean over the views
    errors: dict[int, str]  # index: why that video can't be read; its probabilities are NaN

    def summary(self) -> ClassScore:
        """Count top-1, top-5 and mean class accuracy; equals rank by class number.

        Raises ValueError where no video can be read, or a probability is not a number.
        """
        read = torch.tensor([i not in self.errors for i in range(len(self.labels))])
        labels, found = self.labels[read], self.probabilities[read]
        if not len(labels):
            raise ValueError(f"none of {len(read)} videos can be read: {self.errors[0]}")
        if not found.isfinite().all():
            raise ValueError("the model gives probabilities that are not numbers: it is broken")
        true, classes = found.gather(1, labels[:, None]), found.shape[1]
        earlier = torch.arange(classes) < labels[:, None]
        better = ((found > true) | ((found == true) & earlier)).sum(1)  # classes before the true
        right = (better == 0).double()
        per_class = [float(right[labels == c].mean()) for c in range(classes)]
        return ClassScore(
            len(labels), classes, float(right.mean()), wilson_lower(int(right.sum()), len(labels)),
            tuple(per_class), top5=float((better < 5).double().mean()),
            mean_class=float(np.nanmean(per_class)), unread=tuple(self.errors.values()),
        )  # fmt: skip


def wilson_lower(right: int, total: int, z: float = 1.96) -> float:
    """Give the lower end of Wilson's 95 % interval for a share of ``right`` in ``total``."""
    share = right / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return (centre - spread) / (1 + z * z / total)


@torch.no_grad()
def score_views(model: Classifier, pixels: Tensor, at_once: int = 32) -> Tensor:
    """Average the class probabilities over views: uint8 (B, V, T, H, W, 3) to float (B, classes).

    ``at_once`` views go to the model's device and through it at a time, in its weights' precision.
    Source: the released test pipeline averages softmax ("prob"), not logits.
    """
    weight = next(model.parameters())
    parts = (part.to(weight.device) for part in pixels.flatten(0, 1).split(at_once))
    logits = torch.cat([model.logits(normalise(part).to(weight.dtype)) for part in parts])
    return logits.softmax(-1).unflatten(0, pixels.shape[:2]).mean(1)


class _ViewsOf(Dataset):
    """The test views of a list for a loader: (index, views or None, why they can't be read)."""

    def __init__(self, items, clips: int, crops: int, bad: Mapping[int, str]):
        self.items, self.clips, self.crops, self.bad = items, clips, crops, bad

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, str]:
        if index in self.bad:
            return index, None, self.bad[index]
        try:
            views = self.items.test_views(index, self.clips, self.crops)
            return index, torch.from_numpy(views), ""
        except BadFile as error:
            return index, None, str(error)


@torch.no_grad()
def score_videos(
    model: Classifier, items, num_classes: int, *, clips: int = 1, crops: int = 1, count: int = 0,
    at_once: int = 32, workers: int = 0, bad: Mapping[int, str] | None = None,
) -> Scores:  # fmt: skip
    """Recognise the first ``count`` videos (0: all), each from ``clips`` x ``crops`` views.

    ``at_once`` views go through the model at a time, while ``workers`` loader processes decode the
    next. Those known to be ``bad`` (index: why) count as unreadable and aren't opened. All
    processes get the result.
    """
    model.eval()
    total = min(count or len(items), len(items))
    together = max(1, at_once // (clips * crops))  # videos
    loader = DataLoader(
        _ViewsOf(items, clips, crops, bad or {}), num_workers=workers, collate_fn=list,
        batch_sampler=distributed.blocks(total, together), worker_init_fn=augment.one_thread,
    )  # fmt: skip
    # Score this process's share of the list.
    mine: list[int] = []
    found = [torch.empty(0, num_classes)]
    wrong: dict[int, str] = {}
    for block in loader:
        read = {i: views for i, views, why in block if not why}
        wrong |= {i: why for i, _, why in block if why}
        if read:
            mine += read
            shares = score_views(model, torch.stack(list(read.values())), at_once)
            found.append(shares.float().cpu())
    # Put the shares of all processes together, in the list's order.
    rows = torch.full((total, num_classes), math.nan)
    errors: dict[int, str] = {}
    for indices, part, unread in distributed.gather((mine, torch.cat(found), wrong)):
        rows[indices] = part
        errors |= unread
    labels = torch.tensor([items.label(i) for i in range(total)])
    return Scores(labels, rows, dict(sorted(errors.items())))


def write_scores(scores: Scores, names: Sequence[str], file: Path) -> None:
    """Write one JSON line for each video of a list, in its order, at once.

    "path", "label", then "predicted" and "probabilities" of the classes (every digit of their
    float32), or "error".
    """
    with files.replace_file(file) as part, part.open("w", encoding="utf-8") as lines:
        pairs = zip(scores.labels.tolist(), scores.probabilities.numpy(), strict=True)
        for number, (label, row) in enumerate(pairs):
            entry: dict[str, Any] = {"path": names[number], "label": label}
            if number in scores.errors:
                entry["error"] = scores.errors[number]
            else:
                entry["predicted"] = int(row.argmax())
                entry["probabilities"] = [float(str(p)) for p in row]
            lines.write(json.dumps(entry, ensure_ascii=False) + "\n")


def score_split(
    recipe: Finetune, model: Classifier, split: str = "test", count: int = 0,
    file: Path | None = None, **views: int,
) -> ClassScore:  # fmt: skip
    """Score a model on held-out clips; ``views``: clips and crops, by default the recipe's.

    Rank 0 writes what it says of each to ``file``.
    """
    views = {"clips": recipe.test_clips, "crops": recipe.test_crops} | views
    # A figure is of the whole list: what check_data calls bad counts as unread.
    whole, bad = replace(recipe, data=replace(recipe.data, checked=())), {}
    items = sources.labelled_items(whole, split)
    if recipe.data.checked:
        kept = set(sources.labelled_items(recipe, split).entries)
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
