"""Both views against the released pipeline's numbers, and random crops against torchvision's."""

from bevt_lib.model import normalisation

import bevt_lib  # isort: skip  # noqa: F401  # its guard must run before torchvision is imported

import random

import cv2
import numpy as np
import pytest
import torch
from golden_numbers import CASES, arrays
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as tv

from bevt_lib.datasets import augment
from bevt_lib.tokenizers.base import to_unit

GOLDEN = pytest.mark.skipif("preprocess" not in CASES, reason="no preprocessing numbers here")


@pytest.fixture(scope="module")
def golden():
    return arrays(CASES["preprocess"]["file"])


def smooth_picture(offset: int, height: int, width: int) -> np.ndarray:
    """The MANIFEST's test picture of section k: uint8 (1, H, W, 3)."""
    rng = np.random.default_rng(CASES["preprocess"]["seed"] + offset)
    small = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3)).astype(np.float64)
    y = np.linspace(0, small.shape[0] - 1, height)
    x = np.linspace(0, small.shape[1] - 1, width)
    top, left = np.floor(y).astype(int), np.floor(x).astype(int)
    bottom = np.minimum(top + 1, small.shape[0] - 1)
    right = np.minimum(left + 1, small.shape[1] - 1)
    v, u = (y - top)[:, None, None], (x - left)[None, :, None]
    upper = small[top][:, left] * (1 - u) + small[top][:, right] * u
    lower = small[bottom][:, left] * (1 - u) + small[bottom][:, right] * u
    noise = rng.integers(-12, 13, (height, width, 3))
    return np.clip(np.rint(upper * (1 - v) + lower * v + noise), 0, 255).astype(np.uint8)[None]


