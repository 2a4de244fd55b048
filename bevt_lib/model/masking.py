"""What BEVT hides: blocks of an image, tubes of a clip. True = hidden.

Pure functions of a shape and a ``random.Random``. Source: BEVT section 3.2 and the released
generators (block-wise masks as in BEiT), whose draws they reproduce call by call; other grids than
14 x 14 take their parameters from :func:`mask_budget`, our choice.
"""

import math
from random import Random

import numpy as np
import torch
import torch.nn.functional as F

from bevt_lib.base.config import require

RELEASED_CELLS = 14 * 14
RELEASED_MIN_BLOCK = 16  # of 196 cells
ASPECT = (0.3, 1 / 0.3)  # height / width of a block, log-uniform
ATTEMPTS = 10  # tries to place one block before giving up


def mask_budget(grid: tuple[int, int]) -> tuple[int, int]:
    """Return (cells to hide, smallest block) for a (height, width) grid: 98 and 16 at 14 x 14.

    Half of the cells; the smallest block keeps the released share of 16 / 196 (our choice for
    other grids).
    """
    cells = grid[0] * grid[1]
    return cells // 2, max(1, round(cells * RELEASED_MIN_BLOCK / RELEASED_CELLS))


def block_mask(
    grid: tuple[int, int],
    rng: Random,
    *,
    target: int | None = None,
    min_block: int | None = None,
) -> np.ndarray:
    """Hide rectangular blocks until ``target`` cells are hidden or no further block fits.

    Returns bool (height, width), True = hidden; at most ``target`` cells, sometimes fewer.
    ``target`` and ``min_block`` (cells) default to :func:`mask_budget`. Raises ValueError for a
    grid or target that cannot be masked.
    """
    height, width = grid
    default_target, default_min_block = mask_budget(grid)
    target = default_target if target is None else target
    min_block = default_min_block if min_block is None else min_block
    cells = height * width
    require(min(grid) > 1, f"grid {height}x{width} is too small to hide blocks: use at least 2x2")
    require(0 < target <= cells, f"target must lie in 1..{cells} cells, got {target}")
    require(min_block >= 1, f"min_block must be at least 1 cell, got {min_block}")
    mask = np.zeros(grid, dtype=bool)
    hidden = 0
    while hidden < target:
        added = _add_block(mask, rng, min_block, target - hidden)
        if added == 0:
            break
        hidden += added
    return mask


def _add_block(mask: np.ndarray, rng: Random, min_block: int, budget: int) -> int:
    """Hide one more block of at most ``budget`` new cells in place; return how many are new."""
    height, width = mask.shape
    for _ in range(ATTEMPTS):
        area = rng.uniform(min_block, budget)  # bounds may be reversed: the draw lies between them
        aspect = math.exp(rng.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        h = round(math.sqrt(area * aspect))
        w = round(math.sqrt(area / aspect))
        if h >= height or w >= width:
            continue
        top = rng.randint(0, height - h)
        left = rng.randint(0, width - w)
        block = mask[top : top + h, left : left + w]
        new = block.size - int(block.sum())
        if 0 < new <= budget:
            block[:] = True
            return new
    return 0


def tube_mask(
    grid: tuple[int, int, int],
    rng: Random,
    *,
    length: tuple[float, float] = (0.5, 1.0),
    target: int | None = None,
    min_block: int | None = None,
) -> np.ndarray:
    """Hide one block mask through a run of time steps that wraps around the end of the clip.

    ``grid`` is (time steps, height, width) in tokens; ``length`` bounds the run as shares of the
    time steps (released: 0.5 to 1). Returns bool (time, height, width), True = hidden. Raises
    ValueError for shares outside 0 < low <= high <= 1.
    """
    steps, height, width = grid
    low, high = length
    require(0 < low <= high <= 1, f"tube length needs 0 < low <= high <= 1, got {length}")
    block = block_mask((height, width), rng, target=target, min_block=min_block)
    start = rng.randint(0, steps - 1)
    run = rng.randint(max(1, int(steps * low)), max(1, int(steps * high)))
    mask = np.zeros(grid, dtype=bool)
    mask[[(start + i) % steps for i in range(run)]] = block
    return mask


def mask_in_time(mask: torch.Tensor, frames_per_step: int) -> torch.Tensor:
    """Repeat each time step for its frames: (B, D, h, w) to (B, D * frames_per_step, h, w)."""
    return mask.repeat_interleave(frames_per_step, dim=1)


def mask_on_grid(mask: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
    """Resize a mask bool (B, D, h, w) to another (D, H, W) grid by nearest neighbour."""
    return F.interpolate(mask.float()[:, None], size=grid, mode="nearest")[:, 0].bool()
