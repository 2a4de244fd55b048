"""Training DALL-E's discrete VAE: Gumbel-softmax relaxation, logit-Laplace pixels, KL to uniform.

Source: Ramesh et al. 2021 (DALL-E), section 2.1 and appendix A: temperature from 1 to 1/16, KL
weight rising to 6.6, the whole divided by the number of sub-pixels. The lesson's schedule lengths
are ours; ``presets.paper_dvae`` has the paper's.
"""

import copy
import math

import dall_e
import torch
from torch import Tensor, nn

from bevt_lib.base.trainable import Batch, Noise, Term
from bevt_lib.tokenizers import base, baselines, dalle

SUBPIXELS_PER_CELL = dalle.FACTOR**2 * 3
PAINT_SCALE = 100.0  # brings squared errors of pixels in 0..1 to the size of the other losses


class DVAE(base.TrainableTokenizer):
    """The tokenizer in training: relaxed ids instead of hard ones, so that gradients pass.

    ``grid`` is the (height, width) of the id grid that training pictures give; it sets how much
    noise a picture needs. ``schedule`` anneals "temperature", "kl_weight" and "balance_weight",
    each (start, end, steps in between). The last weighs the divergence of the *average*
    distribution over the batch's cells from the uniform one, the part of the KL that keeps all ids
    in use, apart from the part that blurs each cell. Our aid for short runs: without it a tenth of
    the ids were used. The average is taken per micro-batch, so here alone the number of processes
    changes the objective a little.

    ``quick_start`` is ours, for short runs on few layers: ids start at k-means centres, see
    :meth:`start_codebook`, and residual branches, which paint all detail inside a cell, at full
    size, where DALL-E's blocks scale theirs down by layers squared.
    """

    encoder: dall_e.Encoder
    leaves_out = True  # a step with "decoder_only" leaves the encoder out: distributed.replicate

    def __init__(
        self, encoder: dall_e.Encoder, decoder: dall_e.Decoder, grid: tuple[int, int],
        schedule: dict[str, tuple[float, float, float]], quick_start: bool = True,
    ):  # fmt: skip
        super().__init__(encoder, decoder, encoder.vocab_size)
        for block in self.modules():
            if quick_start and isinstance(block, dalle.BLOCKS):
                block.res_path.conv_4.w.data.div_(block.post_gain)
        self.start_pictures = base.START_PICTURES if quick_start else 0
        self.vocab_size, self.schedule = encoder.vocab_size, schedule
        self.noise_sizes = {"picture": self.vocab_size * grid[0] * grid[1]}

    @torch.no_grad()
    def start_codebook(self, pixels: Tensor, generator: torch.Generator, gap: float = 12.0) -> None:
        """Start the ids at the k-means centres of the untrained encoder's features.

        Every id then stands for some cells from the first step. ``pixels``: float (N, 3, h, w) in
        0..1; ``gap`` is the median lead of the best logit over the middle one. Our choice.
        """
        output = self.encoder.blocks[-1]
        features = output.relu(self.encoder.blocks[:-1](dall_e.map_pixels(pixels)))
        features = features.permute(0, 2, 3, 1).flatten(0, 2)
        centre = features.mean(0)
        codes = kmeans(features - centre, self.vocab_size, generator)
        scores = (features - centre) @ codes.T - codes.square().sum(1) / 2
        scale = gap / (scores.max(1).values - scores.median(1).values).median()
        output.conv.w.copy_((codes * scale)[:, :, None, None])
        output.conv.b.copy_(-scale * (codes @ centre + codes.square().sum(1) / 2))

    def schedule_at(self, step: int, cycle: int) -> dict[str, float]:
        """Anneal; the second cosine has no noise, the third trains the decoder alone."""
        annealed = {k: anneal(step, *span) for k, span in self.schedule.items()}
        return {**annealed, "noise_scale": float(cycle == 0), "decoder_only": cycle == 2}

    def tokenizer(self) -> dalle.DalleTokenizer:
        return dalle.DalleTokenizer(copy.deepcopy(self.encoder), copy.deepcopy(self.decoder))

    def forward(self, batch: Batch, noise: Noise) -> dict[str, Term]:
        """Give the loss for {"picture": {"pixels", "schedule": {"temperature", "noise_scale",
        "decoder_only", "kl_weight", "balance_weight"}}}.

        "pixels": float (B, 3, h, w) in 0..1. ``noise["picture"]``: uniform (B, vocab * h/8 * w/8),
        turned into Gumbel noise, so that each picture's draw is its own whatever the batch;
        "noise_scale" 1 is the objective, 0 later steps, in which ids are chosen as in use. With
        "decoder_only" the encoder is left as it is, and the decoder learns to paint the chosen
        ids with the least squared error: a last touch of ours, which no id depends on.
        """
        part, now = batch["picture"], batch["picture"]["schedule"]
        # Name each cell.
        target = dall_e.map_pixels(part["pixels"]).contiguous(memory_format=torch.channels_last)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not now["decoder_only"]):
            logits = self.encoder(target).float()
        # Paint the cells: from the chosen ids alone, or from a share of each id.
        if now["decoder_only"]:
            chosen = nn.functional.one_hot(logits.argmax(dim=1), self.vocab_size)
            mean, log_spread = (
                self.decoder(chosen.permute(0, 3, 1, 2).float()).float().chunk(2, dim=1)
            )
            error = (dalle.expected_pixels(mean, log_spread) - target).square()
            pixels = error.mean(dim=(1, 2, 3)) * PAINT_SCALE
        else:
            gumbel = -(-noise["picture"].clamp(1e-9, 1 - 1e-7).log()).log().view(logits.shape)
            shares = (logits + gumbel * now["noise_scale"]) / now["temperature"]
            mean, log_spread = self.decoder(shares.softmax(dim=1)).float().chunk(2, dim=1)
            pixels = logit_laplace_nll(target, mean, log_spread).mean(dim=(1, 2, 3))
        # Keep all ids in use: in each cell, and on average over the cells.
        divergence = kl_to_uniform(logits).mean(dim=(1, 2))
        average = logits.softmax(dim=1).mean(dim=(0, 2, 3))
        imbalance = (average * average.clamp(min=1e-9).log()).sum() + math.log(self.vocab_size)
        balance = 0.0 if now["decoder_only"] else now["balance_weight"]
        loss = (pixels + now["kl_weight"] / SUBPIXELS_PER_CELL * divergence).sum()
        loss = loss + balance * imbalance * len(target)
        painted = dall_e.unmap_pixels(torch.sigmoid(mean.detach()))
        error = (painted - part["pixels"]).square().mean(dim=(1, 2, 3)).sum()
        logs = {"mse": error, "kl": divergence.detach().sum(),
                "imbalance": imbalance.detach() * len(target)}  # fmt: skip
        return {"picture": Term(loss, len(target), logs)}