def address_picture(height: int, width: int) -> np.ndarray:
    """A picture whose pixels say where they are: (y % 256, x % 256, y // 256 * 16 + x // 256)."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y % 256, x % 256, y // 256 * 16 + x // 256], -1).astype(np.uint8)[None]


def box_of(cut: np.ndarray) -> list[int]:
    """Read (left, top, right, bottom) back from a cut of an address picture."""
    (y0, x0, h0), (y1, x1, h1) = cut[0, 0, 0].astype(int), cut[0, -1, -1].astype(int)
    first = x0 + h0 % 16 * 256, y0 + h0 // 16 * 256
    return [*first, x1 + h1 % 16 * 256 + 1, y1 + h1 // 16 * 256 + 1]


@GOLDEN
def test_the_test_picture_is_the_manifests(golden):
    picture = smooth_picture(0, 224, 224)
    assert picture.astype(int).sum() == golden["input_sum"]
    assert np.array_equal(picture[0, :4, :4], golden["input_corner"])


@GOLDEN
def test_tokenizer_view_is_the_released_one(golden, parity):
    view = augment.tokenizer_input(smooth_picture(0, 224, 224), 112)
    off = np.abs(view[0].astype(int) - golden["lanczos_uint8"]).max()
    parity("k pixels (grey levels)", off, 1)  # OpenCV 4 and 5 differ by one
    mapped = to_unit(torch.from_numpy(view)).numpy() * 0.8 + 0.1
    assert mapped.shape == tuple(golden["mapped_shape"])
    assert np.abs(mapped[0, :, ::8, ::8] - golden["mapped_stride8"]).max() < 0.8 * 1.01 / 255


@GOLDEN
def test_model_view_is_normalised_as_released(golden, parity):
    pixels = torch.from_numpy(smooth_picture(0, 224, 224))[None]
    normal = normalisation.normalise(pixels)
    assert normal.shape == (1, 3, 1, 224, 224)
    ours = normal[0, :, 0, ::16, ::16].permute(1, 2, 0).numpy()
    parity("k normalised pixels", np.abs(ours - golden["normalized_stride16"]).max(), 1e-5)


@GOLDEN
@pytest.mark.parametrize(
    ("name", "short", "how"),
    [("resize_short256", 256, "bilinear"), ("resize_bicubic_short288", 288, "bicubic")],
)
def test_short_side_is_resized_as_released(golden, name, short, how, parity):
    large = augment.resize_short(smooth_picture(1, 240, 320), short, how)[0]
    assert large.shape == tuple(golden[f"{name}/shape"])
    off = np.abs(large[::8, ::8].astype(int) - golden[f"{name}/stride8"]).max()
    parity("k pixels (grey levels)", off, 1)


@GOLDEN
@pytest.mark.parametrize(("name", "size"), [("wide", (224, 298)), ("tall", (301, 224))])
def test_three_crops_are_the_released_ones(golden, name, size, parity):
    boxes = [box_of(cut) for cut in augment.three_crops(address_picture(*size), 224)]
    off = np.abs(np.array(boxes) - golden[f"threecrop_{name}/bboxes_xyxy"]).max()
    parity("k crop boxes (pixels)", off, 0)
    corners = [cut[0, :4, :4] for cut in augment.three_crops(smooth_picture(2, *size), 224)]
    assert np.array_equal(corners, golden[f"threecrop_{name}/top_left_4x4"])


@GOLDEN
def test_centre_crop_is_the_released_one(golden, parity):
    cut = augment.center_crop(address_picture(256, 341), 224)
    off = np.abs(np.array(box_of(cut)) - golden["centercrop/bbox_xyxy"]).max()
    parity("k crop boxes (pixels)", off, 0)
    assert box_of(augment.center_crop(address_picture(341, 256), 224)) == [16, 58, 240, 282]


@GOLDEN
def test_frames_land_in_the_released_layout(golden):
    """Frames numbered in reading order keep their numbers when channels come first."""
    views, channels, frames, height, width = golden["ncthw_layout/shape"]
    numbers = golden["ncthw_layout/frame_ids"]
    pixels = np.broadcast_to(
        numbers[:, :, None, None, None], (views, frames, height, width, channels)
    ).astype(np.uint8)
    normal = normalisation.normalise(torch.from_numpy(pixels))
    assert tuple(normal.shape) == (views, channels, frames, height, width)
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in (normalisation.MEAN, normalisation.STD))
    back = (normal * std + mean).round().int().numpy()
    assert (back == numbers[:, None, :, None, None]).all()


def test_random_crop_reaches_every_position_alike():
    picture = address_picture(7, 9)
    rng = np.random.default_rng(0)
    seen = np.zeros((3, 5), int)
    for _ in range(6000):
        left, top, right, bottom = box_of(augment.random_crop(picture, 5, rng))
        assert (right - left, bottom - top) == (5, 5)
        seen[top, left] += 1
    assert seen.min() > 0.8 * 400 and seen.max() < 1.2 * 400


def test_random_resized_crop_draws_torchvisions_boxes(monkeypatch):
    """Area, aspect and place of the boxes agree in distribution with an independent sampler."""
    ours, cut = [], augment.crop

    def note(frames, top, left, height, width):
        ours.append((top, left, height, width))
        return cut(frames, top, left, height, width)

    monkeypatch.setattr(augment, "crop", note)
    frames, rng = np.zeros((2, 96, 128, 3), np.uint8), np.random.default_rng(0)
    for _ in range(4000):
        assert augment.random_resized_crop(frames, 8, rng).shape == (2, 8, 8, 3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blank = torch.zeros(3, 96, 128)
        theirs = [
            RandomResizedCrop.get_params(blank, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)
        ]
    for mine, other in zip(np.array(ours).T, np.array(theirs).T, strict=True):
        quantiles = [5, 25, 50, 75, 95]
        assert np.abs(np.percentile(mine, quantiles) - np.percentile(other, quantiles)).max() <= 3.5
    aspects = [np.log(np.array(b)[:, 3] / np.array(b)[:, 2]).mean() for b in (ours, theirs)]
    assert abs(aspects[0] - aspects[1]) < 0.015  # 0.03 if the aspect itself were uniform


def test_random_resized_crop_falls_back_to_the_central_square(monkeypatch):
    strip = address_picture(4, 256)  # no box of 3:4 to 4:3 with 90 % of this area exists
    monkeypatch.setattr(augment, "AREA", (0.9, 1.0))
    cut = augment.random_resized_crop(strip, 4, np.random.default_rng(0))
    assert box_of(cut) == [126, 0, 130, 4]


class Dice:
    """A generator that gives what it was told: an order of operations and their factors."""

    def __init__(self, order, factors):
        self.order, self.factors = order, list(factors)

    def permutation(self, n):
        return self.order

    def uniform(self, low, high):
        assert (low, high) == pytest.approx((0.6, 1.4))
        return self.factors.pop(0)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_colour_jitter_is_torchvisions(order):
    picture = smooth_colours()
    factors = (0.8, 1.2, 0.7)
    x = torch.from_numpy(picture[0]).permute(2, 0, 1) / 255
    adjust = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)
    for operation, factor in zip(order, factors, strict=True):
        x = adjust[operation](x, factor)
    ours = augment.colour_jitter(picture, Dice(order, factors), 0.4)
    assert np.abs(ours[0] - x.permute(1, 2, 0).numpy() * 255).max() < 0.6  # rounded at the end


def smooth_colours() -> np.ndarray:
    """A picture of middling colours, so that torchvision's clipping between operations is idle."""
    rng = np.random.default_rng(3)
    return cv2.resize(rng.integers(80, 160, (5, 6, 3)).astype(np.uint8), (48, 40))[None]


