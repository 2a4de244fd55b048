"""DALL-E's discrete VAE as BEVT's tokenizer, and the files in which OpenAI publishes it.

Built from the DALL-E package's own encoder and decoder: full size for the paper's presets, narrow
and with fewer words for the lesson. Source: Ramesh et al. 2021 (DALL-E), BEVT section 3.1.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import attr
import torch
from dall_e import Decoder, Encoder, map_pixels, unmap_pixels
from dall_e.utils import Conv2d
from torch import Tensor, nn

from bevt_lib.base.files import write_tensors
from bevt_lib.tokenizers.base import CHUNK, to_unit, without_record

FACTOR = 8  # pixels per id, both ways: three poolings of 2


State = Mapping[str, Tensor]


def build(hidden: int, blocks: int, vocab_size: int) -> tuple[Encoder, Decoder]:
    """Build DALL-E's encoder and decoder, trainable, random weights.

    ``hidden`` is their n_hid, ``blocks`` their n_blk_per_group; DALL-E's own are 256, 2 and 8192
    words. The package refuses narrow ones, so its validators are off here; and it can't be built
    with gradients (it fills a leaf in place), so they are switched on afterwards.
    """
    shared = {"n_hid": hidden, "n_blk_per_group": blocks, "vocab_size": vocab_size}
    with attr.validators.disabled():
        encoder, decoder = Encoder(**shared), Decoder(n_init=max(8, hidden // 2), **shared)
    return encoder.requires_grad_(), decoder.requires_grad_()


class DalleTokenizer(nn.Module):
    """Name each 8x8 cell of a picture by one of ``vocab_size`` ids, and paint ids as a picture.

    Frozen: always in eval mode, no gradient. Convolutions run in channels_last, which gives the
    same ids, and in float32, on CUDA as well; under ``torch.autocast`` all but the
    last run in its type, which changes some ids. Without ``decoder`` it only names.
    """

    factor = FACTOR

    def __init__(self, encoder: Encoder, decoder: Decoder | None = None):
        super().__init__()
        self.encoder = encoder.to(memory_format=torch.channels_last)
        self.decoder = None if decoder is None else decoder.to(memory_format=torch.channels_last)
        self.vocab_size: int = encoder.vocab_size
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "DalleTokenizer":
        """Stay in eval mode, whatever the model around it does."""
        return super().train(False)

    def encode(self, view: Tensor) -> Tensor:
        """Name cells: uint8 (N, h, w, 3), RGB 0 to 255, to int64 (N, h / 8, w / 8).

        The likeliest id of each cell; pixels are scaled to 0..1 and mapped to 0.1..0.9 first.
        Raises ValueError for sides that are no multiples of 8.
        """
        if view.dtype != torch.uint8 or view.dim() != 4 or view.shape[-1] != 3:
            raise ValueError(f"view must be uint8 (N, h, w, 3), got {view.dtype} {view.shape}")
        if view.shape[1] % FACTOR or view.shape[2] % FACTOR:
            raise ValueError(
                f"view {view.shape[1]}x{view.shape[2]}: sides must be multiples of {FACTOR} px"
            )
        with without_record():
            ids = torch.cat([self.logits(part).argmax(dim=1) for part in view.split(CHUNK)])
        return ids.clone()  # outside of inference mode: a loss may keep them for its backward

    def logits(self, view: Tensor) -> Tensor:
        """Score all ids: uint8 (N, h, w, 3) to float32 (N, vocab_size, h / 8, w / 8)."""
        x = map_pixels(to_unit(view).contiguous(memory_format=torch.channels_last))
        *body, output = self.encoder.blocks
        # On CUDA the package's convolutions but the last run in float16 unless told otherwise.
        half = view.is_cuda and torch.is_autocast_enabled("cuda")
        half = half and torch.get_autocast_dtype("cuda") == torch.float16
        for layer in self.encoder.modules():
            if isinstance(layer, Conv2d):
                layer.use_float16 = half and layer is not output.conv
        for block in body:
            x = block(x)
        with torch.autocast("cuda" if view.is_cuda else "cpu", enabled=False):
            return output(x)

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Paint ids (N, h, w) as pictures: uint8 (N, 8h, 8w, 3), RGB 0 to 255.

        Raises ValueError without a decoder.
        """
        return torch.cat([self._paint(part) for part in ids.split(CHUNK)])

    def _paint(self, ids: Tensor) -> Tensor:
        if self.decoder is None:
            raise ValueError("this tokenizer came without its decoder, so it can't paint: load the "
                             "folder that holds encoder.pkl and decoder.pkl")  # fmt: skip
        words = nn.functional.one_hot(ids, self.vocab_size).permute(0, 3, 1, 2).float()
        mean, log_spread = self.decoder(words).float().chunk(2, dim=1)
        picture = unmap_pixels(expected_pixels(mean, log_spread)) * 255
        return picture.round().to(torch.uint8).permute(0, 2, 3, 1)


