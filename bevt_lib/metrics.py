"""What a result is worth: losses and accuracies on held-out data, beside their baselines.

Every evaluation is exact on any number of processes: each takes every n-th item, and sums meet.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from bevt_lib import dist
from bevt_lib.augment import normalise
from bevt_lib.bevt import BEVT, Classifier, Tokenizer, add_tokens
from bevt_lib.masking import mask_in_time


@dataclass(frozen=True)
class TokenScore:
    """Masked-token prediction on held-out data; losses in nats, the rest in shares."""

    places: int  # hidden places scored
    loss: float
    accuracy: float
    entropy: float  # of the hidden ids themselves: the best loss without looking
    majority: float  # accuracy of always naming the commonest id
    copy: float | None = None  # accuracy of the id at the same place in the nearest visible frame
    changed_share: float | None = None  # places whose id differs from the frame before
    changed: float | None = None  # the model's accuracy there
    changed_copy: float | None = None
    unchanged: float | None = None  # the model's accuracy at the others
    unchanged_copy: float | None = None

    def __str__(self) -> str:
        return "\n".join(
            f"{name:14s} {value:.3f}" if isinstance(value, float) else f"{name:14s} {value}"
            for name, value in asdict(self).items()
            if value is not None
        )


def copy_nearest(ids: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Guess each place's id from the nearest frame in which that place is visible.

    ``ids`` int64 and ``hidden`` bool, both (B, T, h, w). Of two frames equally near the earlier is
    taken. Returns (guess, possible): int64 and bool (B, T, h, w); where no frame shows the place,
    ``possible`` is False and the guess is 0.
    """
    frames = ids.shape[1]
    time = torch.arange(frames, device=ids.device)
    distance = (time[:, None] - time[None, :]).abs() * 2 + (time[None, :] > time[:, None])
    cost = distance[None, :, :, None, None] + hidden[:, None] * (4 * frames)
    best = cost.argmin(dim=2)  # (B, T, h, w): which frame to copy from
    possible = ~hidden.all(dim=1, keepdim=True).expand_as(hidden)
    return ids.gather(1, best) * possible, possible


def changed_places(ids: Tensor) -> Tensor:
    """Tell where an id differs from the frame before (for the first frame: after): bool."""
    steps = ids[:, 1:] != ids[:, :-1]
    return torch.cat([steps[:, :1], steps], dim=1)


@torch.no_grad()
def score_tokens(
    model: BEVT, tokenizer: Tokenizer, stream: str, items, count: int, batch_size: int = 32
) -> TokenScore:
    """Score masked-token prediction on the first ``count`` items of a held-out data set."""
    model.eval()
    device = next(model.parameters()).device
    columns: list[Tensor] = []
    for batch in batches_of(lambda i: items.sample(0, i), count, batch_size, device):
        part = add_tokens({stream: batch}, tokenizer)[stream]
        ids, hidden = part["ids"], mask_in_time(part["mask"], model.frames_per_step[stream])
        logits = model.token_head(model.features(stream, part["pixels"], part["mask"]))[hidden]
        loss = nn.functional.cross_entropy(logits.float(), ids[hidden], reduction="none")
        guess, possible = copy_nearest(ids, hidden)
        columns.append(
            torch.stack(
                [
                    ids[hidden].double(),
                    loss.double(),
                    (logits.argmax(-1) == ids[hidden]).double(),
                    ((guess == ids) & possible)[hidden].double(),
                    (changed_places(ids) if ids.shape[1] > 1 else hidden)[hidden].double(),
                ]
            ).cpu()
        )
    truth, losses, right, copied, changed = gather_columns(torch.cat(columns, dim=1))
    shares = torch.bincount(truth.long()) / len(truth)
    shares = shares[shares > 0]
    places = len(truth)
    score = {
        "loss": float(losses.mean()),
        "accuracy": float(right.mean()),
        "entropy": float(-(shares * shares.log()).sum()),
        "majority": float(shares.max()),
    }
    if stream == "video":
        moved = changed.bool()
        score |= {
            "copy": float(copied.mean()),
            "changed_share": float(moved.double().mean()),
            "changed": float(right[moved].mean()),
            "changed_copy": float(copied[moved].mean()),
            "unchanged": float(right[~moved].mean()),
            "unchanged_copy": float(copied[~moved].mean()),
        }
    return TokenScore(places=places, **score)


