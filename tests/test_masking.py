"""Masks against the released generators: sample by sample, and over 20,000 draws."""

from random import Random

import numpy as np
import pytest
import torch
from golden_numbers import CASES, arrays

from bevt_lib.model.masking import block_mask, mask_budget, mask_in_time, mask_on_grid, tube_mask


@pytest.mark.parametrize("case", CASES.get("masking", []), ids=lambda c: c["file"])
def test_released_samples_are_reproduced(case, parity):
    golden = arrays(case["file"])
    side, steps = case["input_size"], case["clip_len"] // case["temporal_scale"]
    settings = {"target": case["num_masking_patches"], "min_block": case["min_num_patches"]}
    rng = Random(case["seed"])
    length = tuple(case["masked_tube_range"])
    for expected, lifted in zip(golden["samples_input"], golden["samples_output"], strict=True):
        mask = tube_mask((steps, side, side), rng, length=length, **settings)
        assert np.array_equal(mask, expected.astype(bool))
        in_frames = mask_in_time(torch.from_numpy(mask)[None], case["temporal_scale"])[0]
        assert np.array_equal(in_frames.numpy(), lifted.astype(bool))
    rng = Random(case["seed2d"])
    for expected in golden["samples_2d"]:
        assert np.array_equal(block_mask((side, side), rng, **settings), expected.astype(bool))
    parity("f masks, sample by sample", 0, 0)


@pytest.mark.parametrize("case", CASES.get("masking", []), ids=lambda c: c["file"])
def test_distribution_matches_the_released_generators(case, parity):
    golden = arrays(case["file"])
    side, steps, draws = case["input_size"], case["clip_len"] // case["temporal_scale"], 5000
    settings = {"target": case["num_masking_patches"], "min_block": case["min_num_patches"]}
    rng = Random(12345)
    length = tuple(case["masked_tube_range"])
    masks = np.stack(
        [tube_mask((steps, side, side), rng, length=length, **settings) for _ in range(draws)]
    )
    ratios = masks.mean((1, 2, 3))
    five_sigma = 5 * float(golden["std_ratio"]) / np.sqrt(draws)
    assert abs(ratios.mean() - float(golden["mean_ratio"])) < five_sigma
    lengths = np.bincount(masks.any((2, 3)).sum(1), minlength=steps + 1) / draws
    expected = golden["hist_tube_len"] / golden["hist_tube_len"].sum()
    assert np.abs(lengths - expected).max() < 5 * np.sqrt(0.25 / draws)
    places = np.abs(masks.mean(0) - golden["mean_mask_per_position"])
    parity("f masks, share at a place", places.max(), 5 * np.sqrt(0.25 / draws))
    counts = [int(m.any(0).sum()) for m in masks]
    hist = np.bincount(counts, minlength=side * side + 1) / draws
    expected = golden["hist_masked_patches_per_masked_frame"]
    assert np.abs(hist - expected / expected.sum()).max() < 5 * np.sqrt(0.25 / draws)


def test_a_tube_is_one_block_mask_over_a_wrapped_run():
    wrapped = 0
    for seed in range(200):
        mask = tube_mask((8, 6, 6), Random(seed))
        steps = mask.any((1, 2))
        assert 4 <= steps.sum() <= 8
        block = mask.any(0)
        assert all(np.array_equal(m, block) for m in mask[steps])
        assert (np.diff(np.append(steps, steps[0]).astype(int)) != 0).sum() in (0, 2)
        wrapped += bool(steps[0] and steps[-1] and not steps.all())
    assert wrapped > 20


@pytest.mark.parametrize("grid", [(4, 4), (6, 6), (8, 6), (14, 14), (7, 20)])
def test_budget_holds_on_any_grid(grid):
    target, min_block = mask_budget(grid)
    counts = [int(block_mask(grid, Random(s)).sum()) for s in range(300)]
    assert max(counts) <= target == grid[0] * grid[1] // 2
    assert np.mean(counts) > 0.9 * target
    assert min_block >= 1


def test_mask_on_grid_agrees_with_slow_floor_indexing():
    mask = torch.rand(2, 3, 4, 5) < 0.5
    out = mask_on_grid(mask, (6, 9, 13))
    for d in range(6):
        for y in range(9):
            for x in range(13):
                assert torch.equal(out[:, d, y, x], mask[:, d * 3 // 6, y * 4 // 9, x * 5 // 13])


@pytest.mark.parametrize(
    "call",
    [
        lambda: block_mask((1, 4), Random(0)),
        lambda: block_mask((4, 4), Random(0), target=17),
        lambda: block_mask((4, 4), Random(0), min_block=0),
        lambda: tube_mask((4, 4, 4), Random(0), length=(0.8, 0.5)),
    ],
)
def test_bad_values_are_refused(call):
    with pytest.raises(ValueError, match=r"got|use"):
        call()
