"""What all tokenizers share: a base for frozen ones, one for those in training, ids for a batch."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from bevt_lib.base import files
from bevt_lib.base.trainable import Batch, Part
from bevt_lib.model import masking, normalisation
from bevt_lib.weights import load

CHUNK = 64  # pictures per forward pass, to bound memory
CPU_PIXELS = 24 * 48 * 48  # the same on a CPU, in pixels: larger chunks miss its cache
START_PICTURES = 1024  # pictures that a codebook starts from, at most


class FrozenTokenizer(nn.Module, ABC):
    """Turn pictures into grids of token ids, and ids into pictures; never trained.

    There are ``vocab_size`` ids, each of which stands for ``factor`` x ``factor`` pixels. Always in
    eval mode, no gradient. Convolutions run in channels_last, which gives the same ids, and in
    float32, on CUDA as well; under ``torch.autocast`` they run in its type, which changes some ids.
    Without ``decoder`` it can't paint.

    A subclass sets ``kind``, the entry of a file's header that holds ``architecture``, and
    ``factor``, and defines how one chunk is encoded and decoded.
    """

    kind: str
    factor: int

    def __init__(self, encoder: nn.Module, decoder: nn.Module | None, architecture: dict[str, Any]):
        super().__init__()
        self.encoder, self.decoder, self.architecture = encoder, decoder, architecture
        self.vocab_size = architecture["vocab_size"]
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, whatever the model around it does."""
        return super().train(False)

    @abstractmethod
    def encode_chunk(self, pictures: Tensor) -> Tensor:
        """Give the token ids of a few pictures; shapes as in :meth:`encode`."""

    @abstractmethod
    def decode_chunk(self, ids: Tensor) -> Tensor:
        """Paint a few grids of ids: float (N, 3, h * factor, w * factor), 0 to 255."""

    def encode(self, pictures: Tensor) -> Tensor:
        """Give each cell its token id.

        uint8 (N, h, w, 3), RGB 0 to 255, to int64 (N, h / factor, w / factor). Raises ValueError
        for other types and shapes, and for sides that aren't multiples of ``factor``.
        """
        shape, factor = tuple(pictures.shape), self.factor
        if pictures.dtype != torch.uint8 or len(shape) != 4 or shape[3] != 3:
            raise ValueError(f"pictures must be uint8 (N, h, w, 3), got {pictures.dtype} {shape}")
        if shape[1] % factor or shape[2] % factor:
            raise ValueError(f"pictures' sides {shape[1:3]} must be multiples of {factor} px")
        on_cpu = pictures.device.type == "cpu"
        chunk = max(1, CPU_PIXELS // (shape[1] * shape[2])) if on_cpu else CHUNK
        allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
        try:  # float32 without TF32, whose 10 bits of mantissa change ids
            with torch.inference_mode():
                ids = torch.cat(by_core(self.encode_chunk, pictures.split(chunk)))
        finally:
            torch.backends.cudnn.allow_tf32 = allowed
        return ids.clone()  # outside of inference mode: a loss may keep them for its backward

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Paint ids int64 (N, h, w) as pictures: uint8 (N, h * factor, w * factor, 3), 0 to 255.

        Raises ValueError without a decoder.
        """
        if self.decoder is None:
            raise ValueError("can't paint without its decoder: load a folder with decoder.pkl too")
        painted = (self.decode_chunk(part).round().to(torch.uint8) for part in ids.split(CHUNK))
        return torch.cat([part.permute(0, 2, 3, 1) for part in painted])

    def digest(self) -> str:
        """Sum up what ids depend on: a run isn't to be resumed with another tokenizer."""
        state = self.state_dict().items()
        return files.digest({k: v for k, v in state if not k.startswith("decoder.")})

    def save(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        """Write one safetensors file, with the architecture in its header."""
        state = {k: v.to(dtype) for k, v in self.state_dict().items()}
        files.write_tensors(path, state, {self.kind: json.dumps(self.architecture)})

    def fill(self, state: dict[str, Tensor]) -> Self:
        """Load tensors of any float type; returns self. Raises ValueError where they don't fit."""
        load.load_strict(self, state, f"{self.kind} tokenizer of {self.architecture}")
        return self


def by_core(work: Callable[[Tensor], Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
    """Do ``work(part)`` for each part, in inference mode: on a CPU each by one core.

    Pictures don't wait for each other, where threads that share one convolution do after each.
    """
    cores = torch.get_num_threads()
    shared = parts[0].device.type != "cpu" or torch.is_autocast_enabled("cpu")
    if shared or min(cores, len(parts)) == 1:
        return [work(part) for part in parts]

    def alone(part: Tensor) -> Tensor:
        torch.set_num_threads(1)  # of this thread
        with torch.inference_mode():
            return work(part)

    try:
        with ThreadPoolExecutor(min(cores, len(parts))) as pool:
            return list(pool.map(alone, parts))
    finally:
        torch.set_num_threads(cores)


class TrainableTokenizer(nn.Module, ABC):
    """A tokenizer in training: what its training asks of it beside ``forward``.

    ``decoder_channels`` is the number of channels that the decoder paints from.
    """

    start_pictures = START_PICTURES  # wanted by :meth:`start_codebook`; 0: it is not to be called

    def __init__(self, encoder: nn.Module, decoder: nn.Module, decoder_channels: int):
        super().__init__()
        self.encoder, self.decoder, self.decoder_channels = encoder, decoder, decoder_channels
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.noise_sizes = {"picture": 0}

    def counts(self, batch: Batch) -> list[int]:
        """Count the pictures."""
        return [len(batch["picture"]["pixels"])]

    @abstractmethod
    def start_codebook(self, pixels: Tensor, generator: torch.Generator) -> None:
        """Start the codebook from pictures, float (N, 3, h, w) in 0..1."""

    def schedule_at(self, step: int, cycle: int) -> dict[str, float]:
        """Give the settings of ``forward`` at a step, which lies in this cosine (from 0)."""
        return {}

    def update_codes(self, generator: torch.Generator) -> dict[str, float]:
        """Move the codes after the optimiser's step; returns numbers for the record."""
        return {}

    @abstractmethod
    def tokenizer(self) -> FrozenTokenizer:
        """Copy the frozen tokenizer out of the model in training."""


def add_tokens(
    batch: Batch, tokenizer: FrozenTokenizer, *, hidden_only: bool = False, fp16: bool = False
) -> dict[str, Part]:
    """Add the token ids of the frames and normalise the pixels; no gradient.

    Takes {stream: {"pixels": uint8 (B, T, H, W, 3), "tokenizer_input": uint8 (B, T, v, v, 3),
    "mask": bool (B, D, h, w), True = hidden, ...}} and adds "ids" int64 (B, T, h, w); "pixels"
    become normalised floats (B, 3, T, H, W). The frames of all streams go through the tokenizer
    together, each on its own, as released. ``hidden_only`` encodes only frames that hold a hidden
    place, all that the loss asks for; the others' ids are -1. ``fp16`` encodes in half precision on
    CUDA: some ids change.
    """
    wanted = {}
    for stream, part in batch.items():
        hidden = part["mask"].flatten(2).any(dim=2) | (not hidden_only)  # (B, D)
        wanted[stream] = masking.mask_in_time(
            hidden, part["tokenizer_input"].shape[1] // hidden.shape[1]
        )
    frames = torch.cat([part["tokenizer_input"][wanted[stream]] for stream, part in batch.items()])
    with torch.autocast("cuda", torch.float16, enabled=fp16 and frames.is_cuda):
        found = tokenizer.encode(frames).split([int(w.sum()) for w in wanted.values()])
    result: dict[str, Part] = {}
    for (stream, part), ids in zip(batch.items(), found, strict=True):
        grid = ids.new_full((*wanted[stream].shape, *ids.shape[1:]), -1)
        grid[wanted[stream]] = ids
        result[stream] = {**part, "pixels": normalisation.normalise(part["pixels"]), "ids": grid}
    return result


def to_unit(pictures: Tensor) -> Tensor:
    """Scale pictures uint8 (N, h, w, 3) to float32 (N, 3, h, w) in 0..1."""
    return pictures.permute(0, 3, 1, 2).float() / 255


def psnr(pictures: Tensor, painted: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of uint8 pictures, from the mean squared error of all."""
    error = (pictures.double() - painted.double()).square().mean()
    return float(10 * torch.log10(255**2 / error))


def usage(ids: Tensor, vocab_size: int) -> tuple[float, float]:
    """Give (share of the codebook used, perplexity of the ids)."""
    shares = torch.bincount(ids.flatten(), minlength=vocab_size) / ids.numel()
    used = shares[shares > 0]
    return len(used) / vocab_size, float(torch.exp(-(used * used.log()).sum()))
