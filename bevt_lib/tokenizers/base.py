"""What every frozen tokenizer shares, and naming the frames of a batch by it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from bevt_lib.base.trainable import Batch, Part
from bevt_lib.model.masking import mask_in_time
from bevt_lib.model.normalisation import normalise


class Tokenizer(Protocol):
    """What BEVT asks of a frozen tokenizer."""

    vocab_size: int
    factor: int  # pixels of its view per id

    def encode(self, view: Tensor) -> Tensor:
        """uint8 pictures (N, h, w, 3) to int64 ids (N, h / factor, w / factor)."""
        ...

    def decode(self, ids: Tensor) -> Tensor:
        """int64 ids (N, h, w) to uint8 pictures (N, h * factor, w * factor, 3)."""
        ...


def add_tokens(
    batch: Batch,
    tokenizer: Tokenizer,
    *,
    hidden_only: bool = False,
    fp16: bool = False,
) -> dict[str, Part]:
    """Name the frames in the tokenizer's words and normalise the pixels; no gradient.

    Takes {stream: {"pixels": uint8 (B, T, H, W, 3), "tokenizer_input": uint8
    (B, T, v, v, 3), "mask": bool (B, D, h, w), ...}} and adds "ids" int64 (B, T, h, w);
    "pixels" become normalised floats
    (B, 3, T, H, W). The frames of all streams go through the tokenizer together, each on its own,
    as released. ``hidden_only`` names only frames that hold a hidden place, all that the loss
    asks for; the others' ids are -1. ``fp16`` names in half precision on CUDA: some ids change.
    """
    named = {}
    for stream, part in batch.items():
        hidden = part["mask"].flatten(2).any(dim=2) | (not hidden_only)  # (B, D)
        named[stream] = mask_in_time(hidden, part["tokenizer_input"].shape[1] // hidden.shape[1])
    views = torch.cat([part["tokenizer_input"][named[stream]] for stream, part in batch.items()])
    with torch.autocast("cuda", torch.float16, enabled=fp16 and views.is_cuda):
        found = tokenizer.encode(views)
    counts = [int(frames.sum()) for frames in named.values()]
    result: dict[str, Part] = {}
    for (stream, part), ids in zip(batch.items(), found.split(counts), strict=True):
        grid = ids.new_full((*named[stream].shape, *ids.shape[1:]), -1)
        grid[named[stream]] = ids
        result[stream] = {**part, "pixels": normalise(part["pixels"]), "ids": grid}
    return result


CHUNK = 64  # pictures per forward pass, to bound memory


@contextmanager
def without_record() -> Iterator[None]:
    """Compute in inference mode, and float32 without TF32, whose 10 bits of mantissa change ids."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def to_unit(view: Tensor) -> Tensor:
    """Scale pictures uint8 (N, h, w, 3) to float32 (N, 3, h, w) in 0..1."""
    return view.permute(0, 3, 1, 2).float() / 255


def psnr(pictures: Tensor, painted: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of uint8 pictures, from the mean squared error of all."""
    error = (pictures.double() - painted.double()).square().mean()
    return float(10 * torch.log10(255**2 / error))


def usage(ids: Tensor, vocab_size: int) -> tuple[float, float]:
    """Give (share of the codebook used, perplexity of the ids)."""
    shares = torch.bincount(ids.flatten(), minlength=vocab_size) / ids.numel()
    used = shares[shares > 0]
    return len(used) / vocab_size, float(torch.exp(-(used * used.log()).sum()))
