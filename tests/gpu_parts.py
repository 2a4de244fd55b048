"""The parts of tests/gpu.sh, each a process: python tests/gpu_parts.py PART OUT END [--tiny].

END is when the part will be killed, as seconds since 1970.
"""

import argparse
import gc
import json
import os
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import gpu
import gpu_checks
import numpy as np
import torch
from gpu_checks import DEVICE, Found

from bevt_lib import bench, cli, evaluate, finetune, presets, pretrain
from bevt_lib.datasets import synthetic
from bevt_lib.training.run_folder import read_metrics
from bevt_lib.weights.load import load_model, save_weights

Check = Callable[[str, Callable[[], Found]], None]
PRESETS = presets.PRETRAIN | presets.FINETUNE
TINY = ["--model.embed-dim=8", "--model.depths=1,1,1,1", "--model.num-heads=1,1,1,1",
        "--model.window=2,2,2", "--data.frames=4", "--data.size=64"]  # fmt: skip
LARGEST = 16 * 2**20  # bytes of a file of weights
SHARES = {"small_image": 0.25, "small_joint": 0.45, "small_what": 0.5, "small_how": 1.0}  # of rest
START = 3.0  # seconds in which a stage's first batch comes


def correctness(out: Path, end: float, tiny: bool, check: Check) -> None:
    """Check what must be the same on a GPU; the checks that need the rendered clips are last."""
    check("machine", gpu_checks.machine)
    check("golden numbers, fp64", partial(gpu_checks.golden, torch.float64))
    check("golden numbers, fp32", partial(gpu_checks.golden, torch.float32))
    check("golden numbers, fp32 with TF32", partial(gpu_checks.golden, torch.float32, tf32=True))
    check("attention, fp32", partial(gpu_checks.attention, torch.float32, 1e-4, tiny))
    check("attention, bf16", partial(gpu_checks.attention, torch.bfloat16, 2e-2, tiny))
    check("bf16 and fp16 step", partial(gpu_checks.half_precision, tiny))
    check("world of one process", gpu_checks.one_process_world)
    check("ids changed by fp16", gpu_checks.fp16_ids)
    check("resume after kill -9", partial(gpu_checks.resume, tiny))


def rows_of(kind: str, file: Path, tiny: bool) -> Found:
    """Let ``bench train`` measure rows of a kind; put those of earlier kinds before them."""
    earlier = json.loads(file.read_text()) if file.exists() else {"rows": []}
    words = ["train", "--only", kind, "--pairs", "1" if tiny else "5", "--out", str(file)]
    file.unlink(missing_ok=True)
    try:
        bench.main(words + ["--tiny"] * tiny)
    finally:
        table = json.loads(file.read_text()) if file.exists() else {"rows": []}
        rows = table["rows"]
        whole = earlier | table | {"rows": earlier["rows"] + rows}
        file.write_text(json.dumps(whole, indent=1) + "\n")
    right = bool(rows) and all(row.get("differs", 0.0) < 0.05 for row in rows)
    return {"right": right, "allowed": 0.05, "rows": rows}


def speeds(out: Path, end: float, tiny: bool, check: Check) -> None:
    """Measure beside the textbook's forms, kind by kind: one that fails stops no other."""
    file = out / "bench_gpu.json"
    file.unlink(missing_ok=True)
    for kind in ("joint", "finetune", "limits", "inference", "tokenizing"):
        check(kind, partial(rows_of, kind, file, tiny))


