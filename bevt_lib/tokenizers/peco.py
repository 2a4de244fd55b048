"""PeCo's tokenizer: a VQ-VAE whose paintings must also look right to a frozen network.

Source: van den Oord et al. 2017 (VQ-VAE): straight-through gradient, commitment, codes as moving
averages of the features nearest to them. Dong et al. 2021 (PeCo, arXiv 2111.12710): the perceptual
term. PeCo's code and weights for BEVT were never released, and its paper was not re-read for this:
stride 16, 8,192 codes and moving averages are known of it; the layers, the plain (not
L2-normalised) codes and their revival are ours.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from bevt_lib.base import distributed, trainable
from bevt_lib.tokenizers.base import CHUNK, FrozenTokenizer, TrainableTokenizer, to_unit

DECAY = 0.99  # of the codes' moving averages, per step; VQ-VAE, appendix A.1
COMMITMENT = 0.25  # weight; VQ-VAE, section 3.2
DEAD = 0.05  # a code is dead below this share of the mean use; ours

Perceptual = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class PecoShape:
    """Architecture: ``hidden`` channels at half the resolution, twice as many below.

    ``blocks`` residual blocks at each resolution; ``vocab_size`` codes of ``code_dim`` numbers;
    ``factor`` pixels per id, a power of 2.
    """

    hidden: int
    blocks: int
    code_dim: int
    factor: int
    vocab_size: int


class Residual(nn.Module):
    """VQ-VAE's residual block: ReLU, 3x3, ReLU, 1x1."""

    def __init__(self, width: int):
        super().__init__()
        wide, narrow = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 1)
        self.body = nn.Sequential(nn.ReLU(), wide, nn.ReLU(), narrow)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def build(shape: PecoShape) -> tuple[nn.Module, nn.Module]:
    """Build encoder and decoder: pixels in -1..1 to features (N, code_dim, h, w), and back.

    Raises ValueError for a factor that isn't a power of 2.
    """
    levels = shape.factor.bit_length() - 1  # each halves the picture
    if levels < 1 or 2**levels != shape.factor:
        raise ValueError(f"tokens.factor must be a power of 2, got {shape.factor}")
    widths = [shape.hidden] + [2 * shape.hidden] * (levels - 1)
    down: list[nn.Module] = []
    for before, width in zip([3, *widths], widths, strict=False):
        down.append(nn.Conv2d(before, width, 4, stride=2, padding=1))
        down += [Residual(width) for _ in range(shape.blocks)]
    down += [nn.ReLU(), nn.Conv2d(widths[-1], shape.code_dim, 1)]
    up: list[nn.Module] = [nn.Conv2d(shape.code_dim, widths[-1], 3, padding=1)]
    for width, after in zip(widths[::-1], [*widths[-2::-1], 3], strict=True):
        up += [Residual(width) for _ in range(shape.blocks)]
        up += [nn.ReLU(), nn.Conv2d(width, 4 * after, 3, padding=1), nn.PixelShuffle(2)]
    return nn.Sequential(*down), nn.Sequential(*up)


def nearest(features: Tensor, codes: Tensor) -> Tensor:
    """Find each row's nearest code by Euclidean distance, in float32: (n, d) to int64 (n,)."""
    with torch.autocast("cuda" if features.is_cuda else "cpu", enabled=False):  # or on meta
        half = codes.square().sum(1) / 2
        return torch.cat([(half - f.float() @ codes.T).argmin(1) for f in features.split(1 << 16)])


def to_signed(pixels: Tensor) -> Tensor:
    """Scale pixels float (N, 3, h, w) from 0..1 to -1..1, in channels_last."""
    return (pixels * 2 - 1).contiguous(memory_format=torch.channels_last)


class PecoTokenizer(FrozenTokenizer):
    """PeCo's tokenizer: the code nearest to each cell's feature."""

    kind = "peco"
    decoder: nn.Module
    codes: Tensor

    def __init__(self, shape: PecoShape):
        super().__init__(*build(shape), asdict(shape))
        self.factor = shape.factor
        self.register_buffer("codes", torch.zeros(shape.vocab_size, shape.code_dim))

    def encode_chunk(self, pictures: Tensor) -> Tensor:
        features = self.encoder(to_signed(to_unit(pictures))).permute(0, 2, 3, 1)
        return nearest(features.flatten(0, 2), self.codes).view(features.shape[:3])

    def decode_chunk(self, ids: Tensor) -> Tensor:
        x = self.codes[ids].permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        return (self.decoder(x).float().clamp(-1, 1) + 1) * 127.5


