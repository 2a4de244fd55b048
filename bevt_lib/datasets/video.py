"""Video files and picture files to pixels and back; which frames to take.

Pixels are uint8 (T, H, W, 3), RGB. PyAV decodes; of H.264 only the frames asked for and those that
others refer to: 21 ms for 16 of 300 frames of 340x256, decord 35 (``python -m bevt_lib.bench``).

``--data.decoder decord`` decodes the same frames by decord 0.6. PyAV opens and checks the file
first, and a file of which decord would give other frames is refused: MPEG transport streams,
interlaced video, odd sides with chroma at half the size, 10-bit 4:2:0, several video streams, clips
cut without re-encoding, and what decord can't open (AV1, GIF, APNG, raw H.264). Frames are equal
for H.264, HEVC, MPEG-4, VP8, VP9, MJPEG, FFV1, ProRes, MPEG-1 and 2, WMV, FLV and H.263 in mp4,
mov, mkv, webm, avi, flv, mpg and wmv, also turned and with a variable frame rate. decord loses
frames when it seeks within open GOPs (most HEVC) or without usable timestamps (avi, VP8, mpg): it
reads such files from their first frame on, which takes longer.
"""

import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps

from bevt_lib.base.files import replace_file

MIN_FRAME_SHARE = 0.8  # share of what the header promises; a file that holds less was cut short
# Codecs in which every packet is one shown frame and a key frame can be decoded by itself. Videos
# of others (GIF; VP8, whose packets may be hidden frames) are decoded whole.
ONE_BY_ONE = {"h264", "hevc", "vp9", "av1", "mpeg4"}
# Pixel formats that decord turns into the same RGB; all but the full-size yuv444p of even sides.
DECORD_FORMATS = {"yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv422p10le", "yuv444p"}
CHUNK = 16  # frames held at a time where decord reads from the start
Result = TypeVar("Result")
ChooseFrames = Callable[[int], Sequence[int] | np.ndarray]  # from how many there are


class BadFile(ValueError):
    """A file that can't be read: one line with the path, what is wrong, and what to do.

    ``kind`` is "missing", "truncated", "undecodable" or "hanging".
    """

    def __init__(self, message: str, kind: str = "undecodable"):
        super().__init__(message)
        self.kind = kind


class VideoError(BadFile):
    """A video that can't be read."""


