"""Reading and writing video and pictures; bad files end in one clear line."""

import gc
import os
import re
import struct
import sys
import threading
import time
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from golden_numbers import CASES, arrays
from PIL import Image

from bevt_lib.base.files import data_folder
from bevt_lib.datasets import video
from bevt_lib.datasets.sampling import eval_frames, sample_frames, segments, uniform_frames
from bevt_lib.datasets.video import (
    BadFile,
    Video,
    read_frames,
    read_image,
    with_timeout,
    write_video,
)

FILM = data_folder() / "film" / "city.mp4"


@pytest.fixture
def clip():
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (12, 6, 8, 3), dtype=np.uint8)
    return small.repeat(16, 1).repeat(16, 2)


def test_a_clip_survives_writing_and_reading(tmp_path, clip):
    write_video(tmp_path / "a.mp4", clip, crf=10)
    film = Video(tmp_path / "a.mp4")
    read = film.frames(range(len(film)))
    assert read.shape == clip.shape and read.dtype == np.uint8
    assert np.abs(read.astype(int) - clip).mean() < 8


def test_the_same_frames_give_the_same_bytes(tmp_path, clip):
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, clip)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]


def test_a_film_is_read_as_by_a_plain_pyav_loop():
    chosen = [0, 5, 17, 3]
    with av.open(str(FILM)) as container:
        every = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    assert np.array_equal(Video(FILM).frames(chosen), np.stack(every)[chosen])


def test_gifs_are_read(tmp_path):
    pictures = [Image.new("RGB", (32, 24), (40 * i, 0, 0)) for i in range(5)]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:])
    film = Video(tmp_path / "a.gif")
    assert film.frames([0, len(film) - 1]).shape == (2, 24, 32, 3)


def bad_file(tmp_path, kind):
    path = tmp_path / "bad.mp4"
    if kind == "truncated":
        path.write_bytes(FILM.read_bytes()[:20_000])
    elif kind == "no video":
        path.write_text("<html>not found</html>")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "zero frames":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=8)
            stream.width = stream.height = 32
    return path


@pytest.mark.parametrize("kind", ["missing", "truncated", "no video", "empty", "zero frames"])
def test_a_bad_video_ends_in_one_clear_line(tmp_path, kind):
    path = bad_file(tmp_path, kind)
    with pytest.raises(BadFile) as error:
        film = Video(path)
        film.frames(range(len(film)))
    assert "bad.mp4" in str(error.value) and "\n" not in str(error.value)
    assert any(word in str(error.value) for word in ("check", "copy", "remove"))


