"""The frozen visual tokenizer: pictures to grids of ids and back.

DALL-E's discrete VAE, built from the DALL-E package's own encoder and decoder: full size for the
paper's presets, narrow and with fewer words for the lesson. Source: Ramesh et al. 2021 (DALL-E),
BEVT section 3.1.
"""

import json
from pathlib import Path

import attr
import torch
from dall_e import Decoder, Encoder, map_pixels, unmap_pixels
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

FACTOR = 8  # pixels per id, both ways: three poolings of 2
CHUNK = 64  # pictures per forward pass, to bound memory


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

    Frozen: always in eval mode, no gradient. The encoder runs in channels_last, which gives the
    same ids faster on CPU.
    """

    factor = FACTOR

    def __init__(self, encoder: Encoder, decoder: Decoder):
        super().__init__()
        self.encoder = encoder.to(memory_format=torch.channels_last)
        self.decoder = decoder.to(memory_format=torch.channels_last)
        self.vocab_size: int = encoder.vocab_size
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "DalleTokenizer":
        """Stay in eval mode, whatever the model around it does."""
        return super().train(False)

    @torch.no_grad()
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
        return torch.cat([self.logits(part).argmax(dim=1) for part in view.split(CHUNK)])

    def logits(self, view: Tensor) -> Tensor:
        """Score all ids: uint8 (N, h, w, 3) to float (N, vocab_size, h / 8, w / 8)."""
        x = to_unit(view).contiguous(memory_format=torch.channels_last)
        return self.encoder(map_pixels(x)).float()

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Paint ids (N, h, w) as pictures: uint8 (N, 8h, 8w, 3), RGB 0 to 255."""
        return torch.cat([self._paint(part) for part in ids.split(CHUNK)])

    def _paint(self, ids: Tensor) -> Tensor:
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


def to_unit(view: Tensor) -> Tensor:
    """Scale pictures uint8 (N, h, w, 3) to float32 (N, 3, h, w) in 0..1."""
    return view.permute(0, 3, 1, 2).float() / 255


def save_tokenizer(
    encoder: Encoder, decoder: Decoder, path: Path, dtype: torch.dtype = torch.float32
) -> None:
    """Write both parts to one safetensors file, with their architecture in its header."""
    state = {f"encoder.{k}": v for k, v in encoder.state_dict().items()}
    state |= {f"decoder.{k}": v for k, v in decoder.state_dict().items()}
    shape = {"hidden": encoder.n_hid, "blocks": encoder.n_blk_per_group,
             "vocab_size": encoder.vocab_size}  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().cpu().to(dtype).contiguous() for k, v in state.items()}
    save_file(tensors, path, metadata={"dalle": json.dumps(shape)})


def load_tokenizer(path: str | Path) -> DalleTokenizer:
    """Load a tokenizer that :func:`save_tokenizer` wrote.

    Raises ValueError in one line for a missing file, another kind of file, or missing tensors.
    """
    if not Path(path).is_file():
        raise ValueError(f"no tokenizer at {path}: give its .safetensors file (--tokens.weights)")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error})") from None
    if "dalle" not in metadata:
        raise ValueError(
            f"{path} holds no tokenizer: make one with python -m bevt_lib.train_tokenizer"
        )
    encoder, decoder = build(**json.loads(metadata["dalle"]))
    tokenizer = DalleTokenizer(encoder, decoder)
    missing, unexpected = tokenizer.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise ValueError(f"{path} doesn't fit its own header: missing {missing[:3]}, "
                         f"left over {unexpected[:3]}")  # fmt: skip
    return tokenizer