class Video:
    """An open video: ``len(video)`` frames, ``video.frames(indices)`` decodes some of them.

    Opening reads all packets and decodes nothing. Raises VideoError for a file that is missing, not
    a valid video, truncated, or without frames.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise VideoError(f"{path}: no such video file; check the list and its root", "missing")
        self._pictures: list[av.VideoFrame] = []
        with self._one_line():
            self._container = av.open(str(self.path))
            if not self._container.streams.video:
                raise VideoError(f"{self.path}: holds no video; remove it from the list")
            self._stream = self._container.streams.video[0]
            self._stream.codec_context.thread_count = 1
            self._packets = [p for p in self._container.demux(self._stream) if p.size]
            self._shown = [p for p in self._packets if not (p.is_discard or p.is_corrupt)]
            # Frame count from the header; 0 if absent. Discarded: frames before the start of a clip
            # that was cut from a film without re-encoding.
            self.promised = self._stream.frames - sum(p.is_discard for p in self._packets)
            self._times = self._times_shown()
            if not self._times:
                self._pictures = list(self._play())
        self._check_share(len(self))

    def __del__(self) -> None:
        # PyAV's container and stream hold each other: 250 MiB waited for the garbage collector.
        if hasattr(self, "_container"):
            self._container.close()

    def __len__(self) -> int:
        return len(self._pictures or self._times)

    def frames(self, indices: Sequence[int] | np.ndarray, decoder: str = "auto") -> np.ndarray:
        """Decode the frames at ``indices`` (0 .. len - 1): uint8 (len(indices), H, W, 3)."""
        chosen = np.asarray(indices, dtype=np.int64)
        if not chosen.size or chosen.min() < 0 or chosen.max() >= len(self):
            raise VideoError(
                f"{self.path}: frames {chosen.tolist()}: choose from 0..{len(self) - 1}"
            )
        unique, places = np.unique(chosen, return_inverse=True)
        if decoder == "decord":  # "auto" means PyAV: in bench 1.5 to 1.7 times as fast
            return self._by_decord(unique)[places]
        with self._one_line():
            pictures = self._decode(unique)
        self._check_sizes({(p.width, p.height) for p in pictures})
        convert = VideoReformatter()
        pixels = [_pixels(picture, convert) for picture in pictures]
        return np.array([pixels[place] for place in places])

    def count(self) -> int:
        """Decode every frame, keep none, and count them. Raises VideoError as opening does."""
        with self._one_line():
            sizes = [(p.width, p.height) for p in self._pictures or self._play()]
        self._check_share(len(sizes))
        self._check_sizes(set(sizes))
        return len(sizes)

    def _times_shown(self) -> list[int]:
        """List the times at which frames are shown; [] where the packets don't say."""
        times = {p.pts for p in self._shown if p.pts is not None}
        known = self._stream.codec_context.codec.canonical_name in ONE_BY_ONE
        known = known and self._container.format.name != "avi"  # its timestamps are decoding times
        return sorted(times) if known and len(times) == len(self._shown) else []

    def _decode(self, chosen: np.ndarray) -> list[av.VideoFrame]:
        """Decode the frames at ``chosen``, all different, from the key frame before the first."""
        if not self._pictures:
            times = [self._times[i] for i in chosen]
            wanted, first = set(times), min(times)
            keys = [i for i, p in enumerate(self._packets)
                    if p.is_keyframe and p.pts is not None and p.pts <= first]  # fmt: skip
            found: dict[int | None, av.VideoFrame] = {}
            for picture in self._play(max(keys, default=0), wanted):
                if picture.pts in wanted:
                    found[picture.pts] = picture
                    if len(found) == len(wanted):
                        return [found[time] for time in times]
            self._pictures = list(self._play())  # packet timestamps were wrong; decode everything
            if max(chosen) >= len(self._pictures):
                raise self._damaged(f"it ends after {len(self._pictures)} frames", "truncated")
        return [self._pictures[i] for i in chosen]

    def _play(self, start: int = 0, wanted: set[int] | None = None) -> Iterator[av.VideoFrame]:
        """Decode from packet ``start`` on, in the order shown.

        Of H.264, frames at times not ``wanted`` may be skipped where no other refers to them.
        """
        context = self._stream.codec_context
        context.flush_buffers()
        skip = wanted is not None and context.codec.canonical_name == "h264"
        for packet in [*self._packets[start:], None]:
            needed = not skip or packet is None or packet.pts in (wanted or ())
            context.skip_frame = "DEFAULT" if needed else "NONREF"
            yield from (p for p in context.decode(packet) if not p.is_corrupt)

    def _by_decord(self, unique: np.ndarray) -> np.ndarray:
        """Decode the frames at ``unique``, ascending, by decord; see the module's docstring.

        Raises VideoError for a file of which decord would give other frames than PyAV, or none.
        """
        decord = import_decord()
        context = self._stream.codec_context
        pixels = str(context.format and context.format.name)
        odd = pixels != "yuv444p" and (context.width % 2 or context.height % 2)
        try:
            reader = decord.VideoReader(str(self.path), num_threads=1)
            unlike = {
                "an MPEG transport stream": self._container.format.name == "mpegts",
                "several video streams": len(self._container.streams.video) > 1,
                "interlaced": context.field_order > 1,  # 0: unknown, 1: progressive
                f"pixel format {pixels}": pixels not in DECORD_FORMATS,
                f"odd sides, {context.width}x{context.height}": odd,
                f"it counts {len(reader)} frames, not {len(self)}": len(reader) != len(self),
            }
            if any(unlike.values()):
                reasons = ", ".join(reason for reason, holds in unlike.items() if holds)
                raise VideoError(f"{self.path}: decord reads this kind of video differently from "
                                 f"PyAV ({reasons}): set --data.decoder pyav")  # fmt: skip
            if self._times and self._gops_are_closed():
                return reader.get_batch(unique).asnumpy()
            parts = []
            for start in range(0, int(unique[-1]) + 1, CHUNK):
                chunk = np.arange(start, min(start + CHUNK, len(self)))
                parts.append(reader.get_batch(chunk).asnumpy()[np.isin(chunk, unique)])
            return np.concatenate(parts)
        except decord.DECORDError:
            what = "decord can't read this video: set --data.decoder pyav"
            raise VideoError(f"{self.path}: {what}") from None

    def _gops_are_closed(self) -> bool:
        """Say whether all frames behind a key frame in the file are also shown after it."""
        times = np.array([p.pts for p in self._shown])
        first_shown = np.minimum.accumulate(times[::-1])[::-1]  # of a packet and all behind it
        return bool((first_shown >= times)[[p.is_keyframe for p in self._shown]].all())

    def _check_share(self, held: int) -> None:
        """Raise VideoError where there is no frame, or fewer than MIN_FRAME_SHARE of them."""
        if not held:
            raise VideoError(f"{self.path}: holds no video frame; remove it from the list")
        share = held / self.promised if self.promised > 0 else 1.0
        if self.promised <= 0 and self._container.duration:  # by the seconds that it promises
            ends = [p.pts + (p.duration or 0) for p in self._packets if p.pts is not None]
            end = max(ends, default=0) * float(self._stream.time_base or 0)
            begin = (self._container.start_time or 0) / av.time_base
            share = (end - begin) / (self._container.duration / av.time_base)
        if share < MIN_FRAME_SHARE:
            raise self._damaged(f"only {share:.0%} of it is there", "truncated")

    def _check_sizes(self, sizes: set[tuple[int, int]]) -> None:
        if len(sizes) > 1:
            raise self._damaged(f"frames of several sizes, {sizes}")

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        """Raise errors of FFmpeg as a VideoError."""
        try:
            yield
        except (av.FFmpegError, OSError) as error:
            raise self._damaged(error.strerror or str(error)) from None

    def _damaged(self, reason: str, kind: str = "undecodable") -> VideoError:
        what = f"is not a valid video, damaged or truncated ({reason})"
        return VideoError(f"{self.path}: {what}; copy it again or remove it from the list", kind)


