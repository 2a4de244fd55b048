"""Video files and picture files to pixels and back; which frames to take.

Pixels are uint8 (T, H, W, 3), RGB. decord decodes where it has a wheel; PyAV elsewhere, and for
what decord cannot read (GIF, AV1).
"""

import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

try:
    import decord

    decord.logging.set_level(decord.logging.QUIET)
except ImportError:  # no wheel for this machine
    decord = None


class VideoError(ValueError):
    """A video that can't be read: one line with the path, what is wrong, and what to do."""


class Video:
    """An open video: ``len(video)`` frames, ``video.frames(indices)`` decodes some of them.

    Raises VideoError where the file is missing, no video, truncated, or without frames.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise VideoError(f"{path}: no such video file; check the list and its root folder")
        self._all: np.ndarray | None = None
        self._reader = None
        if decord is not None:
            try:
                self._reader = decord.VideoReader(str(path), num_threads=1)
            except (decord.DECORDError, RuntimeError):
                self._reader = None  # PyAV may still read it, or says what is wrong
        if self._reader is None:
            self._all = _decode_all(self.path)
        if len(self) == 0:
            raise VideoError(f"{path}: holds no video frame; remove it from the list")

    def __len__(self) -> int:
        return len(self._reader) if self._all is None else len(self._all)

    def frames(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Decode the frames at ``indices`` (0 .. len - 1): uint8 (len(indices), H, W, 3)."""
        indices = [int(i) for i in indices]
        if not indices or min(indices) < 0 or max(indices) >= len(self):
            raise VideoError(f"{self.path}: frames {indices} asked for, it holds {len(self)}")
        if self._all is not None:
            return self._all[indices]
        try:
            return self._reader.get_batch(indices).asnumpy()
        except (decord.DECORDError, RuntimeError, IndexError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else "decoding failed"
            raise VideoError(
                f"{self.path}: is damaged or cut short ({reason[:80]}); copy it again or remove "
                "it from the list"
            ) from None


def _decode_all(path: Path) -> np.ndarray:
    """Decode every frame with PyAV."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise VideoError(f"{path}: holds no video stream; remove it from the list")
            pictures = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    except (av.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise VideoError(
            f"{path}: is no readable video ({reason}); copy it again or remove it from the list"
        ) from None
    return np.stack(pictures) if pictures else np.zeros((0, 1, 1, 3), np.uint8)


def write_video(path: str | Path, frames: np.ndarray, *, fps: int = 8, crf: int = 18) -> None:
    """Write uint8 (T, H, W, 3) as H.264 (yuv420p), atomically; the same frames give the same bytes.

    Raises ValueError for other shapes and for odd sides.
    """
    path = Path(path)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise ValueError(f"frames must be uint8 (T, H, W, 3), got {frames.dtype} {frames.shape}")
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise ValueError(f"H.264 needs even sides, got {frames.shape[1]}x{frames.shape[2]}")
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    with av.open(str(part), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        stream.options = {"crf": str(crf), "preset": "veryfast", "threads": "1"}
        for picture in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    os.replace(part, path)


def read_image(path: str | Path) -> np.ndarray:
    """Read a picture file: uint8 (1, H, W, 3). Raises ValueError where it is missing or broken."""
    try:
        content = np.fromfile(path, dtype=np.uint8)
        picture = cv2.imdecode(content, cv2.IMREAD_COLOR_RGB) if len(content) else None
    except (OSError, cv2.error):
        picture = None
    if picture is None:
        raise ValueError(f"{path}: is no readable picture; copy it again or remove it")
    return picture[None]


def sample_frames(total: int, length: int, interval: int, rng: np.random.Generator) -> np.ndarray:
    """Choose a training clip: a random start, then every ``interval``-th frame: int64 (length,).

    The start is uniform in 0 .. max(total - length * interval, 0), both included; indices wrap
    around in a short video. Source: the released sampler.
    """
    start = int(rng.integers(0, max(total - length * interval, 0), endpoint=True))
    return (start + np.arange(length) * interval) % total


def test_frames(total: int, length: int, interval: int, num_clips: int) -> np.ndarray:
    """Choose evenly spread test clips: int64 (num_clips, length), wrapping in a short video.

    Source: the released sampler in test mode, exactly.
    """
    span = length * interval
    starts = np.zeros(num_clips, dtype=np.int64)
    if total >= span:
        average = (total - span + 1) / num_clips
        starts = (np.arange(num_clips) * average + average / 2).astype(np.int64)
    return (starts[:, None] + np.arange(length) * interval) % total
