"""Two trivial tokenizers of 8x8 cells to hold the others against: k-means and mean colours."""

import torch
from einops import rearrange
from torch import Tensor

from bevt_lib.tokenizers.dalle import FACTOR


def nearest_row(points: Tensor, rows: Tensor) -> Tensor:
    """Find the nearest of ``rows`` (K, d) to each of the points (n, d): int64 (n,)."""
    return torch.cat([torch.cdist(part, rows).argmin(1) for part in points.split(4096)])


def cells_of(pictures: Tensor) -> Tensor:
    """Cut uint8 pictures (N, h, w, 3) into 8x8 cells: float (cells, 192)."""
    return rearrange(pictures.float(), "n (h y) (w x) c -> (n h w) (y x c)", y=FACTOR, x=FACTOR)


def nearest_ids(pictures: Tensor, codes: Tensor) -> Tensor:
    """Give every 8x8 cell the index of the nearest code (K, 192): int64 (N, h / 8, w / 8)."""
    chosen = nearest_row(cells_of(pictures), codes)
    return chosen.view(-1, pictures.shape[1] // FACTOR, pictures.shape[2] // FACTOR)


def nearest_code(pictures: Tensor, codes: Tensor) -> Tensor:
    """Paint every 8x8 cell by the nearest of given codes (K, 192): uint8 like ``pictures``."""
    return _join(codes[nearest_ids(pictures, codes).flatten()], pictures.shape)


def mean_colours(pictures: Tensor) -> Tensor:
    """Paint every 8x8 cell in its mean colour: the trivial baseline."""
    cells = cells_of(pictures).view(-1, FACTOR * FACTOR, 3)
    return _join(cells.mean(1, keepdim=True).expand_as(cells).flatten(1), pictures.shape)


def _join(cells: Tensor, shape: torch.Size) -> Tensor:
    """Put cells (cells, 192) together again, as uint8 pictures of this shape."""
    sizes = {"n": shape[0], "h": shape[1] // FACTOR, "y": FACTOR, "x": FACTOR}
    pixels = cells.round().clamp(0, 255).to(torch.uint8)
    return rearrange(pixels, "(n h w) (y x c) -> n (h y) (w x) c", **sizes)
