"""What a result is worth: losses and accuracies on held-out data, beside their baselines.

Every evaluation is exact on any number of processes: blocks of the list are dealt out in turn, and
what makes up a block doesn't depend on their number, so that neither does any bit of the result.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from bevt_lib.base.distributed import blocks, gather
from bevt_lib.base.trainable import collate
from bevt_lib.model.bevt import BEVT
from bevt_lib.model.masking import mask_in_time
from bevt_lib.tokenizers.base import FrozenTokenizer, add_tokens


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
    model: BEVT, tokenizer: FrozenTokenizer, stream: str, items, count: int, batch_size: int = 32
) -> TokenScore:
    """Score masked-token prediction on the first ``count`` items of a held-out data set."""
    model.eval()
    device = next(model.parameters()).device
    columns = [torch.empty(5, 0, dtype=torch.float64)]
    for block in blocks(count, batch_size):
        batch = collate([items.sample(0, i) for i in block], device)
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
    together = torch.cat(gather(torch.cat(columns, dim=1)), dim=1)
    truth, losses, right, copied, changed = together
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
