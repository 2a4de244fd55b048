"""What a result is worth: losses and accuracies on held-out data, beside their baselines.

Every evaluation is exact on any number of processes: blocks of the list are dealt out in turn, and
what makes up a block doesn't depend on their number, so that neither does any bit of the result.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from bevt_lib import dist
from bevt_lib.augment import normalise, one_thread
from bevt_lib.bevt import BEVT, Classifier, Tokenizer, add_tokens
from bevt_lib.masking import mask_in_time
from bevt_lib.video import BadFile

T = TypeVar("T")


class AtDistance(NamedTuple):
    """Prediction beside copying where the nearest visible frame is so many frames away."""

    places: int
    accuracy: float
    copy: float  # accuracy of copying
    loss: float  # of the model, in nats


@dataclass(frozen=True)
class TokenScore:
    """Masked-token prediction on held-out data; losses in nats, the rest in shares."""

    places: int  # hidden places scored
    loss: float
    accuracy: float
    entropy: float  # of the hidden ids themselves: the best loss without looking
    majority: float  # accuracy of always naming the commonest id
    copy: float | None = None  # accuracy of the id at the same place in the nearest visible frame
    by_distance: dict[int, AtDistance] = field(default_factory=dict)  # 0: no frame shows the place

    def __str__(self) -> str:
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "by_distance"}
        return "\n".join(
            f"{name:9s} {value:.3f}" if isinstance(value, float) else f"{name:9s} {value}"
            for name, value in values.items()
            if value is not None
        )


def copy_nearest(ids: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Guess each place's id from the nearest frame in which that place is visible.

    ``ids`` int64 and ``hidden`` bool, both (B, T, h, w). Of two frames equally near the earlier is
    taken. Returns (guess, distance in frames), int64 (B, T, h, w); where no frame shows the place,
    the guess is -1 and the distance 0.
    """
    frames = ids.shape[1]
    time = torch.arange(frames, device=ids.device)
    order = (time[:, None] - time[None, :]).abs() * 2 + (time[None, :] > time[:, None])
    cost = order[None, :, :, None, None] + hidden[:, None] * (4 * frames)
    best = cost.argmin(dim=2)  # (B, T, h, w): which frame to copy from
    never = hidden.all(dim=1, keepdim=True)
    distance = (best - time[None, :, None, None]).abs()
    return ids.gather(1, best).masked_fill(never, -1), distance.masked_fill(never, 0)


def hidden_places(ids: Tensor, hidden: Tensor) -> Tensor:
    """List the hidden places of :func:`copy_nearest`: int64 (3, places), id, guess, distance."""
    return torch.stack([ids, *copy_nearest(ids, hidden)])[:, hidden]


def copy_table(train: Tensor, val: Tensor, vocab_size: int, frames: int) -> Tensor:
    """Estimate log P(id | id at the nearest visible frame, distance): all that copying can say.

    ``train``, ``val``: int64 (3, places) of :func:`hidden_places`, in clips of ``frames`` frames.
    Counted on ``train`` and smoothed towards its unigram by the weight that suits ``val`` best,
    one for each distance. Returns float64 (frames, V, V), indexed [distance, guess, id].
    """
    truth, guess, distance = train
    counts = torch.zeros(frames, vocab_size, vocab_size, dtype=torch.float64)
    one = torch.ones((), dtype=torch.float64)
    counts.index_put_((distance, guess, truth), one, accumulate=True)
    unigram = torch.bincount(truth, minlength=vocab_size) + 0.5
    rows = counts.sum(-1, keepdim=True)
    best = torch.full((frames,), math.inf, dtype=torch.float64)
    table = torch.empty_like(counts)
    for weight in (5, 10, 20, 40, 80, 160, 320):
        smoothed = ((counts + weight * unigram / unigram.sum()) / (rows + weight)).log()
        nats = -smoothed[val[2], val[1], val[0]]
        total = torch.zeros_like(best).index_add_(0, val[2], nats)
        table[total < best] = smoothed[total < best]
        best = best.minimum(total)
    return table