def curve(folder: Path) -> Found:
    """Sum up a run's record: means of some 40 stretches, the share of time that data took."""
    history = read_metrics(folder)
    if not history:
        return {}
    size = max(1, len(history) // 40)
    keys = [k for k in history[0] if k.endswith(("loss", "accuracy"))]
    means = {key: [round(float(np.mean([e[key] for e in history[i : i + size]])), 4)
                   for i in range(0, len(history), size)] for key in keys}  # fmt: skip
    later = history[len(history) // 10 :]
    seconds = np.array([1 / e["items_per_s"] for e in later])
    waited = float((seconds * [e["data_wait"] for e in later]).sum() / seconds.sum())
    return {"steps": len(history), "items_per_s": round(float(1 / seconds.mean()), 1),
            "data_wait": round(waited, 4), "data_wait_goal": 0.05, "curve_step": size,
            "curve": means}  # fmt: skip


@contextmanager
def curve_noted(folder: Path, note: Callable[..., None]) -> Iterator[None]:
    """Note a run's curve every five seconds, and at its end."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(5):
            note(**curve(folder))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        note(**curve(folder))


def keep_weights(folder: Path, file: Path) -> Found:
    """Write a model folder's weights as one file: fp16, or 8-bit as shipped ones if too large."""
    state = load_model(folder).state_dict()
    for dtype in (torch.float16, torch.float8_e4m3fn):
        save_weights(state, file, dtype)
        if file.stat().st_size < LARGEST:
            return {"file": file.name, "dtype": str(dtype), "bytes": file.stat().st_size}
    file.unlink()
    return {"file": None}


class Chain:
    """The stages of a ``small`` training, each from the one before it, as long as time allows."""

    def __init__(self, out: Path, work: Path, end: float, tiny: bool):
        self.out, self.work, self.end, self.tiny = out, work, end - (8 if tiny else 25), tiny
        self.rates: dict[str, float] = {}  # seconds a step

    def stage(self, name: str) -> Found:
        """Choose a stage's steps, train, keep its weights, score it on held-out data."""
        pretraining, folder = name in presets.PRETRAIN, self.work / name
        command = pretrain if pretraining else finetune
        readers = ((os.cpu_count() or 1) - 2) // (2 if name == "small_joint" else 1)
        own = [name, f"--data.workers={0 if self.tiny else max(1, readers)}", *TINY * self.tiny]
        words = own + ["--optim.clips=2"] * self.tiny
        words += ["--optim.images=2"] * (self.tiny and pretraining)
        if name != "small_image":
            before = "small_image" if name == "small_joint" else "small_joint"
            words += ["--run.init", str(self.work / before / "model")]
        steps = self.choose_steps(name, command, words)
        words += [f"--optim.steps={steps}", f"--optim.warmup={steps // 20}"]
        words += [f"--run.save-every={steps}", "--run.folder", str(folder)]
        note = partial(gpu.note, self.out, "learning", name)
        note(planned_steps=steps)
        with curve_noted(folder, note):
            test = ["--val-epochs=0", f"--run.test-clips={8 * self.tiny}"]
            command.main([*words, *test * (not pretraining)])
        note(weights=keep_weights(folder / "model", self.out / f"{name}.safetensors"))
        if pretraining:
            losses = [e["loss"] for e in read_metrics(folder)]
            tenth = max(1, len(losses) // 10)
            fell = float(np.mean(losses[-tenth:])) < float(np.mean(losses[:tenth]))
            return {"right": self.tiny or fell, "held out": self.tokens(folder, words)}
        scores = {split: self.classes(own, folder, split) for split in ("test", "test_unseen")}
        return {"right": self.tiny or scores["test"]["lower95"] > 1 / 8, "held out": scores}

    def choose_steps(self, name: str, command: Any, words: list[str]) -> int:
        """Measure a stage's rate in a short run, and give it its share of the time left."""
        kind = "small_what" if name == "small_how" else name  # equal in all that takes time
        if kind not in self.rates:
            count, folder = 3 if self.tiny else 60, self.work / f"rate_{name}"
            command.main([*words, f"--run.stop-after={count}", "--run.folder", str(folder)])
            batch = 2 * (1 + (name == "small_joint"))
            batch = batch if self.tiny else sum(PRESETS[name]().batches.values())
            later = read_metrics(folder)[count // 2 :]  # the first ones find batches ready
            self.rates[kind] = float(np.mean([batch / e["items_per_s"] for e in later]))
        seconds = SHARES[name] * (self.end - time.time()) - START
        least, most = (2, 6) if self.tiny else (100, PRESETS[name]().optim.steps)
        return min(most, max(least, int(seconds / self.rates[kind])))

    def tokens(self, folder: Path, words: list[str]) -> Found:
        """Score masked-token prediction on held-out items of each stream."""
        recipe = cli.choose(presets.PRETRAIN, words, "pretrain")
        model = load_model(folder / "model").to(DEVICE)
        count, found = 8 if self.tiny else 256, {}
        for stream in recipe.streams:
            score = asdict(pretrain.score(recipe, model, stream, count))
            found[stream] = {k: v for k, v in score.items() if k != "by_distance"}
        return found

    def classes(self, own: list[str], folder: Path, split: str) -> Found:
        """Score recognition on a held-out split, by the command that does so."""
        words = [*own, "--run.init", str(folder / "model"), "--split", split, "--run.folder",
                 str(folder / "scores"), "--run.test-clips", "8" if self.tiny else "0"]  # fmt: skip
        score, _ = evaluate.evaluate(cli.choose(evaluate.PRESETS, words, "evaluate"))
        return {k: v for k, v in asdict(score).items() if k in ("clips", "top1", "lower95", "top5")}


def learning(out: Path, end: float, tiny: bool, check: Check) -> None:
    """Train the ``small`` chain on the rendered clips."""

    def render() -> Found:
        return {"right": None, "folder": synthetic.render(None, os.cpu_count() or 1).name}

    check("rendered clips", render)
    with tempfile.TemporaryDirectory() as work:
        chain = Chain(out, Path(work), end, tiny)
        for name in SHARES:
            check(name, partial(chain.stage, name))


def main() -> None:
    """Run a part."""
    parser = argparse.ArgumentParser()
    known = {"correctness": correctness, "speed": speeds, "learning": learning}
    parser.add_argument("part", choices=known)
    parser.add_argument("out", type=Path)
    parser.add_argument("end", type=float)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()

    def check(name: str, work: Callable[[], Found]) -> None:
        """Note what a check finds; if it fails, its error."""
        print(f"== {given.part}: {name}", flush=True)
        began = time.monotonic()
        try:
            found = work()
        except Exception:
            found = {"right": False, "error": traceback.format_exc()[-1500:]}
            traceback.print_exc()
        seconds = round(time.monotonic() - began, 1)
        gpu.note(given.out, given.part, name, **found, seconds=seconds)
        gc.collect()
        torch.cuda.empty_cache()

    known[given.part](given.out, given.end, given.tiny, check)


if __name__ == "__main__":
    main()
