"""Small values that cross floors: a term of a loss, and how a model wants clips to be read."""

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


@dataclass(frozen=True, kw_only=True)
class Views:
    """How a model reads a video in use: which frames, which pixels, how many views."""

    frames: int
    interval: int  # frames between two read ones; without effect if sampling is uniform
    size: int  # side of the square view, pixels
    short: tuple[int, int]  # the short side the model was trained with, pixels: from, to
    sampling: str = "dense"  # or "uniform": spread over the whole video
    clips: int = 1  # views in time
    crops: int = 1  # and in space
