"""Which frames of a video to take."""

import numpy as np


def sample_frames(total: int, length: int, interval: int, rng: np.random.Generator) -> np.ndarray:
    """Choose a training clip: a random start, then every ``interval``-th frame: int64 (length,).

    The start is uniform in 0 .. max(total - length * interval, 0), both included; indices wrap
    around in a short video. Source: the released sampler.
    """
    start = int(rng.integers(0, max(total - length * interval, 0), endpoint=True))
    return (start + np.arange(length) * interval) % total


def eval_frames(total: int, length: int, interval: int, num_clips: int) -> np.ndarray:
    """Choose evenly spread test clips: int64 (num_clips, length), wrapping in a short video.

    Source: the released sampler in test mode, exactly.
    """
    span = length * interval
    starts = np.zeros(num_clips, dtype=np.int64)
    if total >= span:
        average = (total - span + 1) / num_clips
        starts = (np.arange(num_clips) * average + average / 2).astype(np.int64)
    return (starts[:, None] + np.arange(length) * interval) % total


def segments(total: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut a video into ``length`` equal segments: first and last frame of each, int64 (length,).

    Neighbours share a frame; those of a short video may hold one frame only. Source: the released
    SSv2 sampler, rounding halves to even as it does.
    """
    bounds = np.round((total - 1) / length * np.arange(length + 1)).astype(np.int64)
    return bounds[:-1], bounds[1:]


def uniform_frames(total: int, length: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """Choose one frame of each of ``length`` segments: int64 (length,).

    Any of them alike in training, the middle one without ``rng``. Source: as ``segments``.
    """
    first, last = segments(total, length)
    return (first + last) // 2 if rng is None else rng.integers(first, last, endpoint=True)