def test_colour_jitter_clips_and_stays_uint8():
    picture = np.full((1, 4, 4, 3), 250, np.uint8)
    bright = augment.colour_jitter(picture, Dice((0, 1, 2), (1.4, 1.0, 1.0)), 0.4)
    assert bright.dtype == np.uint8 and (bright == 255).all()


def test_both_views_come_from_one_crop():
    frames = np.repeat(smooth_colours(), 3, axis=0)
    pixels, view = augment.pretraining_views(
        frames, 32, 16, (36, 44), np.random.default_rng(5), jitter=0.4
    )
    assert pixels.shape == (3, 32, 32, 3) and pixels.flags["C_CONTIGUOUS"]
    assert (pixels == pixels[:1]).all()  # frames of a clip share crop, flip and colour
    for frame, small in zip(pixels, view, strict=True):
        expected = cv2.resize(frame, (16, 16), interpolation=cv2.INTER_LANCZOS4)
        assert np.array_equal(small, expected)


def test_pretraining_sizes_and_flips_are_drawn_evenly():
    """On a ramp from left to right, the step between pixels tells the size, its sign the flip."""
    ramp = np.broadcast_to(np.arange(0, 240, 2, dtype=np.uint8)[:, None], (1, 60, 120, 3))
    shorts, flips, rng = [], 0, np.random.default_rng(0)
    for _ in range(600):
        pixels, _ = augment.pretraining_views(np.ascontiguousarray(ramp), 40, 20, (60, 63), rng)
        slope = (float(pixels[0, 0, 30, 0]) - float(pixels[0, 0, 10, 0])) / 20
        shorts.append(120 / abs(slope))
        flips += slope < 0
    assert 240 < flips < 360
    assert min(shorts) > 55 and max(shorts) < 68


def test_pretraining_sizes_include_both_ends(monkeypatch):
    seen, resize_short = [], augment.resize_short
    monkeypatch.setattr(
        augment,
        "resize_short",
        lambda frames, short, how: seen.append((short, how)) or resize_short(frames, short, how),
    )
    rng = np.random.default_rng(0)
    for _ in range(100):
        augment.pretraining_views(smooth_colours(), 32, 16, (40, 43), rng)
    assert set(seen) == {(short, "bicubic") for short in (40, 41, 42, 43)}


def test_crop_larger_than_the_frame_says_what_to_do():
    with pytest.raises(ValueError, match=r"64x64 crop doesn't fit frames of 40x48.*data\.short"):
        augment.center_crop(smooth_colours(), 64)
    with pytest.raises(ValueError, match="larger short side"):
        augment.random_crop(smooth_colours(), 64, np.random.default_rng(0))


def colourful(seed: int, height: int = 72, width: int = 96) -> np.ndarray:
    """A smooth picture of vivid colours, neither black nor white anywhere: uint8 (H, W, 3)."""
    small = np.random.default_rng(seed).integers(20, 236, (5, 6, 3)).astype(np.uint8)
    return np.clip(cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC), 15, 240)


def pillows_operations(frame: np.ndarray) -> dict[str, np.ndarray]:
    """Everything one operation of magnitude 7 may give, made by Pillow after the RandAugment paper.

    Both signs where there are two; a new corner is grey.
    """
    picture, width, height = Image.fromarray(frame), frame.shape[1], frame.shape[0]
    share, grey = 7 / 30, (128, 128, 128)
    made = {
        "identity": picture,
        "autocontrast": ImageOps.autocontrast(picture),
        "equalize": ImageOps.equalize(picture),
        "posterize": ImageOps.posterize(picture, 7),
        "solarize": ImageOps.solarize(picture, 196),
    }
    for sign in (-1, 1):
        shear = sign * 0.3 * share
        x, y = (sign * int(150 / 331 * side * share) for side in (width, height))
        made[f"rotate {sign}"] = picture.rotate(sign * 30 * share, fillcolor=grey)
        for name, matrix in (
            ("shear x", (1, shear, 0, 0, 1, 0)),
            ("shear y", (1, 0, 0, shear, 1, 0)),
            ("translate x", (1, 0, x, 0, 1, 0)),
            ("translate y", (1, 0, 0, 0, 1, y)),
        ):
            made[f"{name} {sign}"] = picture.transform(
                picture.size, Image.Transform.AFFINE, matrix, fillcolor=grey
            )
        for kind in ("Brightness", "Color", "Contrast", "Sharpness"):
            enhance = getattr(ImageEnhance, kind)(picture)
            made[f"{kind} {sign}"] = enhance.enhance(1 + sign * 0.9 * share)
    return {name: np.asarray(result).astype(int) for name, result in made.items()}