@dataclass(frozen=True)
class ClassScore:
    """Recognition on held-out clips, views averaged."""

    clips: int
    classes: int
    top1: float
    lower95: float  # Wilson's lower 95 % bound of top1
    per_class: tuple[float, ...]

    def __str__(self) -> str:
        return (
            f"top-1 {self.top1:.3f} (lower 95 % bound {self.lower95:.3f}) on {self.clips} clips, "
            f"chance {1 / self.classes:.3f}"
        )


def wilson_lower(right: int, total: int, z: float = 1.96) -> float:
    """Give the lower end of Wilson's 95 % interval for a share of ``right`` in ``total``."""
    share = right / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return (centre - spread) / (1 + z * z / total)


@torch.no_grad()
def score_views(model: Classifier, pixels: Tensor) -> Tensor:
    """Average the class probabilities over views: uint8 (B, V, T, H, W, 3) to float (B, classes).

    Source: the released test pipeline averages softmax ("prob"), not logits.
    """
    batch, views = pixels.shape[:2]
    logits = model.logits(normalise(pixels.flatten(0, 1)))
    return logits.softmax(-1).unflatten(0, (batch, views)).mean(1)


@torch.no_grad()
def score_classes(
    model: Classifier,
    items,
    num_classes: int,
    *,
    clips: int = 1,
    crops: int = 1,
    count: int = 0,
    batch_size: int = 32,
) -> ClassScore:
    """Recognise the first ``count`` clips (0: all), each from ``clips`` x ``crops`` views."""
    model.eval()
    device = next(model.parameters()).device

    def item(index: int) -> dict:
        return {"pixels": items.views(index, clips, crops), "label": items.label(index)}

    rows = []
    per_batch = max(1, batch_size // (clips * crops))
    for batch in batches_of(item, count or len(items), per_batch, device):
        predicted = score_views(model, batch["pixels"]).argmax(-1)
        rows.append(torch.stack([predicted, batch["label"]]).double().cpu())
    predicted, labels = gather_columns(torch.cat(rows, dim=1))
    right = predicted == labels
    per_class = [float(right[labels == c].double().mean()) for c in range(num_classes)]
    total = len(labels)
    hits = int(right.sum())
    return ClassScore(total, num_classes, hits / total, wilson_lower(hits, total), tuple(per_class))


def batches_of(
    item: Callable[[int], Mapping], count: int, batch_size: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Collate this process's share of items 0 .. count - 1: every world-size-th, none twice."""
    mine = range(dist.rank(), count, dist.world_size())
    for start in range(0, len(mine), batch_size):
        batch = default_collate([item(i) for i in mine[start : start + batch_size]])
        yield {k: v.to(device) for k, v in batch.items()}


def gather_columns(columns: Tensor) -> Tensor:
    """Join (rows, n) tensors of all processes along n; unequal n are allowed."""
    if dist.world_size() == 1:
        return columns
    parts: list[Tensor | None] = [None] * dist.world_size()
    torch.distributed.all_gather_object(parts, columns)
    return torch.cat([p for p in parts if p is not None], dim=1)


def smooth(values: Sequence[float], window: int) -> np.ndarray:
    """Average a curve over a trailing window: float64 (len(values),)."""
    sums = np.cumsum(np.insert(np.asarray(values, dtype=float), 0, 0.0))
    starts = np.maximum(np.arange(1, len(sums)) - window, 0)
    ends = np.arange(1, len(sums))
    return (sums[ends] - sums[starts]) / (ends - starts)
