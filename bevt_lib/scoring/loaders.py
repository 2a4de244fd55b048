"""How many clips a second one process prepares: this loader beside plain loops.

Loops of decord and PyAV decode the same frames, one thread a process, from films and pictures that
are rendered here or are yours.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import av
import cv2
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from PIL import Image

from bevt_lib.base.config import Finetune, Pretrain
from bevt_lib.base.files import data_folder
from bevt_lib.datasets import sources
from bevt_lib.datasets.augment import one_thread
from bevt_lib.datasets.items import LabelledClips, PretrainClips
from bevt_lib.datasets.video import Video, import_decord, read_frames

FRAMES, HEIGHT, WIDTH = 300, 256, 340  # ten seconds of re-encoded Kinetics
PICTURE = (500, 375)  # width, height: an average ImageNet picture
FILMS = 4
Rates = dict[str, float]  # items a second of one process, by what does it


def render(folder: Path) -> tuple[Path, Path]:
    """Write FILMS films of FRAMES frames and a list of them; return the list and its root.

    Frames of the embedded film, enlarged and grained, encoded as ffmpeg does by default.
    """
    source = Video(data_folder() / "film" / "big_buck_bunny.mp4")
    frames = source.frames(range(len(source)))
    rng = np.random.default_rng(0)
    for film in range(FILMS):
        with av.open(str(folder / f"{film}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=30)
            stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
            stream.options = {"crf": "23"}
            for number in range(FRAMES):
                still = frames[(number + 45 * film) % len(frames)]
                large = cv2.resize(still, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
                grain = rng.integers(-4, 5, (HEIGHT, WIDTH, 1))
                picture = np.clip(large + grain, 0, 255).astype(np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    listed = folder / "list.txt"
    listed.write_text("".join(f"{film}.mp4 {film}\n" for film in range(FILMS)))
    return listed, folder


def render_pictures(folder: Path) -> Path:
    """Write grained pictures of about 80 kB in one class folder; return their root."""
    (folder / "class").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number, photo in enumerate(sorted((data_folder() / "photos").glob("*.jpg"))[::20]):
        large = Image.open(photo).convert("RGB").resize(PICTURE, Image.Resampling.BICUBIC)
        grain = rng.normal(0, 12, (*PICTURE[::-1], 1))
        pixels = np.clip(np.asarray(large) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "class" / f"{number}.jpg", quality=90)
    return folder


def decord_loop(path: Path, choose: Callable[[int], np.ndarray]) -> np.ndarray:
    """Decode chosen frames as a plain decord loop does."""
    reader = import_decord().VideoReader(str(path), num_threads=1)
    return reader.get_batch(choose(len(reader))).asnumpy()


def pyav_loop(path: Path, choose: Callable[[int], np.ndarray]) -> np.ndarray:
    """Decode chosen frames as a plain PyAV loop does: from the start to the last one chosen."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        chosen = choose(stream.frames or len(Video(path)))  # webm has no count
        convert, kept = VideoReformatter(), {}  # else one is made, with its threads, per frame
        for number, frame in enumerate(container.decode(stream)):
            if number in chosen:
                kept[number] = convert.reformat(frame, format="rgb24", threads=1).to_ndarray()
            if number == max(chosen):
                break
    return np.stack([kept[i] for i in chosen.tolist()])


def measure(recipe: Pretrain | Finetune, rounds: int, clips: int, process: int) -> Rates:
    """Let loaders take turns at the same clips; give the medians of their clips or images a second.

    Seconds of processor time, which other programs on the machine disturb least.
    """
    one_thread(process)
    torch.set_num_threads(1)
    items: PretrainClips | LabelledClips = (
        sources.pretraining_items(recipe, "video") if isinstance(recipe, Pretrain)
        else sources.labelled_items(recipe)
    )  # fmt: skip
    first = process * rounds * clips

    # What takes turns: this loader, and others that give the same frames.
    def decode(read: Callable[..., np.ndarray], epoch: int) -> np.ndarray:
        index = epoch % len(items)
        return read(items.entries[index].path, items.choose(epoch, index))

    work: dict[str, Callable[[int], object]] = {
        "this loader, decode + augment": lambda n: items.sample(n, n % len(items)),
        "this loader, decode": partial(decode, read_frames),
    }
    others: dict[str, Callable[..., np.ndarray]] = {
        "this loader by decord, decode": partial(read_frames, decoder="decord"),
        "decord loop, decode": decord_loop, "PyAV loop, decode": pyav_loop,
    }  # fmt: skip
    expected = decode(read_frames, first)
    for name, read in others.items():
        with suppress(Exception):  # decord isn't installed, or can't read this kind of video
            if np.array_equal(decode(read, first), expected):
                work[name] = partial(decode, read)
    if isinstance(recipe, Pretrain):
        images = sources.pretraining_items(recipe, "image")
        work["images, decode + augment"] = lambda n: images.sample(n, n % len(images))
    # Turn by turn, so that a busy machine slows all alike.
    rates: dict[str, list[float]] = {name: [] for name in work}
    for start in range(first, first + rounds * clips, clips):
        for name, do in work.items():
            began = time.process_time()
            for number in range(start, start + clips):
                do(number)
            rates[name].append(clips / (time.process_time() - began))
    return {name: float(np.median(values)) for name, values in rates.items()}