def test_rand_augment_does_pillows_operations_to_each_frame():
    """One operation at a time: some operation of Pillow's gives the same, in every frame."""
    clip = np.stack([colourful(0), colourful(1)])
    known = [pillows_operations(frame) for frame in clip]
    rng, seen = np.random.default_rng(0), set()
    for _ in range(250):
        out = augment.rand_augment(clip, 1, 7, rng)
        assert out.shape == clip.shape and out.dtype == np.uint8
        found = []
        for frame, candidates in zip(out, known, strict=True):
            gaps = {name: np.abs(made - frame).mean() for name, made in candidates.items()}
            found.append(min(gaps, key=gaps.__getitem__))
            assert gaps[found[-1]] < 0.2, gaps  # in grey levels: rounding
        assert found[0] == found[1]  # one operation and one sign for the whole clip
        seen.add(found[0])
    assert seen == set(known[0])


def global_states():
    state = np.random.get_state()
    return torch.get_rng_state().tolist(), state[1].tolist(), state[2], random.getstate()


@pytest.mark.parametrize(
    "change",
    [lambda x, rng: augment.rand_augment(x, 4, 7, rng), lambda x, r: augment.erase_box(x, 1.0, r)],
    ids=["rand_augment", "erase_box"],
)
def test_released_augmentations_are_keyed_and_alike_in_all_frames(change):
    still = np.repeat(colourful(2)[None], 3, axis=0)
    before, kept, outs = still.copy(), global_states(), []
    for seed in range(12):
        out, again = (change(still, np.random.default_rng(seed)) for _ in range(2))
        assert np.array_equal(out, again) and (out == out[:1]).all()
        outs.append(out)
    assert len({out.tobytes() for out in outs}) >= 11
    assert global_states() == kept and np.array_equal(still, before)


def test_boxes_are_erased_as_released():
    """A quarter of the clips; 2 % to a third of the frame; 0.3 to 1 / 0.3; zero once normalised."""
    black = np.zeros((2, 60, 80, 3), np.uint8)
    rng, areas, aspects, places = np.random.default_rng(0), [], [], []
    for _ in range(3000):
        out = augment.erase_box(black, 0.25, rng)
        y, x = np.nonzero(out[0].any(-1))
        if not y.size:
            assert (out == 0).all()
            continue
        box = out[:, y.min() : y.max() + 1, x.min() : x.max() + 1]
        values = normalisation.normalise(torch.from_numpy(box.copy())[None])
        assert values.abs().max() < 0.01 and np.count_nonzero(out.any(-1)) == box[..., 0].size
        height, width = box.shape[1:3]
        areas.append((height * width) / (60 * 80))
        aspects.append(height / width)
        places.append((y.min() / (60 - height), x.min() / (80 - width)))
    assert 0.22 < len(areas) / 3000 < 0.28  # two standard deviations are 0.016
    assert 0.018 < min(areas) < 0.03 and 0.3 < max(areas) < 0.345
    assert 0.26 < min(aspects) < 0.4 and 2.5 < max(aspects) < 3.9
    assert abs(np.log(aspects).mean()) < 0.1 and np.all(np.abs(np.mean(places, 0) - 0.5) < 0.05)


def test_augmentations_leave_the_rest_of_the_frame():
    clip = np.stack([colourful(3), colourful(4)])
    out = augment.erase_box(clip, 1.0, np.random.default_rng(0))
    erased = (out == np.array([124, 116, 104])).all(-1)
    assert 0.02 < erased[0].mean() < 0.34 and (erased[0] == erased[1]).all()
    assert np.array_equal(out[~erased], clip[~erased])
    assert augment.erase_box(clip, 0.0, np.random.default_rng(0)).tobytes() == clip.tobytes()
