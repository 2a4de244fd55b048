"""What the training loop asks of a model, and what a model gives it: one term per stream."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Term:
    """One term of a loss, as sums over its items (masked places, labelled clips, pixels).

    The loop divides by the count of the *global* batch, so neither accumulation nor the number of
    processes changes the objective (the released code averages per GPU micro-batch).
    """

    loss: torch.Tensor  # scalar: sum over items, with gradient
    count: int  # number of items in this micro-batch
    logs: dict[str, torch.Tensor]  # detached scalars: sums over the same items, for the record