def kmeans(points: Tensor, number: int, generator: torch.Generator, rounds: int = 12) -> Tensor:
    """Lloyd's algorithm from random points: (n, d) to (number, d); empty cells keep their place."""
    centres = points[torch.randperm(len(points), generator=generator)[:number]].clone()
    for _ in range(rounds):
        nearest = baselines.nearest_row(points, centres)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        counts = torch.bincount(nearest, minlength=number)[:, None]
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return centres


def logit_laplace_nll(target: Tensor, mean: Tensor, log_spread: Tensor) -> Tensor:
    """Negative log-likelihood of mapped pixels in (0, 1) under DALL-E's logit-Laplace density."""
    log_spread = log_spread.clamp(min=-5.0)
    distance = (torch.logit(target) - mean).abs() * torch.exp(-log_spread)
    return distance + log_spread + (2 * target * (1 - target)).log()


def kl_to_uniform(logits: Tensor) -> Tensor:
    """Divergence of each cell's ids from uniform use, nats: (B, V, h, w) to (B, h, w)."""
    log_p = logits.log_softmax(dim=1)
    return (log_p.exp() * log_p).sum(dim=1) + math.log(logits.shape[1])


def anneal(step: int, start: float, end: float, steps: float) -> float:
    """Move from ``start`` to ``end`` along a half cosine over the first ``steps``, and stay."""
    done = min(1.0, step / max(1.0, steps))
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * done))