def test_a_video_cut_off_in_its_middle_is_not_read_as_garbage(tmp_path):
    """Its index at the front, its frames cut: the frames that are gone must not be made up."""
    fast = tmp_path / "fast.mp4"
    with (
        av.open(str(FILM)) as source,
        av.open(str(fast), "w", options={"movflags": "faststart"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    whole = Video(fast)
    good = whole.frames([len(whole) - 1])
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(fast.read_bytes()[: fast.stat().st_size // 2])
    try:
        film = Video(cut)
        last = film.frames([len(film) - 1])
    except BadFile as error:
        assert "\n" not in str(error)
    else:
        assert len(film) < len(whole) or np.array_equal(last, good)


def test_bad_pictures_and_odd_sides_are_refused(tmp_path, clip):
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8 nothing")
    for name in ("a.jpg", "missing.jpg"):
        with pytest.raises(ValueError, match="not a readable picture"):
            read_image(tmp_path / name)
    with pytest.raises(ValueError, match="even sides"):
        write_video(tmp_path / "a.mp4", clip[:, :95])
    assert not list(tmp_path.glob("*.mp4"))


def frame_cases():
    golden = arrays(CASES["frames"]["file"]) if "frames" in CASES else {}
    return [k for k in golden if k.startswith("clip") and k.endswith("/test")]


@pytest.mark.parametrize("key", frame_cases())
def test_test_mode_frames_equal_the_released_sampler(key, parity):
    parts = dict(zip("LINT", (int(p.strip("clipntNT")) for p in key.split("/")[0].split("_")),
                     strict=True))  # fmt: skip
    expected = arrays(CASES["frames"]["file"])[key]
    mine = eval_frames(parts["T"], parts["L"], parts["I"], parts["N"])
    parity("g frames, test", np.abs(mine.reshape(-1) - expected).max(), 0)


@pytest.mark.parametrize("total, length, interval", [(10, 16, 8), (130, 16, 8), (300, 32, 2)])
def test_training_frames_start_anywhere_in_range(total, length, interval):
    rng = np.random.default_rng(0)
    draws = np.stack([sample_frames(total, length, interval, rng) for _ in range(3000)])
    room = max(total - length * interval, 0)
    assert draws[:, 0].min() == 0 and draws[:, 0].max() == room
    assert np.array_equal(draws, (draws[:, :1] + np.arange(length) * interval) % total)


def five_line_decode(path, indices):
    """Decode a video from its first frame, with PyAV's own conversion."""
    with av.open(str(path)) as container:
        every = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    return np.stack([every[i] for i in indices])


def encode(path, frames, codec="libx264", *settings, **more):
    """Write uint8 (T, H, W, 3) in any codec and container, see :func:`encode_once`.

    libx265 as PyAV brings it gives a packet that FFmpeg refuses in about one of 50 films, whatever
    its threads: then it encodes once more.
    """
    for attempt in range(5):
        try:
            return encode_once(path, frames, codec, *settings, **more)
        except av.FFmpegError:
            if codec != "libx265" or attempt == 4:
                raise


def encode_once(path, frames, codec, options=None, muxer=None, pixels="yuv420p", times=None):
    """``times``: of the frames, ms."""
    with av.open(str(path), "w", options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=25 if "mpeg" in codec else 8)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        stream.options = options or {}
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            if times is not None:
                picture.pts, picture.time_base = int(times[number]), Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def pan():
    """A pan of 100 frames over a smooth picture: more than the frames that are decoded whole."""
    small = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8)
    picture = cv2.resize(small, (128, 96))
    return np.stack([np.roll(picture, 2 * i, axis=1) for i in range(100)])


@pytest.mark.parametrize("length", [16, 100])
@pytest.mark.parametrize("gop", ["1", "12", "250"])
def test_decord_gives_the_same_pixels(tmp_path, pan, length, gop):
    """In any order, with repetitions, whatever the key frames."""
    decord = pytest.importorskip("decord")  # has no wheel for some machines
    encode(tmp_path / "a.mp4", pan[:length], options={"g": gop})
    chosen = [length - 1, 0, 3, 3, length // 2, 1]
    expected = five_line_decode(tmp_path / "a.mp4", chosen)
    reader = decord.VideoReader(str(tmp_path / "a.mp4"), num_threads=1)
    assert np.array_equal(reader.get_batch(chosen).asnumpy(), expected)
    for decoder in ("auto", "pyav", "decord"):
        film = Video(tmp_path / "a.mp4")
        assert len(film) == length and np.array_equal(film.frames(chosen, decoder), expected)
        assert np.array_equal(film.frames(chosen[::-1], decoder), expected[::-1])  # once more


X264 = [
    "bframes=8:b-pyramid=normal:ref=6:keyint=40", "b-pyramid=strict:bframes=5", "bframes=0",
    "open-gop=1:keyint=20", "intra-refresh=1:keyint=30", "interlaced=1:tff=1", "weightp=2:slices=4",
]  # fmt: skip
KINDS = [("a.mp4", "libx264", {"x264-params": params}) for params in X264]
KINDS += [
    ("a.mkv", "libx264", {"x264-params": "open-gop=1:keyint=20"}),
    ("a.ts", "libx264", {"x264-params": "interlaced=1:keyint=30"}),
    ("a.avi", "libx264", {"bf": "2"}),  # gives times of decoding
    (
        "a.mp4",
        "libx265",
        {"x265-params": "keyint=30:bframes=4:log-level=none"},
    ),
    ("a.mp4", "mpeg4", {"bf": "2", "g": "15"}),
    ("a.webm", "libvpx-vp9", {"deadline": "good", "cpu-used": "5", "auto-alt-ref": "1", "g": "40"}),
    ("a.webm", "libvpx", {"deadline": "good", "cpu-used": "5", "auto-alt-ref": "1"}),
    ("a.mkv", "ffv1", {}),
]


@pytest.mark.parametrize(("name", "codec", "options"), KINDS, ids=lambda v: str(v)[:40])
def test_frames_that_are_left_out_change_no_other(tmp_path, pan, name, codec, options):
    """Every kind of frame dependence and key frame, against decoding all."""
    if codec not in av.codecs_available:
        pytest.skip(f"PyAV comes without {codec}")
    encode(tmp_path / name, pan, codec, options)
    every = five_line_decode(tmp_path / name, range(100))
    film, rng = Video(tmp_path / name), np.random.default_rng(0)
    assert len(film) == film.count() == 100
    for number in range(20):
        first, step = rng.integers(0, 100), rng.integers(1, 9)
        chosen = (first + step * np.arange(1 + number)) % 100
        assert np.array_equal(film.frames(chosen), every[chosen])
        assert np.array_equal(Video(tmp_path / name).frames(chosen), every[chosen])


VP9 = {"deadline": "realtime", "cpu-used": "8"}
UNEVEN = np.cumsum(np.random.default_rng(1).integers(20, 200, 100))  # ms, of a variable frame rate
X265 = {"x265-params": "keyint=30:bframes=4:log-level=none"}
SAME = [  # beside KINDS: name, codec, options, and what else encode takes
    ("a.mov", "libx264", {"g": "12"}, {}),
    ("a.flv", "libx264", {"bf": "2", "g": "12"}, {}),
    ("a.mp4", "libx264", {"g": "10"}, {"muxer": {"movflags": "frag_keyframe+empty_moov"}}),
    ("a.mp4", "libx264", {"x264-params": "fullrange=on:colormatrix=bt709"}, {}),
    *(("a.mp4", "libx264", {}, {"pixels": pixels}) for pixels in ("yuvj420p", "yuv422p", "gray")),
    *((f"a.{kind}", "libx264", {"g": "12"}, {"times": UNEVEN}) for kind in ("mp4", "mkv")),
    ("a.mp4", "libx264", {}, {"times": 3000 + 125 * np.arange(100)}),  # starts late
    ("a.webm", "libvpx-vp9", VP9, {"times": UNEVEN}),
    ("a.mkv", "libx265", X265, {}),
    (
        "a.mp4",
        "libx265",
        {"x265-params": "open-gop=0:keyint=20:log-level=none"},
        {},
    ),
    ("a.avi", "mpeg4", {"bf": "2", "g": "15"}, {}),
    ("a.mpg", "mpeg1video", {}, {}),
    ("a.mpg", "mpeg2video", {"bf": "2"}, {}),
    ("a.avi", "mjpeg", {}, {"pixels": "yuvj422p"}),
    ("a.mov", "prores_ks", {}, {"pixels": "yuv422p10le"}),
    ("a.wmv", "wmv2", {}, {}),
    ("a.flv", "flv", {}, {}),
]
OTHER = [  # what decord reads differently, or not
    ("a.ts", "libx264", {"x264-params": "interlaced=1:keyint=30"}, {}, "an MPEG transport stream"),
    ("a.ts", "mpeg2video", {}, {}, "differently|can't read"),
    ("a.mp4", "libx264", {"x264-params": "interlaced=1:tff=1"}, {}, "interlaced"),
    ("a.mp4", "libx265", X265, {"pixels": "yuv420p10le"}, "pixel format yuv420p10le"),
    ("a.mp4", "libx264rgb", {}, {"pixels": "rgb24"}, "pixel format gbrp"),
    ("a.mp4", "libsvtav1", {"svtav1-params": "preset=10"}, {}, "can't read this video"),
    ("a.gif", "gif", {}, {"pixels": "rgb8"}, "can't read this video"),
    ("a.apng", "apng", {}, {"pixels": "rgb24"}, "can't read this video"),
]


def by_both(path, length, seed=0):
    """Read frames of many spreads by both decoders, each time from a file newly opened."""
    rng = np.random.default_rng(seed)
    for number in range(12):
        first, step = rng.integers(0, length), rng.integers(1, 9)
        chosen = (first + step * np.arange(1 + number)) % length
        ours, theirs = (Video(path).frames(chosen, decoder) for decoder in ("pyav", "decord"))
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("name", "codec", "options", "more"),
    [(*kind, {}) for kind in KINDS if "interlaced" not in str(kind)] + SAME,
    ids=lambda v: str(v)[:40],
)
def test_decord_reads_every_kind_it_can_as_pyav_does(tmp_path, pan, name, codec, options, more):
    """B-frames, open and closed GOPs, moving start times, whatever decord's own seeking loses."""
    pytest.importorskip("decord")  # has no wheel for some machines
    if codec not in av.codecs_available:
        pytest.skip(f"PyAV comes without {codec}")
    for length in (100, 20) if name[2:] in ("flv", "mpg", "wmv") or more else (100, 20, 1):
        encode(tmp_path / name, pan[:length], codec, options, **more)
        by_both(tmp_path / name, length)


@pytest.mark.parametrize("matrix", [(0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0), (-1, 0, 0, 1)])
def test_decord_turns_videos_as_pyav_does(tmp_path, pan, matrix):
    pytest.importorskip("decord")  # has no wheel for some machines
    encode(tmp_path / "a.mp4", pan[:20])
    set_matrix(tmp_path / "a.mp4", matrix)
    by_both(tmp_path / "a.mp4", 20)


@pytest.mark.parametrize(
    ("name", "codec", "options", "more", "reason"), OTHER, ids=lambda v: str(v)[:40]
)
def test_what_decord_reads_differently_is_refused(
    tmp_path, pan, capfd, name, codec, options, more, reason
):
    pytest.importorskip("decord")  # has no wheel for some machines
    if codec not in av.codecs_available:
        pytest.skip(f"PyAV comes without {codec}")
    encode(tmp_path / name, pan[:30], codec, options, **more)
    refused(tmp_path / name, reason)
    lines = capfd.readouterr().err.splitlines()
    assert not [line for line in lines if not line.startswith(("Svt", "x265"))]  # the encoders'


def refused(path, reason):
    """Assert that a file is read by PyAV, and refused by decord in one line."""
    read_frames(path, lambda total: [total - 1], 60)
    with pytest.raises(
        BadFile, match=rf"{path.name}: decord.*({reason}).*--data.decoder pyav"
    ) as e:
        read_frames(path, lambda total: [0, total - 1], 60, "decord")
    assert "\n" not in str(e.value)


def test_decord_refuses_odd_sides_and_several_streams(tmp_path, pan):
    pytest.importorskip("decord")  # has no wheel for some machines
    encode(tmp_path / "odd.webm", pan[:20, :95, :127], "libvpx-vp9", VP9)
    refused(tmp_path / "odd.webm", "odd sides, 127x95")
    encode(tmp_path / "full.mp4", pan[:20, :95, :127], pixels="yuv444p")
    by_both(tmp_path / "full.mp4", 20)
    with av.open(str(tmp_path / "two.mkv"), "w") as container:
        streams = [container.add_stream("libx264", rate=8) for _ in range(2)]
        for stream, side in zip(streams, (64, 96), strict=True):
            stream.height = stream.width = side
            stream.pix_fmt = "yuv420p"
        for frame in pan[:10]:
            for stream in streams:
                picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
                container.mux(stream.encode(picture.reformat(stream.width, stream.height)))
        for stream in streams:
            container.mux(stream.encode())
    refused(tmp_path / "two.mkv", "several video streams")


def test_bad_files_are_the_same_to_decord(tmp_path):
    """PyAV checks the file before decord opens it."""
    pytest.importorskip("decord")  # has no wheel for some machines
    for kind in ("missing", "truncated", "no video", "empty", "zero frames"):
        path = bad_file(tmp_path, kind)
        errors = []
        for decoder in ("pyav", "decord"):
            with pytest.raises(BadFile) as error:
                read_frames(path, lambda total: [0], 60, decoder)
            errors.append((str(error.value), error.value.kind))
        assert errors[0] == errors[1]
        path.unlink(missing_ok=True)


def test_decord_where_it_is_not_installed_is_no_bad_file(monkeypatch):
    monkeypatch.setitem(sys.modules, "decord", None)
    with pytest.raises(ValueError, match="decord isn't installed") as error:
        read_frames(FILM, lambda total: [0], 60, "decord")
    assert not isinstance(error.value, BadFile)
    assert read_frames(FILM, lambda total: [0], 60, "auto").shape[0] == 1


def test_frames_not_asked_for_are_neither_converted_nor_all_decoded(tmp_path, pan, monkeypatch):
    encode(tmp_path / "a.mp4", pan, options={"x264-params": "keyint=20:scenecut=0"})
    film, converted, decoded = Video(tmp_path / "a.mp4"), [], []
    pixels, play = video._pixels, Video._play
    monkeypatch.setattr(video, "_pixels", lambda *a: converted.append(1) or pixels(*a))
    monkeypatch.setattr(Video, "_play", lambda *a: (decoded.append(p.pts) or p for p in play(*a)))
    film.frames([70, 50, 90, 70])
    assert len(converted) == 3  # of different frames
    assert 5 < len(decoded) < 40  # not the 40 before key frame 40, nor B-frames of the other 60
    monkeypatch.undo()
    film.frames(range(100))


def test_frames_of_several_sizes_are_refused(tmp_path, pan):
    for name, frames in (("a.ts", pan[:20]), ("b.ts", pan[:20, :64, :64])):
        encode(tmp_path / name, frames)
    both = (tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes()
    (tmp_path / "both.ts").write_bytes(both)
    with pytest.raises(BadFile, match=r"both\.ts.*several sizes"):
        Video(tmp_path / "both.ts").count()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="Linux tells its open files")
def test_videos_are_closed_without_the_garbage_collector(tmp_path):
    (tmp_path / "cut.mp4").write_bytes(FILM.read_bytes()[:20_000])
    gc.collect()
    gc.disable()
    try:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            read_frames(FILM, lambda total: [total - 1], 60)
            with pytest.raises(BadFile):
                Video(tmp_path / "cut.mp4")
        assert len(os.listdir("/proc/self/fd")) <= before + 1
    finally:
        gc.enable()


def test_a_crowd_of_threads_is_not_left_behind():
    before = threading.active_count()
    assert [with_timeout(5, lambda n=n: n * n, FILM) for n in range(50)] == [
        n * n for n in range(50)
    ]
    assert threading.active_count() == before


def test_work_in_time_raises_its_own_errors():
    for seconds in (0, 5):
        with pytest.raises(ZeroDivisionError):
            with_timeout(seconds, lambda: 1 / 0, FILM)
        with pytest.raises(BadFile, match=r"gone\.mp4: no such video file"):
            read_frames(FILM.with_name("gone.mp4"), lambda n: [0], seconds)
    frames = read_frames(FILM, lambda total: [total - 1, 0], 60)
    assert np.array_equal(frames, five_line_decode(FILM, [len(Video(FILM)) - 1, 0]))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in files here")
@pytest.mark.parametrize("name", ["a.mp4", "a.jpg"])
def test_a_file_that_never_ends_is_given_up(tmp_path, monkeypatch, name):
    """A real hang inside FFmpeg and Pillow: a pipe of which only the beginning comes."""
    monkeypatch.setattr(Path, "is_file", lambda path: True)
    fifo = tmp_path / name
    os.mkfifo(fifo)
    writer = os.open(fifo, os.O_RDWR)
    os.write(writer, FILM.read_bytes()[:500] if name == "a.mp4" else b"\xff\xd8\xff\xe0")
    began = time.monotonic()
    with pytest.raises(BadFile, match=rf"{name}: not read after 0.5 s.*data\.timeout") as error:
        if name == "a.mp4":
            read_frames(fifo, lambda n: [0], 0.5)
        else:
            with_timeout(0.5, lambda: read_image(fifo), fifo)
    assert error.value.kind == "hanging" and 0.5 <= time.monotonic() - began < 5
    os.close(writer)  # ends the reading thread


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("missing", "missing"), ("truncated", "undecodable"), ("no video", "undecodable")],
)
def test_errors_tell_their_kind(tmp_path, kind, expected):
    with pytest.raises(BadFile) as error:
        Video(bad_file(tmp_path, kind))
    assert error.value.kind == expected
    with pytest.raises(BadFile) as error:
        read_image(bad_file(tmp_path, kind))
    assert error.value.kind == expected


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.webm", "libvpx-vp9"), ("a.mkv", "libx264"), ("a.avi", "mpeg4"), ("a.ts", "libx264")],
)
@pytest.mark.parametrize("length", [20, 80])
def test_other_containers_are_read(tmp_path, pan, name, codec, length):
    encode(tmp_path / name, pan[:length], codec)
    film = Video(tmp_path / name)
    assert len(film) == length
    assert np.array_equal(film.frames([length - 1, 4]),
                          five_line_decode(tmp_path / name, [length - 1, 4]))  # fmt: skip
    assert np.abs(film.frames([9])[0].astype(int) - pan[9]).mean() < 12


@pytest.mark.parametrize(
    ("name", "codec", "muxer"),
    [
        ("a.mp4", "libx264", {"movflags": "faststart"}),
        ("a.webm", "libvpx-vp9", {}),
        ("a.mkv", "libx264", {}),
        ("a.avi", "mpeg4", {}),
    ],
)
@pytest.mark.parametrize("length", [40, 100])
def test_a_video_cut_anywhere_gives_true_frames_or_an_error(
    tmp_path, pan, capfd, name, codec, muxer, length
):
    encode(tmp_path / name, pan[:length], codec, {"g": "10"}, muxer)
    whole = Video(tmp_path / name).frames(range(length))
    content = (tmp_path / name).read_bytes()
    refused = 0
    capfd.readouterr()
    for share in (0.1, 0.3, 0.5, 0.7, 0.85, 0.95, 0.999):
        (tmp_path / name).write_bytes(content[: int(len(content) * share)])
        try:
            film = Video(tmp_path / name)
            chosen = np.arange(len(film))
            assert np.array_equal(film.frames(chosen), whole[chosen])
            assert len(film) >= video.MIN_FRAME_SHARE * length
        except BadFile as error:
            refused += 1
            assert str(error).startswith(str(tmp_path / name)) and "\n" not in str(error)
    assert refused >= 4
    assert capfd.readouterr().err == ""  # the decoders keep quiet: one line is the door's to print


def test_a_clip_cut_from_a_film_without_decoding_starts_where_it_says(tmp_path, pan):
    """Such files (many of Kinetics) hold frames before their start, which are to be discarded."""
    encode(tmp_path / "film.mp4", pan[:30], options={"bf": "0"})
    with (
        av.open(str(tmp_path / "film.mp4")) as film,
        av.open(str(tmp_path / "cut.mp4"), "w") as cut,
    ):
        source = film.streams.video[0]
        stream = cut.add_stream_from_template(source)
        tick = round(1 / (source.average_rate * source.time_base))
        for packet in film.demux(source):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = (
                    packet.pts - 5 * tick, packet.dts - 5 * tick, stream,
                )  # fmt: skip
                cut.mux(packet)
    clip = Video(tmp_path / "cut.mp4")
    assert len(clip) == 25
    if find_spec("decord"):
        refused(tmp_path / "cut.mp4", "it counts 30 frames, not 25")
    assert np.array_equal(clip.frames([0, 24]), Video(tmp_path / "film.mp4").frames([5, 29]))


def set_matrix(path, matrix):
    """Write a turn into an mp4's track header."""
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 44
    a, b, c, d = (v << 16 for v in matrix)
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)


