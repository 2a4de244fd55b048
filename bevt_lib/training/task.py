"""What a run trains, and on what: all that a command hands to the loop beside the recipe."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bevt_lib.base.config import require
from bevt_lib.base.trainable import Batch, Trainable
from bevt_lib.datasets.items import Positions

# The streams, each with the number that keys its noise: part of every result, never renumber.
NOISE_KEYS = {"video": 0, "image": 1, "clip": 2, "picture": 2}


@dataclass(frozen=True)
class Source:
    """One stream of a run: where its items come from and how many one step takes in all."""

    items: Positions
    batch: int  # global


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model, its data, and what happens around a step.

    ``prepare(batch, step)`` runs on the device without gradient: pixels to floats, token ids.
    ``after_step(step)`` runs on every process after the weights' update; its numbers go into the
    record. ``validate(done)`` scores the model after ``done`` steps: on all processes, in eval
    mode, on the average of the weights if there is one, every ``validate_every`` steps and after
    the last; its numbers go into the record as "val/...", and of the one named by ``best_by`` the
    weights with the highest value are kept. ``rename`` gives the parameter names that the recipe's
    rules match. ``config`` is what a resumed run must have in common with the one found. Raises
    ValueError for a stream that isn't declared in NOISE_KEYS.
    """

    model: Trainable
    sources: Mapping[str, Source]
    steps: int
    prepare: Callable[[Batch, int], Batch]
    after_step: Callable[[int], Mapping[str, float]] = lambda step: {}
    validate: Callable[[int], Mapping[str, float]] | None = None
    validate_every: int = 0
    best_by: str = ""
    rename: Callable[[str], str] = str
    config: Mapping[str, Any] = field(default_factory=dict)
    bad_share: float = 0.01  # of a stream's items: stop where more had to be replaced

    def __post_init__(self) -> None:
        known, given = (", ".join(names) for names in (NOISE_KEYS, self.sources))
        text = f"streams must be among {known}, got {given}: declare new ones in NOISE_KEYS"
        require(NOISE_KEYS.keys() >= self.sources.keys(), text)