def expected_pixels(mean: Tensor, log_spread: Tensor, points: int = 9) -> Tensor:
    """Average DALL-E's logit-Laplace density of each mapped pixel over evenly likely quantiles.

    DALL-E's own code paints the median, sigmoid(mean); the mean has the smaller squared error (our
    choice, 0.1 dB on the lesson's pictures).
    """
    p = (torch.arange(points, device=mean.device) + 0.5) / points
    quantiles = torch.where(p < 0.5, (2 * p).log(), -(2 - 2 * p).log())
    spread = log_spread.clamp(min=-5.0).exp()
    return torch.stack([torch.sigmoid(mean + spread * q) for q in quantiles]).mean(0)


def save_tokenizer(
    encoder: Encoder, decoder: Decoder, path: Path, dtype: torch.dtype = torch.float32
) -> None:
    """Write both parts to one safetensors file, with their architecture in its header."""
    parts = {"encoder": encoder.state_dict(), "decoder": decoder.state_dict()}
    state = {f"{part}.{k}": v.to(dtype) for part, s in parts.items() for k, v in s.items()}
    write_tensors(path, state, {"dalle": json.dumps(architecture(parts["encoder"]))})


def architecture(encoder: State) -> dict[str, int]:
    """Read the arguments of :func:`build` off an encoder's tensors, in the package's names.

    Raises ValueError where they are another network's.
    """
    try:
        return {
            "hidden": len(encoder["blocks.input.w"]),
            "blocks": sum(k.startswith("blocks.group_1.") and k.endswith(".conv_1.w")
                          for k in encoder),
            "vocab_size": len(encoder["blocks.output.conv.w"]),
        }  # fmt: skip
    except KeyError as error:
        raise ValueError(f"no encoder of DALL-E: {error} is missing") from None


def build_dalle(header: str, state: State) -> DalleTokenizer:
    """Build a tokenizer from the header and tensors of :func:`save_tokenizer`'s file.

    The decoder may be left out. Raises ValueError where they don't fit each other.
    """
    shape = json.loads(header)
    shape.pop("sources", None)
    encoder, decoder = build(**shape)
    own = {f"encoder.{k}": v for k, v in encoder.state_dict().items()}
    painting = any(k.startswith("decoder.") for k in state)
    if painting:
        own |= {f"decoder.{k}": v for k, v in decoder.state_dict().items()}
    sizes, given = ({k: v.shape for k, v in s.items()} for s in (own, state))
    odd = sorted(k for k in own.keys() | given.keys() if sizes.get(k) != given.get(k))
    if odd:
        raise ValueError(
            f"not one DALL-E tokenizer of {shape}: {len(odd)} tensors are missing, left over or of "
            f"another shape ({', '.join(odd[:3])})"
        )
    for name, value in own.items():
        value.copy_(state[name])
    return DalleTokenizer(encoder, decoder if painting else None)