@pytest.mark.parametrize("length", [16, 100])
@pytest.mark.parametrize(("matrix", "turns"), [((0, 1, -1, 0), 3), ((-1, 0, 0, -1), 2)])
def test_a_telephone_held_upright_gives_upright_frames(tmp_path, pan, length, matrix, turns):
    """The turn written into an mp4's track header is applied, by whichever decoder."""
    encode(tmp_path / "a.mp4", pan[:length])
    level = Video(tmp_path / "a.mp4").frames([3])[0]
    set_matrix(tmp_path / "a.mp4", matrix)
    turned = Video(tmp_path / "a.mp4").frames([3])[0]
    assert turned.shape == np.rot90(level, turns).shape
    assert np.abs(turned.astype(int) - np.rot90(level, turns)).mean() < 1


def test_sound_alone_is_no_video(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(BadFile, match=r"a\.mp4: holds no video; remove it"):
        Video(tmp_path / "a.mp4")


@pytest.mark.parametrize("indices", [[], [-1], [0, 12]])
def test_frames_outside_the_video_are_refused(tmp_path, clip, indices):
    write_video(tmp_path / "a.mp4", clip)
    with pytest.raises(BadFile, match=r"choose from 0\.\.11"):
        Video(tmp_path / "a.mp4").frames(indices)


def test_an_interrupted_write_leaves_the_old_file(tmp_path, clip, monkeypatch):
    write_video(tmp_path / "a.mp4", clip)
    before = (tmp_path / "a.mp4").read_bytes()

    def fail(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        write_video(tmp_path / "a.mp4", clip[::-1])
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_bytes() == before


@pytest.mark.parametrize("kind", [".png", ".jpg", ".webp", ".bmp"])
def test_pictures_are_read_as_opencv_reads_them_and_cut_ones_refused(tmp_path, pan, capfd, kind):
    path = tmp_path / f"a{kind}"
    path.write_bytes(cv2.imencode(kind, pan[0])[1].tobytes())
    picture = read_image(path)
    assert picture.shape == (1, 96, 128, 3) and picture.dtype == np.uint8
    assert np.abs(picture[0].astype(int) - cv2.imread(str(path))[..., ::-1]).max() <= 1
    content = path.read_bytes()
    capfd.readouterr()
    for share in (0.0, 0.1, 0.5, 0.95):
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(ValueError, match="not a readable picture") as error:
            read_image(path)
        assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    assert capfd.readouterr().err == ""


def test_pictures_of_any_mode_become_upright_rgb(tmp_path, pan):
    whole = Image.fromarray(pan[0])
    for mode in ("L", "P", "RGBA", "LA", "1"):
        whole.convert(mode).save(tmp_path / "a.png")
        assert read_image(tmp_path / "a.png").shape == (1, 96, 128, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn clockwise to view
    whole.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.png")[0], np.rot90(pan[0], 3))


class ReleasedDice:
    """NumPy's old global generator, drawn from as the released sampler does."""

    def __init__(self, seed):
        self.state = np.random.RandomState(seed)

    def integers(self, low, high, endpoint):
        return low + self.state.randint(high - low + 1, size=1)[0]


@pytest.mark.parametrize("key", [k for k in frame_cases() if "_n1_" in k])
def test_training_frames_equal_the_released_sampler(key, parity):
    golden, case = arrays(CASES["frames"]["file"]), key.removesuffix("/test")
    length, interval, _, total = (int(n) for n in re.findall(r"\d+", case))
    low, high = golden[f"{case}/train_offset_range_rule"]
    assert (low, high) == (0, max(total - length * interval, 0))
    dice = ReleasedDice(CASES["frames"].get("seed", 7))
    for expected in golden[f"{case}/train_example_seeded"]:
        mine = sample_frames(total, length, interval, dice)
        parity("g frames, training", np.abs(mine - expected).max(), 0)


def uniform_cases():
    golden = arrays(CASES["frames"]["file"]) if "frames" in CASES else {}
    return [k.removesuffix("/test") for k in golden if re.fullmatch(r"uniform_clip.*/test", k)]


@pytest.mark.parametrize("case", uniform_cases())
def test_uniform_frames_equal_the_released_sampler(case, parity):
    golden = arrays(CASES["frames"]["file"])
    length, total = (int(n) for n in re.findall(r"\d+", case))
    low, high = (golden[f"{case}/train_{end}"] for end in ("lo", "hi"))
    parity("g frames, training", np.abs(np.array(segments(total, length)) - (low, high)).max(), 0)
    mine = uniform_frames(total, length)
    parity("g frames, test", np.abs(mine - golden[f"{case}/test"]).max(), 0)
    rng = np.random.default_rng(0)
    draws = np.stack([uniform_frames(total, length, rng) for _ in range(4000)])
    assert np.array_equal((draws.min(0), draws.max(0)), (low, high))
    error = np.sqrt(((high - low + 1.0) ** 2 - 1) / 12 / len(draws))  # of the mean, if all alike
    assert (np.abs(draws.mean(0) - (low + high) / 2) <= 4.5 * error).all()


@pytest.mark.parametrize("total", [1, 2, 17, 31, 32, 49, 1000])
def test_segments_cover_a_video_of_any_length(total):
    """Against exact fractions, whose rounding takes halves to even."""
    bounds = [round(Fraction(total - 1, 32) * i) for i in range(33)]
    first, last = segments(total, 32)
    assert (first.tolist(), last.tolist()) == (bounds[:-1], bounds[1:])
    drawn = uniform_frames(total, 32, np.random.default_rng(0))
    for chosen in (drawn, uniform_frames(total, 32)):
        assert chosen.shape == (32,) and (np.diff(chosen) >= 0).all()
        assert (first <= chosen).all() and (chosen <= last).all() and last[-1] == total - 1
