"""What the training loop asks of a model, and what passes between them: batches and loss terms."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict, cast

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate


class Part(TypedDict, total=False):
    """One stream's share of a micro-batch of B items. Which keys there are is the task's matter."""

    position: Tensor  # int64 (B,), on the host: since the start of training
    replaced: Tensor  # int64 (B,), on the host: 1 where the item stands for one with a bad file
    pixels: Tensor  # uint8 (B, T, H, W, 3); once prepared float (B, 3, T, H, W)
    tokenizer_input: Tensor  # uint8 (B, T, h, w, 3)
    mask: Tensor  # bool (B, D, h, w), True = hidden
    ids: Tensor  # int64 (B, T, h, w): token ids, -1 where a frame has none
    label: Tensor  # int64 (B,)
    schedule: Mapping[str, float]  # what a tokenizer's training varies with the step


Batch = Mapping[str, Part]  # by stream
Noise = Mapping[str, Tensor]  # by stream: uniforms in [0, 1), float32 (B, noise_sizes[stream])


@dataclass(frozen=True)
class Term:
    """One term of a loss, as sums over its items (masked places, labelled clips, pixels).

    The loop divides by the count of the *global* batch, so neither accumulation nor the number of
    processes changes the objective (the released code averages per GPU micro-batch).
    """

    loss: Tensor  # scalar: sum over items, with gradient
    count: int  # number of items in this micro-batch
    logs: dict[str, Tensor]  # detached scalars: sums over the same items, for the record


class Trainable(Protocol):
    """A model that can be trained: an ``nn.Module`` with the first three of these."""

    @property
    def noise_sizes(self) -> Mapping[str, int]:
        """By stream, how many uniforms each sample wants."""
        ...

    def counts(self, batch: Batch) -> list[int]:
        """Count each stream's items, in the batch's order, before anything is computed."""
        ...

    def __call__(self, batch: Batch, noise: Noise) -> dict[str, Term]:
        """Give each stream's loss."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def modules(self) -> Iterator[nn.Module]: ...
    def children(self) -> Iterator[nn.Module]: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> Any: ...
    def to(self, device: torch.device) -> Any: ...
    def double(self) -> Any: ...
    def train(self) -> Any: ...
    def eval(self) -> Any: ...


def collate(samples: Sequence[Mapping[str, Any]], device: torch.device | None = None) -> Part:
    """Stack samples of arrays and numbers into one part, on a device (None: the CPU)."""
    stacked = default_collate([dict(sample) for sample in samples])
    return cast(Part, {key: value.to(device) for key, value in stacked.items()})
