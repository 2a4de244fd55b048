"""How many clips a second one core prepares, and how many cores feed one GPU.

    python -m bevt_lib.bench [--list FILE --root DIR] [--rate CLIPS_PER_S] [--processes N]

Renders its own films (300 frames of 340x256, H.264 by x264's defaults), or takes yours, and its own
pictures (JPEG, 500x375). This loader, with its default decoder and with decord, takes turns with
plain loops of decord and PyAV that decode the same frames, one thread a process.
"""

import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from PIL import Image

from bevt_lib import cli, parts
from bevt_lib.base.config import Finetune, Pretrain, require
from bevt_lib.base.files import data_folder
from bevt_lib.datasets import sources
from bevt_lib.datasets.augment import one_thread
from bevt_lib.datasets.items import LabelledClips, PretrainClips
from bevt_lib.datasets.video import Video, import_decord, read_frames
from bevt_lib.presets import paper_joint, paper_k400, paper_ssv2
from bevt_lib.scoring import cost
from bevt_lib.tokenizers.dalle import DalleTokenizer, build

FRAMES, HEIGHT, WIDTH = 300, 256, 340  # ten seconds of re-encoded Kinetics
PICTURE = (500, 375)  # width, height: an average ImageNet picture
FILMS = 4
Rates = dict[str, float]  # items a second of one process, by what does it


@dataclass
class Options:
    """What the command line says."""

    list: str = ""  # your own list of videos; empty: rendered ones
    root: str = "."  # folder of that list's files
    rate: float = 0.0  # clips a second that one GPU trains; 0: what scoring.cost assumes
    processes: int = 1  # processes at the same time
    rounds: int = 5  # turns of each; medians are printed
    clips: int = 8  # clips a turn


def main(arguments: list[str]) -> None:
    """Read the command line, render, measure, print."""
    given = cli.parse(Options, arguments, "python -m bevt_lib.bench", __doc__ or "")
    valid = min(given.processes, given.rounds, given.clips) > 0 and given.rate >= 0
    require(valid, "--processes, --rounds, --clips and --rate are more than 0")
    with tempfile.TemporaryDirectory() as folder:
        films, root = (given.list, given.root) if given.list else render(Path(folder))
        data: Any = {"video_list": str(films), "video_root": str(root),
                     "image_root": str(render_pictures(Path(folder) / "pictures"))}  # fmt: skip
        for recipe in (paper_joint(), paper_k400(), paper_ssv2()):
            recipe = replace(recipe, data=replace(recipe.data, **data))
            jobs = [(recipe, given.rounds, given.clips, n) for n in range(given.processes)]
            with Pool(given.processes) as pool:
                rates = pool.starmap(measure, jobs)
            mean = {name: float(np.mean([r[name] for r in rates])) for name in rates[0]}
            print(report(recipe, mean, given.rate or None), flush=True)


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


def assumed_rate(recipe: Pretrain | Finetune) -> float:
    """Give the clips a second of one GPU by the assumptions of ``bevt_lib.scoring.cost``."""
    tokenizer = None
    if isinstance(recipe, Pretrain):
        tokenizer = DalleTokenizer(*build(256, 2, recipe.tokens.vocab_size))
    _, items = parts.measure_items(recipe, tokenizer)
    student, frozen = (
        sum(n * getattr(items[s], field) for s, n in recipe.batches.items())
        for field in ("student", "tokenizer")
    )
    return recipe.optim.clips / (3600 * cost.gpu_hours(cost.PASSES * student, frozen))


def report(recipe: Pretrain | Finetune, rates: Rates, rate: float | None) -> str:
    """Write the rates of a recipe and the cores that feed a GPU of ``rate`` clips a second."""
    d = recipe.data
    uniform = isinstance(recipe, Finetune) and recipe.sampling == "uniform"
    spread = "all over the film" if uniform else f"interval {d.interval}"
    lines = [f"{recipe.name}: {d.frames} frames, {spread}, {d.size} px"]
    # One line for each loader, and for each plain loop that can't be compared.
    for name, value in rates.items():
        line = f"  {name:30s} {value:7.1f} {'images' if 'images' in name else 'clips'}/s a core"
        if "loop" in name or "decord" in name:
            times = rates["this loader, decode"] / value
            line += f", this loader's decoding is {times:.2f} times as fast"
        lines.append(line)
    absent = [name for name in ("decord", "PyAV") if f"{name} loop, decode" not in rates]
    lines += [f"  {name} loop, decode: doesn't give the same frames here" for name in absent]
    # The cores for one GPU: those for its clips, and for the images beside them.
    needed = rate or assumed_rate(recipe)
    cores, beside = needed / rates["this loader, decode + augment"], ""
    if isinstance(recipe, Pretrain):
        images = needed * recipe.optim.images / recipe.optim.clips
        cores += images / rates["images, decode + augment"]
        beside = f" and {images:.1f} images/s"
    source = "as given" if rate else f"ASSUMED of an {cost.GPU}: bevt_lib.scoring.cost"
    lines.append(f"  one GPU at {needed:.1f} clips/s{beside} ({source}) takes {cores:.1f} cores")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run_command(main)
