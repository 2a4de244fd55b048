"""From decoded frames to what the model and the tokenizer see: both from one crop.

Frames are uint8 (T, H, W, 3), RGB; every function is pure and takes its generator. All frames of a
clip share the same crop, flip and colour. Resizing is OpenCV's, as in the released pipeline.
"""

import cv2
import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from bevt_lib.base.seeds import Purpose, seeded_globals
from bevt_lib.model.normalisation import MEAN

INTERPOLATION = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC,
                 "lanczos": cv2.INTER_LANCZOS4}  # fmt: skip
AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)  # of a random resized crop: share, width / height


def resize(frames: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """Resize to (height, width), frame by frame, without antialiasing."""
    if frames.shape[1:3] == size:
        return frames
    flag = INTERPOLATION[interpolation]
    out = np.empty((len(frames), *size, frames.shape[3]), dtype=np.uint8)
    for frame, resized in zip(frames, out, strict=True):
        cv2.resize(frame, (size[1], size[0]), dst=resized, interpolation=flag)
    return out


def resize_short(frames: np.ndarray, short: int, interpolation: str = "bilinear") -> np.ndarray:
    """Resize so that the short side is ``short`` pixels; the long side is rounded."""
    height, width = frames.shape[1:3]
    scale = short / min(height, width)
    return resize(frames, (int(height * scale + 0.5), int(width * scale + 0.5)), interpolation)


def crop(frames: np.ndarray, top: int, left: int, height: int, width: int) -> np.ndarray:
    """Cut out a box. Raises ValueError where it leaves the frame."""
    if top < 0 or left < 0 or top + height > frames.shape[1] or left + width > frames.shape[2]:
        what = f"a {height}x{width} crop doesn't fit frames of {frames.shape[1]}x{frames.shape[2]}"
        raise ValueError(f"{what}: resize to a larger short side first (--data.short)")
    return frames[:, top : top + height, left : left + width]


def random_crop(frames: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Cut a square of ``size`` pixels, every position equally likely.

    The released crop never draws the last position; ours does.
    """
    room = [max(side - size, 0) for side in frames.shape[1:3]]
    top, left = (int(rng.integers(0, r, endpoint=True)) for r in room)
    return crop(frames, top, left, size, size)


def center_crop(frames: np.ndarray, size: int) -> np.ndarray:
    """Cut the central square of ``size`` pixels."""
    top, left = ((side - size) // 2 for side in frames.shape[1:3])
    return crop(frames, top, left, size, size)


def three_crops(frames: np.ndarray, size: int) -> list[np.ndarray]:
    """Cut three squares along the long side, in the released order: start, end, middle.

    The end is twice the middle's offset, as released: in odd room one pixel is left over.
    """
    top, left = ((side - size) // 2 for side in frames.shape[1:3])
    return [crop(frames, top * steps, left * steps, size, size) for steps in (0, 2, 1)]


def random_resized_crop(frames: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Cut a box of random AREA and ASPECT and resize it to a square, bilinear.

    Ten tries, then the central square. Source: released fine-tuning configs.
    """
    height, width = frames.shape[1:3]
    for _ in range(10):
        pixels = rng.uniform(*AREA) * height * width
        aspect = np.exp(rng.uniform(*np.log(ASPECT)))
        w, h = round(float(np.sqrt(pixels * aspect))), round(float(np.sqrt(pixels / aspect)))
        if 0 < h <= height and 0 < w <= width:
            top = int(rng.integers(0, height - h, endpoint=True))
            left = int(rng.integers(0, width - w, endpoint=True))
            return resize(crop(frames, top, left, h, w), (size, size), "bilinear")
    return resize(center_crop(frames, min(height, width)), (size, size), "bilinear")


def flip(frames: np.ndarray) -> np.ndarray:
    """Mirror left and right."""
    mirrored = np.empty(frames.shape, dtype=np.uint8)
    for frame, out in zip(frames, mirrored, strict=True):
        cv2.flip(frame, 1, dst=out)  # 25 times as fast as NumPy
    return mirrored


def colour_jitter(frames: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Change brightness, contrast and saturation by factors in 1 -+ ``strength``, in random order.

    The released code truncates to uint8 at the end where ours rounds (half a grey level on average)
    and draws the order once per run.
    """
    x = frames.astype(np.float32)
    weights = np.array([0.299, 0.587, 0.114], dtype=np.float32)
    for operation in rng.permutation(3):
        factor = np.float32(rng.uniform(1 - strength, 1 + strength))
        grey = x @ weights
        x *= factor
        if operation == 1:
            x += grey.mean() * (1 - factor)
        elif operation == 2:
            for channel in range(3):  # faster than adding grey[..., None]
                x[..., channel] += grey * (1 - factor)
    return np.clip(np.rint(x), 0, 255).astype(np.uint8)


def rand_augment(
    frames: np.ndarray, operations: int, magnitude: int, rng: np.random.Generator
) -> np.ndarray:
    """Apply random operations of one magnitude (0 to 30), the same to all frames.

    APPROXIMATE: released is imgaug 0.4's RandAugment(n=4, m=7), this is torchvision's. At 7, turn,
    shear, enhancing factors and posterising agree; solarising starts at 197 there, 195.5 here;
    shifts are 7.7 % of the side there, 10.6 % here. imgaug also knows Invert, Cutout, FilterBlur
    and FilterSmooth, never repeats an operation, and before them always cuts up to 3.1 % off each
    side and mirrors every second clip.
    """
    clip = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
    transform = v2.RandAugment(operations, magnitude, fill=128)  # grey, as imgaug's
    with seeded_globals(int(rng.integers(2**32)), Purpose.CROP):
        return transform(tv_tensors.Video(clip)).permute(0, 2, 3, 1).numpy()


def erase_box(frames: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Paint over one random box, the same in all frames, in a ``share`` of the clips.

    The box is timm's: 2 % to a third of the area, aspect 0.3 to 1 / 0.3. Released: value 0 after
    ``normalise``. Ours: MEAN in whole grey levels before it, less than 0.01 off after it.
    """
    from timm.data.random_erasing import RandomErasing  # here: importing timm takes 0.4 s

    kept = torch.ones(1, *frames.shape[1:3])
    with seeded_globals(int(rng.integers(2**32)), Purpose.CROP):
        RandomErasing(share, device="cpu")(kept)
    box = (kept[0] == 0).numpy()
    if box.any():
        frames = frames.copy()
        frames[:, box] = np.rint(MEAN)
    return frames


def tokenizer_input(frames: np.ndarray, size: int) -> np.ndarray:
    """Shrink a crop to the tokenizer's square input: OpenCV LANCZOS4, no antialiasing, as released.

    PIL's Lanczos gives different pixels, and so different token ids.
    """
    return resize(frames, (size, size), "lanczos")


def pretraining_views(
    frames: np.ndarray, size: int, input_size: int, short: tuple[int, int],
    rng: np.random.Generator, *, jitter: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Cut one crop: (T, size, size, 3), and the same for the tokenizer (input_size for size).

    The short side is resized (bicubic) to a random integer in ``short``, both included; then
    colour jitter, random crop, a flip in every second clip. Source: released pretraining configs.
    """
    frames = resize_short(frames, int(rng.integers(*short, endpoint=True)), "bicubic")
    if jitter:
        frames = colour_jitter(frames, rng, jitter)
    frames = random_crop(frames, size, rng)
    if rng.random() < 0.5:
        frames = flip(frames)
    pixels = np.ascontiguousarray(frames)
    return pixels, tokenizer_input(pixels, input_size)


def one_thread(worker: int) -> None:
    """Keep OpenCV to the loader process it runs in: its threads don't survive a fork."""
    cv2.setNumThreads(0)