class Peco(TrainableTokenizer):
    """The tokenizer in training.

    ``perceptual(painted, pixels)`` gives each picture's distance under a frozen network, both
    float (B, 3, h, w) in 0..1, and counts by ``weight``; None: no such term. It is not a module of
    the model, so that its weights are in no checkpoint.

    Codes follow the *global* batch: ``forward`` only gathers, and :meth:`update_codes` acts once
    after the step, so that neither accumulation nor the number of processes matters.
    """

    codes: Tensor
    uses: Tensor

    def __init__(self, shape: PecoShape, perceptual: Perceptual | None = None, weight: float = 1.0):
        super().__init__(*build(shape), shape.code_dim)
        self.shape, self.perceptual, self.weight = shape, perceptual, weight
        self.register_buffer("codes", torch.zeros(shape.vocab_size, shape.code_dim))
        self.register_buffer("uses", torch.zeros(shape.vocab_size))  # cells a step, moving average
        self._seen: list[tuple[Tensor, Tensor]] = []  # features and ids of this step so far

    @torch.no_grad()
    def start_codebook(self, pixels: Tensor, generator: torch.Generator) -> None:
        """Start the codes at cells of pictures, float (N, 3, h, w) in 0..1, drawn at random.

        Raises ValueError where there are fewer cells than codes.
        """
        cells = torch.cat([self._encode(part)[1] for part in pixels.split(CHUNK)])
        wanted = len(self.codes)
        if len(cells) < wanted:
            raise ValueError(f"{len(cells)} cells can't start {wanted} codes: give more pictures")
        chosen = torch.randperm(len(cells), generator=generator)[:wanted]
        self.codes.copy_(cells[chosen.to(cells.device)])
        self.uses.fill_(1.0)

    def _encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Give the feature map (B, d, h, w) and its cells (B * h * w, d), float32."""
        maps = self.encoder(to_signed(pixels)).float()
        return maps, rearrange(maps, "b d h w -> (b h w) d")

    def forward(self, batch: trainable.Batch, noise: trainable.Noise) -> dict[str, trainable.Term]:
        """Give the loss for {"picture": {"pixels"}}, float (B, 3, h, w) in 0..1; no noise.

        Squared error of pixels in -1..1, plus the perceptual distance, plus the commitment of the
        features to their codes; each a mean over the picture. Through the choice of a code the
        gradient passes as if features were painted themselves.
        """
        pixels = batch["picture"]["pixels"]
        maps, cells = self._encode(pixels)
        ids = nearest(cells.detach(), self.codes)
        if self.training:
            self._seen.append((cells.detach(), ids))
        chosen = rearrange(self.codes[ids], "(b h w) d -> b d h w", b=len(maps), h=maps.shape[2])
        painted = (self.decoder(maps + (chosen - maps).detach()).float() + 1) / 2
        errors = (painted - pixels).square().mean(dim=(1, 2, 3))
        commitment = (maps - chosen).square().mean(dim=(1, 2, 3))
        loss = 4 * errors + COMMITMENT * commitment
        logs = {"mse": errors.detach().sum(), "commitment": commitment.detach().sum()}
        if self.perceptual:
            distance = self.perceptual(painted, pixels)
            loss = loss + self.weight * distance
            logs["perceptual"] = distance.detach().sum()
        return {"picture": trainable.Term(loss.sum(), len(pixels), logs)}

    @torch.no_grad()
    def update_codes(self, generator: torch.Generator) -> dict[str, float]:
        """Move the codes to the features nearest to them since the last call, of all processes.

        Dead codes move onto cells of the global batch that ``generator``, the same on every
        process, draws. Returns the perplexity of this step's ids and the number of codes revived.
        """
        cells, ids = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
        self._seen.clear()
        found = torch.zeros(len(self.codes), 1 + cells.shape[1], device=cells.device)
        found.index_add_(0, ids, nn.functional.pad(cells, (1, 0), value=1.0))
        uses, sums = distributed.all_reduce_sum(found).split((1, cells.shape[1]), dim=1)
        kept, taken = DECAY * self.uses[:, None], (1 - DECAY) * uses
        weighted = kept * self.codes + (1 - DECAY) * sums
        self.codes.copy_(weighted / (kept + taken).clamp(min=1e-12))
        self.uses.copy_((kept + taken)[:, 0])
        dead = (self.uses < DEAD * self.uses.mean()).nonzero()[:, 0]
        everywhere = len(cells) * distributed.world_size()
        drawn = torch.randperm(everywhere, generator=generator)[: len(dead)]
        dead, mine = dead[: len(drawn)], drawn.to(cells.device) - distributed.rank() * len(cells)
        here = (mine >= 0) & (mine < len(cells))  # a process holds one slice of the global batch
        fresh = torch.where(here[:, None], cells[mine.clamp(0, len(cells) - 1)], 0.0)
        self.codes[dead] = distributed.all_reduce_sum(fresh)
        self.uses[dead] = self.uses.mean()
        share = (uses / uses.sum()).double()
        entropy = -(share * share.clamp(min=1e-12).log()).sum()
        return {"picture/perplexity": float(entropy.exp()), "picture/revived": float(len(dead))}

    def tokenizer(self) -> PecoTokenizer:
        state = {k: v for k, v in self.state_dict().items() if k != "uses"}
        return PecoTokenizer(self.shape).to(self.codes.device).fill(state)


def build_peco(shape: dict[str, Any], state: dict[str, Tensor]) -> PecoTokenizer:
    """Build a tokenizer from a file's architecture and tensors.

    Raises ValueError where they don't fit each other.
    """
    return PecoTokenizer(PecoShape(**shape)).fill(state)