def with_timeout(seconds: float, work: Callable[[], Result], path: Path) -> Result:
    """Do ``work`` on a file in a thread that is abandoned after ``seconds`` (0: never).

    FFmpeg and Pillow release the GIL while they read and decode, so that a stalled disk or an
    endless loop in a decoder is noticed; it keeps its thread and memory. Not caught: a decoder that
    crashes, which ends its process (``check_data`` finds it). Costs about 0.1 ms. Raises BadFile
    when the time is over, else what ``work`` raises.
    """
    if not seconds:
        return work()
    outcome: Future[Result] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome.done():
        fix = "copy it again, remove it from the list, or set a longer --data.timeout"
        raise BadFile(f"{path}: not read after {seconds:g} s; {fix}", "hanging")
    return outcome.result()


def import_decord() -> Any:
    """Import decord, without its log. Raises ValueError where it isn't installed."""
    try:
        import decord  # here: it has no wheel for some machines
    except ImportError:
        what = "decord isn't installed (pip has none for arm64): use auto or pyav"
        raise ValueError(f"--data.decoder decord: {what}") from None
    decord.logging.set_level(decord.logging.QUIET)
    return decord


def read_frames(
    path: Path, choose: ChooseFrames, timeout: float = 0.0, decoder: str = "auto"
) -> np.ndarray:
    """Decode the frames ``choose(number of frames)`` of a video: uint8 (T, H, W, 3).

    Raises BadFile for a file that can't be decoded, or not within ``timeout`` seconds (0: any).
    """

    def work() -> np.ndarray:
        video = Video(path)
        return video.frames(choose(len(video)), decoder)

    return with_timeout(timeout, work, path)


def _pixels(picture: av.VideoFrame, convert: VideoReformatter) -> np.ndarray:
    """Convert a YUV picture to RGB (H, W, 3), the right way up, as decord does."""
    # One thread: by default PyAV starts one per core for every picture, several ms each.
    rgb = convert.reformat(picture, format="rgb24", threads=1).to_ndarray()
    return np.rot90(rgb, picture.rotation // 90)


def write_video(path: str | Path, frames: np.ndarray, *, fps: int = 8, crf: int = 18) -> None:
    """Write uint8 (T, H, W, 3) as H.264 (yuv420p), atomically; the same frames give the same bytes.

    Raises ValueError for other shapes and for odd sides.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise ValueError(f"frames must be uint8 (T, H, W, 3), got {frames.dtype} {frames.shape}")
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"H.264 needs even sides, got {height}x{width}: crop or resize first")
    convert = VideoReformatter()
    with replace_file(Path(path)) as part, av.open(str(part), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.thread_count = 1
        stream.options = {
            "crf": str(crf), "preset": "veryfast", "threads": "1",
            # x264's look-ahead gave different bytes for the same frames (measured): off.
            "x264-params": "rc-lookahead=0:sync-lookahead=0:mbtree=0:cpu-independent=1",
        }  # fmt: skip
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture = convert.reformat(picture, format="yuv420p", threads=1)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def read_image(path: str | Path) -> np.ndarray:
    """Read a picture file: uint8 (1, H, W, 3), turned as its EXIF data say.

    Raises BadFile for a file that is missing, not a valid picture, or truncated. (By Pillow: the
    same pixels as OpenCV, which up to version 4 fills missing parts with grey.)
    """
    try:
        with Image.open(path) as picture:
            return np.array(ImageOps.exif_transpose(picture).convert("RGB"))[None]
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or "another kind of file, damaged or truncated"
        kind = "truncated" if "truncated" in str(error) else "undecodable"  # Pillow's word
        kind = "missing" if isinstance(error, FileNotFoundError) else kind
        what = f"is not a readable picture ({reason})"
        raise BadFile(f"{path}: {what}; copy it again or remove it", kind) from None
