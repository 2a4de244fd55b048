"""How fast the kit is beside what people would use instead, measured on this machine.

    python -m bevt_lib.bench loading [--list FILE --root DIR] [--rate CLIPS_PER_S] [--processes N]
    python -m bevt_lib.bench train [--out FILE.json] [--pairs N] [--only ROWS] [--tiny]

loading, also without a word: how many clips a second one core prepares, beside plain loops of
decord and PyAV, and how many cores feed one GPU. Renders its own films (300 frames of 340x256,
H.264 by x264's defaults), or takes yours, and its own pictures (JPEG, 500x375).

train: the joint step, the fine-tuning step, inference, tokenizing and loading beside torchvision's
Swin, the DALL-E package and decord (bevt_lib/scoring/textbook.py), on the GPU where there is one;
how near each part comes to a large matrix product, where the time goes, and how it grows.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bevt_lib import cli, parts
from bevt_lib.base import files
from bevt_lib.base.config import Finetune, Pretrain, require
from bevt_lib.presets import paper_joint, paper_k400, paper_ssv2
from bevt_lib.scoring import cost, loaders, speed
from bevt_lib.tokenizers.dalle import DalleTokenizer, build

Rows = Iterator[speed.Row]


@dataclass
class Loading:
    """What the command line says of loading."""

    list: str = ""  # your own list of videos; empty: rendered ones
    root: str = "."  # folder of that list's files
    rate: float = 0.0  # clips a second that one GPU trains; 0: what scoring.cost assumes
    processes: int = 1  # processes at the same time
    rounds: int = 5  # turns of each; medians are printed
    clips: int = 8  # clips a turn


@dataclass
class Train:
    """What the command line says of training."""

    out: str = ""  # JSON to write the table to, row by row
    pairs: int = 5  # turns of each side; medians are told
    only: str = ""  # kinds of rows, with commas; empty: all
    tiny: bool = False  # smallest sizes: a rehearsal


def main(arguments: list[str]) -> None:
    """Read the command line, measure, print."""
    words = list(arguments)
    subject = words.pop(0) if words and not words[0].startswith("-") else "loading"
    if subject not in SUBJECTS:
        raise ValueError(f"bench measures {' or '.join(SUBJECTS)}, not {subject!r}")
    form, measure = SUBJECTS[subject]
    measure(cli.parse(form, words, f"python -m bevt_lib.bench {subject}", __doc__ or ""))


def bench_loading(given: Loading) -> None:
    """Let loaders take turns at the clips of three recipes, and print their rates."""
    valid = min(given.processes, given.rounds, given.clips) > 0 and given.rate >= 0
    require(valid, "--processes, --rounds, --clips and --rate are more than 0")
    for recipe, rates in loading_rates(given, at_once=given.processes):
        mean = {name: float(np.mean([r[name] for r in rates])) for name in rates[0]}
        print(report(recipe, mean, given.rate or None), flush=True)


def loading_rates(
    given: Loading, *, at_once: int
) -> Iterator[tuple[Pretrain | Finetune, list[loaders.Rates]]]:
    """Give recipes, and for each the rates of the processes, so many of which run at a time."""
    with tempfile.TemporaryDirectory() as folder:
        rendered = (given.list, given.root) if given.list else loaders.render(Path(folder))
        pictures = loaders.render_pictures(Path(folder) / "pictures")
        data: Any = dict(zip(("video_list", "video_root"), map(str, rendered), strict=True))
        for recipe in (paper_joint(), paper_k400(), paper_ssv2()):
            recipe = replace(recipe, data=replace(recipe.data, image_root=str(pictures), **data))
            jobs = [(recipe, given.rounds, given.clips, n) for n in range(given.processes)]
            with Pool(at_once) as pool:
                yield recipe, pool.starmap(loaders.measure, jobs)


def bench_training(given: Train) -> None:
    """Measure row by row; print each as it comes, and write the table so far."""
    cuda = torch.cuda.is_available()
    sizes = speed.TINY_SIZES if given.tiny else speed.GPU_SIZES if cuda else speed.CPU_SIZES
    kinds: dict[str, Callable[[], Rows]] = {
        # First: what other kinds held stays with the process, and these are two more.
        "memory": lambda: speed.memory_rows(sizes, given.pairs),
        "joint": lambda: speed.joint_rows(sizes, given.pairs),
        "finetune": lambda: speed.tuning_rows(sizes, given.pairs),
        "inference": lambda: speed.inference_rows(sizes, given.pairs),
        "tokenizing": lambda: speed.tokenizing_rows(sizes, given.pairs),
        "loading": lambda: loading_rows(given),
        "limits": lambda: speed.limit_rows(sizes, given.pairs),
        "profile": lambda: speed.profile_rows(sizes),
        "growth": lambda: speed.growth_rows(sizes, given.pairs),
        "processes": process_rows,
    }
    chosen = given.only.split(",") if given.only else list(kinds)
    wrong = [kind for kind in chosen if kind not in kinds]
    require(not wrong, f"--only takes {', '.join(kinds)}, not {', '.join(wrong)}")
    require(given.pairs > 0, "--pairs is more than 0")
    table: dict[str, Any] = {**about_this_machine(), "sizes": "tiny" if given.tiny else "full",
                             "rows": []}  # fmt: skip
    print(json.dumps({k: v for k, v in table.items() if k != "rows"}))
    for kind in chosen:
        for row in kinds[kind]():
            print(tell(row), flush=True)
            table["rows"].append({"kind": kind, **row})
            if given.out:
                with files.replace_file(Path(given.out)) as part:
                    part.write_text(json.dumps(table, indent=1) + "\n")


def tell(row: speed.Row) -> str:
    """Write a row as a line: its name, then what it holds."""
    numbers = (f"{k} {v:g}" if isinstance(v, float | int) else f"{v}"
               for k, v in row.items() if k != "name")  # fmt: skip
    return f"{row['name']:38s} " + ", ".join(numbers)


def about_this_machine() -> dict[str, Any]:
    """Say on what, with what and beside how much other work is measured."""
    try:
        head = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=False,
        ).stdout
    except OSError:
        head = ""  # no git
    gpu = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    return {
        "machine": ", ".join([platform.machine(), f"{os.cpu_count()} cores", *gpu]),
        "versions": {name: version(name) for name in ("torch", "torchvision", "timm", "DALL-E")}
                    | {"python": platform.python_version()},
        "commit": head.strip(), "load": round(os.getloadavg()[0], 2),
        "threads": torch.get_num_threads(),
    }  # fmt: skip


def loading_rows(given: Train) -> Rows:
    """Give the loader's seconds a clip beside a decord loop's, as rows of the table."""
    turns = Loading(processes=given.pairs, rounds=1, clips=2 if given.tiny else 8)
    ours, loop = "this loader, decode", "decord loop, decode"
    for recipe, rates in loading_rates(turns, at_once=1):
        if all(loop in turn for turn in rates):
            ratios = [turn[ours] / turn[loop] for turn in rates]
            row = {"ours": np.median([1 / turn[ours] for turn in rates]),
                   "textbook": np.median([1 / turn[loop] for turn in rates]),
                   "ratio": np.median(ratios), "low": min(ratios), "high": max(ratios)}  # fmt: skip
            yield {"name": f"loading, {recipe.name}", **speed.rounded(row)}


def process_rows() -> Rows:
    """Give the items a second of one and of two processes that train lesson_joint on the CPU."""
    for processes in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                       f"--nproc-per-node={processes}", "-m", "bevt_lib.pretrain", "lesson_joint",
                       "--run.stop-after", "24", "--run.folder", folder]  # fmt: skip
            hidden = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            subprocess.run(command, check=True, capture_output=True, env=os.environ | hidden)
            lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()[4:]
            rate = float(np.median([json.loads(line)["items_per_s"] for line in lines]))
        yield {"name": f"lesson_joint, {processes} process(es)", "items_per_s": round(rate, 2)}


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


def report(recipe: Pretrain | Finetune, rates: loaders.Rates, rate: float | None) -> str:
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


SUBJECTS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "loading": (Loading, bench_loading), "train": (Train, bench_training)}  # fmt: skip

if __name__ == "__main__":
    cli.run_command(main)
