"""Video files and picture files to pixels and back; which frames to take.

Pixels are uint8 (T, H, W, 3), RGB. PyAV decodes short videos whole, and whatever decord cannot read
(GIF, AV1); decord, where it has a wheel, finds its way in long ones. Both give the same pixels.
"""

import os
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps

try:
    import decord

    decord.logging.set_level(decord.logging.QUIET)
except ImportError:  # no wheel for this machine
    decord = None

# Frames up to which a video is decoded whole. Opening one of 16 frames of 112 px and reading 8 took
# 3.8 ms of one core so and 5.1 ms through decord's index; 16 of 480 frames took 64 ms and 41 ms.
SHORT = 64
WHOLE = 0.8  # share of what the header promises; a file that holds less was cut short
UNREADABLE = (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError)


class VideoError(ValueError):
    """A video that can't be read: one line with the path, what is wrong, and what to do."""


class Video:
    """An open video: ``len(video)`` frames, ``video.frames(indices)`` decodes some of them.

    Raises VideoError where the file is missing, no video, cut short, or without frames.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise VideoError(f"{path}: no such video file; check the list and its root folder")
        self._open(with_decord=decord is not None)

    def _open(self, *, with_decord: bool) -> None:
        """Index a long video with decord; decode any other whole, to YUV pictures."""
        self._reader, self._pictures = None, []
        try:
            with av.open(str(self.path)) as container:
                if not container.streams.video:
                    raise VideoError(f"{self.path}: holds no video; remove it from the list")
                stream = container.streams.video[0]
                promised = stream.frames  # 0 where the header doesn't say: webm, mkv
                long = with_decord and promised > SHORT
                packets = [] if long else list(container.demux(stream))
                if with_decord and max(promised, len(packets)) > SHORT:
                    self._reader = _index(self.path, promised)
                if self._reader is None:
                    stream.codec_context.thread_count = 1
                    packets = packets or list(container.demux(stream))
                    pictures = [p for packet in packets for p in packet.decode()]
                    self._pictures = [p for p in pictures if not p.is_corrupt]
                share = _share(len(self), container, packets)
        except (av.FFmpegError, OSError) as error:
            raise self._damaged(error.strerror or str(error)) from None
        if len(self) == 0:
            raise VideoError(f"{self.path}: holds no video frame; remove it from the list")
        if share < WHOLE:
            raise self._damaged(f"only {share:.0%} of it is there")

    def __len__(self) -> int:
        return len(self._reader if self._reader is not None else self._pictures)

    def frames(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Decode the frames at ``indices`` (0 .. len - 1): uint8 (len(indices), H, W, 3)."""
        chosen = np.asarray(indices, dtype=np.int64)
        if not chosen.size or chosen.min() < 0 or chosen.max() >= len(self):
            raise VideoError(
                f"{self.path}: frames {chosen.tolist()} asked for: choose from 0..{len(self) - 1}"
            )
        if self._reader is not None:
            try:
                return self._reader.get_batch(chosen.tolist()).asnumpy()
            except (decord.DECORDError, RuntimeError):
                self._open(with_decord=False)  # reads it, or says what is wrong
                if chosen.max() >= len(self):
                    raise self._damaged(f"it ends after {len(self)} frames") from None
        convert = VideoReformatter()
        unique, places = np.unique(chosen, return_inverse=True)
        return np.stack([_pixels(self._pictures[i], convert) for i in unique])[places]

    def _damaged(self, reason: str) -> VideoError:
        return VideoError(
            f"{self.path}: is no video, damaged or cut short ({reason}); copy it again or remove "
            "it from the list"
        )


def _index(path: Path, promised: int):
    """Open a video with decord; None where it can't (GIF, AV1) or where frames are missing.

    decord makes up what it can't decode at the end of a cut file; PyAV says so.
    """
    try:
        reader = decord.VideoReader(str(path), num_threads=1)
    except (decord.DECORDError, RuntimeError):
        return None
    return reader if promised in (0, len(reader)) else None


def _share(held: int, container: av.container.InputContainer, packets: list[av.Packet]) -> float:
    """Say how much of the frames, or else of the seconds, the header promises is there."""
    stream = container.streams.video[0]
    if stream.frames:
        # Discarded: before the start of a clip that was cut from a film without decoding it.
        return held / max(stream.frames - sum(p.is_discard for p in packets), 1)
    begin, seconds = ((t or 0) / av.time_base for t in (container.start_time, container.duration))
    ends = [p.pts + (p.duration or 0) for p in packets if p.pts is not None]
    end = max(ends, default=0) * float(stream.time_base or 0)
    return (end - begin) / seconds if seconds else 1.0


def _pixels(picture: av.VideoFrame, convert: VideoReformatter) -> np.ndarray:
    """Convert a YUV picture to RGB (H, W, 3), the right way up, as decord does."""
    # One thread: by default PyAV starts one per core for every picture, at several ms each.
    rgb = convert.reformat(picture, format="rgb24", threads=1).to_ndarray()
    return np.rot90(rgb, picture.rotation // 90)


def write_video(path: str | Path, frames: np.ndarray, *, fps: int = 8, crf: int = 18) -> None:
    """Write uint8 (T, H, W, 3) as H.264 (yuv420p), atomically; the same frames give the same bytes.

    Raises ValueError for other shapes and for odd sides.
    """
    path = Path(path)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise ValueError(f"frames must be uint8 (T, H, W, 3), got {frames.dtype} {frames.shape}")
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise ValueError(
            f"H.264 needs even sides, got {frames.shape[1]}x{frames.shape[2]}: crop or resize first"
        )
    part = path.with_name(f".{path.stem}.{os.getpid()}.part")
    convert = VideoReformatter()
    try:
        with av.open(str(part), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=Fraction(fps))
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuv420p"
            stream.thread_count = 1
            stream.options = {
                "crf": str(crf),
                "preset": "veryfast",
                "threads": "1",
                # x264's look-ahead gave other bytes for the same frames (measured): off.
                "x264-params": "rc-lookahead=0:sync-lookahead=0:mbtree=0:cpu-independent=1",
            }
            for frame in frames:
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                picture = convert.reformat(picture, format="yuv420p", threads=1)
                container.mux(stream.encode(picture))
            container.mux(stream.encode())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_image(path: str | Path) -> np.ndarray:
    """Read a picture file: uint8 (1, H, W, 3), turned as its EXIF data say.

    Raises ValueError where it is missing, no picture, or cut short. (Pillow: the same pixels as
    OpenCV, which up to version 4 fills what is missing with grey.)
    """
    try:
        with Image.open(path) as picture:
            return np.array(ImageOps.exif_transpose(picture).convert("RGB"))[None]
    except UNREADABLE as error:
        reason = getattr(error, "strerror", None) or "of another kind, damaged or cut short"
        raise ValueError(
            f"{path}: is no readable picture ({reason}); copy it again or remove it"
        ) from None


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