@torch.no_grad()
def score_tokens(
    model: BEVT, tokenizer: Tokenizer, stream: str, items, count: int, batch_size: int = 32
) -> TokenScore:
    """Score masked-token prediction on the first ``count`` items of a held-out data set."""
    model.eval()
    device = next(model.parameters()).device
    columns = [torch.empty(5, 0, dtype=torch.float64)]
    for block in blocks(count, batch_size):
        batch = default_collate([items.sample(0, i) for i in block])
        batch = {k: v.to(device) for k, v in batch.items()}
        part = add_tokens({stream: batch}, tokenizer)[stream]
        ids, hidden = part["ids"], mask_in_time(part["mask"], model.frames_per_step[stream])
        logits = model.token_head(model.features(stream, part["pixels"], part["mask"]))[hidden]
        loss = nn.functional.cross_entropy(logits.float(), ids[hidden], reduction="none")
        right = logits.argmax(-1) == ids[hidden]
        found = [*hidden_places(ids, hidden), loss, right]
        columns.append(torch.stack([column.double() for column in found]).cpu())
    truth, guess, distance, losses, right = torch.cat(gather(torch.cat(columns, dim=1)), dim=1)
    copied = (guess == truth).double()
    shares = torch.bincount(truth.long()) / len(truth)
    shares = shares[shares > 0]
    score = TokenScore(
        places=len(truth), loss=float(losses.mean()), accuracy=float(right.mean()),
        entropy=float(-(shares * shares.log()).sum()), majority=float(shares.max()),
    )  # fmt: skip
    if stream != "video":
        return score
    near = {int(d): distance == d for d in distance.unique()}
    means = {
        d: AtDistance(int(at.sum()), *(float(x[at].mean()) for x in (right, copied, losses)))
        for d, at in near.items()
    }
    return replace(score, copy=float(copied.mean()), by_distance=means)


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
        return (
            f"top-1 {self.top1:.3f} (lower 95 % bound {self.lower95:.3f}) on {self.clips} clips, "
            f"chance {1 / self.classes:.3f}; top-5 {self.top5:.3f}, mean class "
            f"{self.mean_class:.3f}{only}{left}"
        )


@dataclass(frozen=True)
class Scores:
    """What a model says of each video of a list, in its order."""

    labels: Tensor  # int64 (n,)
    probabilities: Tensor  # float32 (n, classes), mean over the views
    errors: dict[int, str]  # of the videos that can't be read: why; their probabilities are NaN

    def summary(self) -> ClassScore:
        """Count top-1, top-5 and mean class accuracy; equals rank by class number.

        Raises ValueError where no video can be read, or a probability is no number.
        """
        read = torch.tensor([i not in self.errors for i in range(len(self.labels))])
        labels, found = self.labels[read], self.probabilities[read]
        if not len(labels):
            raise ValueError(f"none of {len(read)} videos can be read: {self.errors[0]}")
        if not found.isfinite().all():
            raise ValueError("the model gives probabilities that are no numbers: it is broken")
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
            views = self.items.views(index, self.clips, self.crops)
        except BadFile as error:
            return index, None, str(error)
        return index, torch.from_numpy(views), ""


@torch.no_grad()
def score_videos(
    model: Classifier,
    items,
    num_classes: int,
    *,
    clips: int = 1,
    crops: int = 1,
    count: int = 0,
    at_once: int = 32,
    workers: int = 0,
    bad: Mapping[int, str] | None = None,
) -> Scores:
    """Recognise the first ``count`` videos (0: all), each from ``clips`` x ``crops`` views.

    ``at_once`` views go through the model at a time, while ``workers`` loader processes decode the
    next. Those known to be ``bad`` (index: why) count as unreadable and aren't opened. All
    processes get the result.
    """
    model.eval()
    total = min(count or len(items), len(items))
    together = max(1, at_once // (clips * crops))  # videos
    loader = DataLoader(
        _ViewsOf(items, clips, crops, bad or {}), batch_sampler=blocks(total, together),
        num_workers=workers, collate_fn=list, worker_init_fn=one_thread,
    )  # fmt: skip
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
    rows = torch.full((total, num_classes), math.nan)
    errors: dict[int, str] = {}
    for indices, part, unread in gather((mine, torch.cat(found), wrong)):
        rows[indices] = part
        errors |= unread
    labels = torch.tensor([items.label(i) for i in range(total)])
    return Scores(labels, rows, dict(sorted(errors.items())))


def score_classes(model: Classifier, items, num_classes: int, **settings: Any) -> ClassScore:
    """Sum up :func:`score_videos`, which has the settings."""
    return score_videos(model, items, num_classes, **settings).summary()


def blocks(count: int, size: int) -> list[list[int]]:
    """Cut items 0 .. count - 1 into blocks of ``size``; give those that fall to this process."""
    starts = range(dist.rank() * size, count, dist.world_size() * size)
    return [list(range(start, min(start + size, count))) for start in starts]


def gather(value: T) -> list[T]:
    """Give every process the values of all, by rank."""
    if dist.world_size() == 1:
        return [value]
    values: list[T | None] = [None] * dist.world_size()
    torch.distributed.all_gather_object(values, value)
    return [v for v in values if v is not None]


def smooth(values: Sequence[float] | np.ndarray, window: int) -> np.ndarray:
    """Average a curve over a trailing window: float64 (len(values),)."""
    sums = np.cumsum(np.insert(np.asarray(values, dtype=float), 0, 0.0))
    starts = np.maximum(np.arange(1, len(sums)) - window, 0)
    ends = np.arange(1, len(sums))
    return (sums[ends] - sums[starts]) / (ends - starts)
