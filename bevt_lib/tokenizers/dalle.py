"""DALL-E's discrete VAE as BEVT's tokenizer.

Built from the DALL-E package's own encoder and decoder: full size for the paper's presets, narrow
and with fewer token ids for the lesson. Source: Ramesh et al. 2021 (DALL-E), BEVT section 3.1.
"""

from itertools import chain
from typing import Any

import attr
import dall_e
import torch
from torch import Tensor, nn

from bevt_lib.tokenizers import winograd
from bevt_lib.tokenizers.base import FrozenTokenizer, to_unit

FACTOR = 8  # pixels per id, both ways: three poolings of 2
WIDE = 128  # hidden channels from which fast convolutions pay; ids of narrow ones stay bit by bit
NARROWEST = 128  # output channels from which Winograd's algorithm is faster: measured
BLOCKS = (dall_e.encoder.EncoderBlock, dall_e.decoder.DecoderBlock)


def build(hidden: int, blocks: int, vocab_size: int) -> tuple[dall_e.Encoder, dall_e.Decoder]:
    """Build DALL-E's encoder and decoder, trainable, random weights.

    ``hidden`` is their n_hid, ``blocks`` their n_blk_per_group; DALL-E's own are 256, 2 and 8192
    ids. The package refuses narrow ones, so its validators are off here; and it can't be built
    with gradients (it fills a leaf in place), so they are switched on afterwards.
    """
    shared = {"n_hid": hidden, "n_blk_per_group": blocks, "vocab_size": vocab_size}
    with attr.validators.disabled():
        encoder = dall_e.Encoder(**shared)
        decoder = dall_e.Decoder(n_init=max(8, hidden // 2), **shared)
    return encoder.requires_grad_(), decoder.requires_grad_()


class DalleTokenizer(FrozenTokenizer):
    """DALL-E's tokenizer: the likeliest id of each 8x8 cell.

    Under ``torch.autocast`` all convolutions but the last run in its type.
    """

    kind, factor = "dalle", FACTOR
    encoder: dall_e.Encoder
    decoder: dall_e.Decoder

    def __init__(self, encoder: dall_e.Encoder, decoder: dall_e.Decoder | None = None):
        super().__init__(encoder, decoder, architecture(encoder.state_dict()))

    def encode_chunk(self, pictures: Tensor) -> Tensor:
        return self.logits(pictures).argmax(dim=1)

    def logits(self, pictures: Tensor) -> Tensor:
        """Score all ids: uint8 (N, h, w, 3) to float32 (N, vocab_size, h / 8, w / 8).

        Pixels are scaled to 0..1 and then mapped to 0.1..0.9.
        """
        x = dall_e.map_pixels(to_unit(pictures).contiguous(memory_format=torch.channels_last))
        output = self.encoder.blocks[-1]
        # On CUDA the package's convolutions but the last run in float16 unless told otherwise.
        half = pictures.is_cuda and torch.is_autocast_enabled("cuda")
        half = half and torch.get_autocast_dtype("cuda") == torch.float16
        for layer in self.encoder.modules():
            if isinstance(layer, dall_e.utils.Conv2d):
                layer.use_float16 = half and layer is not output.conv
        fast = self.architecture["hidden"] >= WIDE and winograd.is_usable(x, output.conv.w)
        x = features(self.encoder, x, fast)
        with torch.autocast("cuda" if pictures.is_cuda else "cpu", enabled=False):
            return convolve(output.conv, output.relu(x), fast)

    def decode_chunk(self, ids: Tensor) -> Tensor:
        one_hot = nn.functional.one_hot(ids, self.vocab_size).permute(0, 3, 1, 2).float()
        mean, log_spread = self.decoder(one_hot).float().chunk(2, dim=1)
        return dall_e.unmap_pixels(expected_pixels(mean, log_spread)) * 255


def features(encoder: dall_e.Encoder, x: Tensor, fast: bool) -> Tensor:
    """Do encoder.blocks[:-1](x), without a gradient and in place where the package copies.

    Bit by bit the same unless ``fast``: see :func:`convolve`.
    """
    x = encoder.blocks.input(x)
    for layer in chain(*encoder.blocks[1:-1]):
        if not isinstance(layer, dall_e.encoder.EncoderBlock):
            x = layer(x)
            continue
        path = x
        for conv in layer.res_path[1::2]:
            path = convolve(conv, nn.functional.relu(path, inplace=path is not x), fast)
        skip = x if isinstance(layer.id_path, nn.Identity) else convolve(layer.id_path, x, fast)
        x = skip + path.mul_(layer.post_gain)
    return x


def convolve(conv: dall_e.utils.Conv2d, x: Tensor, fast: bool) -> Tensor:
    """Do conv(x); ``fast``: with packed weights, and where it pays by Winograd's algorithm.

    That is thousands of short products, after each of which threads would wait for each other: so
    it is for one thread, as ``encode`` gives each picture.
    """
    if fast and conv.kw == 1:
        return winograd.conv1x1(x, conv.w, conv.b)
    if fast and conv.kw == 3 and conv.n_out >= NARROWEST and torch.get_num_threads() == 1:
        return winograd.conv3x3(x, conv.w, conv.b)
    return conv(x)


def expected_pixels(mean: Tensor, log_spread: Tensor, points: int = 9) -> Tensor:
    """Average DALL-E's logit-Laplace density of each mapped pixel over evenly likely quantiles.

    DALL-E's own code paints the median, sigmoid(mean); the mean has the smaller squared error (our
    choice, 0.1 dB on the lesson's pictures).
    """
    p = (torch.arange(points, device=mean.device) + 0.5) / points
    quantiles = torch.where(p < 0.5, (2 * p).log(), -(2 - 2 * p).log())
    spread = log_spread.clamp(min=-5.0).exp()
    return torch.stack([torch.sigmoid(mean + spread * q) for q in quantiles]).mean(0)


def architecture(encoder: dict[str, Tensor]) -> dict[str, int]:
    """Read the arguments of :func:`build` off an encoder's tensors, in the package's names.

    Raises ValueError where they are another network's.
    """
    try:
        hidden, vocab_size = (len(encoder[f"blocks.{k}.w"]) for k in ("input", "output.conv"))
    except KeyError as error:
        raise ValueError(f"not an encoder of DALL-E: {error} is missing") from None
    blocks = sum(k.startswith("blocks.group_1.") and k.endswith(".conv_1.w") for k in encoder)
    return {"hidden": hidden, "blocks": blocks, "vocab_size": vocab_size}


def build_dalle(shape: dict[str, Any], state: dict[str, Tensor]) -> DalleTokenizer:
    """Build a tokenizer from a file's architecture and tensors; the decoder may be left out.

    Raises ValueError where they don't fit each other.
    """
    encoder, decoder = build(shape["hidden"], shape["blocks"], shape["vocab_size"])
    can_paint = any(k.startswith("decoder.") for k in state)
    return DalleTokenizer(encoder, decoder if can_paint else None).fill(state)
