"""What a result is worth: losses and accuracies on held-out data, beside their baselines.

Every evaluation is exact on any number of processes: blocks of the list are dealt out in turn, and
what makes up a block doesn't depend on their number, so that neither does any bit of the result.
"""

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bevt_lib.base import distributed, trainable
from bevt_lib.model.bevt import BEVT
from bevt_lib.model.masking import mask_in_time
from bevt_lib.tokenizers.base import FrozenTokenizer, add_tokens


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
        values = {name: v for name, v in vars(self).items() if isinstance(v, int | float)}
        return "\n".join(f"{name:9s} {value if name == 'places' else f'{value:.3f}'}"
                         for name, value in values.items())  # fmt: skip


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
    model: BEVT, tokenizer: FrozenTokenizer, stream: str, items, count: int
) -> TokenScore:
    """Score masked-token prediction on the first ``count`` items of a held-out data set."""
    model.eval()
    device = next(model.parameters()).device
    # One column for each hidden place: its id, the copy, its distance, the loss, right or wrong.
    columns = [torch.empty(5, 0, dtype=torch.float64)]
    for block in distributed.blocks(count, 32):
        batch = trainable.collate([items.sample(0, i) for i in block], device)
        part = add_tokens({stream: batch}, tokenizer)[stream]
        ids, hidden = part["ids"], mask_in_time(part["mask"], model.frames_per_step[stream])
        logits = model.token_head(model.features(stream, part["pixels"], part["mask"]))[hidden]
        loss = nn.functional.cross_entropy(logits.float(), ids[hidden], reduction="none")
        found = [*hidden_places(ids, hidden), loss, logits.argmax(-1) == ids[hidden]]
        columns.append(torch.stack([column.double() for column in found]).cpu())
    everywhere = distributed.gather(torch.cat(columns, dim=1))
    truth, guess, distance, losses, right = torch.cat(everywhere, dim=1)
    # Means over all places, then by distance from the nearest frame that shows the place.
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
    means = {d: AtDistance(int(at.sum()), *(float(x[at].mean()) for x in (right, copied, losses)))
             for d, at in near.items()}  # fmt: skip
    return replace(score, copy=float(copied.mean()), by_distance=means)
