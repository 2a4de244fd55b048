"""A tiny training through the real loop: for tests, alone or under torchrun.

    python tests/tiny_run.py FOLDER STEPS [--model bevt | classifier | both] [--micro N]
        [--stop-after N] [--save-every N] [--keep N] [--seed N] [--ema SHARE] [--workers N]
        [--precision NAME] [--validate-every N] [--digests FILE]

Joint pretraining, or fine-tuning with dropout. Real model, masks, noise, data order and
checkpoints; pixels, ids and labels are keyed random arrays, from which there is something to learn.
Prints the losses as JSON on rank 0. ``--digests`` writes what each step sees, one file a process.
``both`` runs one after the other, in FOLDER/bevt and FOLDER/classifier.
"""

import argparse
import hashlib
import json
import os
from pathlib import Path
from random import Random

import numpy as np
import torch

from bevt_lib.base import distributed
from bevt_lib.base.config import Optim, Run
from bevt_lib.base.seeds import Purpose, Stream, numpy_generator, python_generator, seeded_globals
from bevt_lib.datasets.items import Positions
from bevt_lib.model.bevt import BEVT
from bevt_lib.model.classifier import Classifier
from bevt_lib.model.masking import block_mask, tube_mask
from bevt_lib.model.normalisation import normalise
from bevt_lib.training import loop
from bevt_lib.training.task import Source, Task

SHAPE = {"embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2), "window": (2, 2, 2),
         "drop_path": 0.2, "linear_std": 0.0}  # fmt: skip


class Arrays:
    """Random clips or pictures whose ids are a function of what is visible elsewhere."""

    def __init__(self, stream: Stream, frames: int):
        self.stream, self.frames = stream, frames

    def __len__(self) -> int:
        return 20

    def sample(self, epoch: int, index: int) -> dict:
        rng = numpy_generator(0, Purpose.CROP, self.stream, index)
        shade = int(rng.integers(8))
        pixels = np.full((self.frames, 32, 32, 3), 30 * shade, np.uint8)
        pixels += rng.integers(0, 8, pixels.shape, dtype=np.uint8)
        mask_rng: Random = python_generator(0, Purpose.MASK, self.stream, epoch, index)
        steps = self.frames // 2
        mask = tube_mask((steps, 2, 2), mask_rng) if steps else block_mask((2, 2), mask_rng)[None]
        ids = np.full((self.frames, 2, 2), shade, np.int64)
        return {"pixels": pixels, "ids": ids, "mask": mask, "label": shade}


def prepare(batch, step):
    return {s: {**part, "pixels": normalise(part["pixels"])} for s, part in batch.items()}


def build_model(seed: int = 0, kind: str = "bevt"):
    with seeded_globals(seed, Purpose.WEIGHTS):
        if kind == "classifier":
            return Classifier(num_classes=8, dropout=0.5, smoothing=0.1, **SHAPE)
        return BEVT(vocab_size=8, **SHAPE)


def build_sources(seed: int = 0, kind: str = "bevt", workers: int = 0) -> dict[str, Source]:
    video = Positions(Arrays(Stream.VIDEO, 4), seed=seed, stream=Stream.VIDEO, workers=workers)
    image = Positions(Arrays(Stream.IMAGE, 1), seed=seed, stream=Stream.IMAGE, workers=workers)
    if kind == "classifier":
        return {"clip": Source(video, 6)}
    return {"video": Source(video, 6), "image": Source(image, 12)}


def score(model, sources, done: int) -> dict[str, float]:
    """Score the model on four items of each stream, without noise."""
    batch = {}
    for stream, source in sources.items():
        part = torch.utils.data.default_collate([source.items[p] for p in range(4)])
        batch[stream] = part | {"pixels": normalise(part["pixels"]).to(model.norm.weight.dtype)}
    terms = model(batch)
    return {"score": -sum(terms[s].loss.item() / terms[s].count for s in batch)}


def note_digests(file: Path, batch, step: int) -> None:
    """Note what a step sees of each item: its place in the order, pixels, mask and label."""
    with file.with_name(f"{file.name}.{distributed.rank()}").open("a") as lines:
        for stream, part in batch.items():
            for i, position in enumerate(part["position"].tolist()):
                seen = b"".join(part[k][i].numpy().tobytes() for k in ("pixels", "mask", "label"))
                digest = hashlib.sha256(seen).hexdigest()
                lines.write(json.dumps([step, stream, position, digest]) + "\n")


def train(folder: str, steps: int, *, model: str = "bevt", micro: int = 0, stop_after: int = 0,
          save_every: int = 4, keep: int = 2, seed: int = 0, ema: float = 0.0, workers: int = 0,
          precision: str = "auto", validate_every: int = 0, digests: str = "", lr: float = 3e-3,
          loss_weights: tuple[float, float] = (1.0, 1.0), **settings):  # fmt: skip
    """Train; ``settings`` go to ``Task``, those it doesn't know to ``Run``."""
    torch.set_num_threads(1)
    network, sources = build_model(seed, model), build_sources(seed, model, workers)
    optim = Optim(lr=lr, clips=6, images=12, steps=steps, warmup=2, clip_norm=3.0,
                  ema=ema, loss_weights=loss_weights)  # fmt: skip
    chosen = {k: settings.pop(k) for k in list(settings) if k in Run.__dataclass_fields__}
    run = Run(folder=folder, micro_batch=micro, stop_after=stop_after, save_every=save_every,
              keep=keep, seed=seed, precision=precision, **chosen)  # fmt: skip
    if validate_every:
        settings = {"validate": lambda done: score(network, sources, done),
                    "validate_every": validate_every, "best_by": "score"} | settings  # fmt: skip

    def see(batch, step):
        if digests:
            note_digests(Path(digests), batch, step)
        return prepare(batch, step)

    config = {"steps": steps, "run.seed": seed, "optim.ema": ema}
    task = Task(model=network, sources=sources, steps=steps, prepare=see, config=config, **settings)
    return network, loop.fit(task, optim, run)


def run(folder: str, steps: int, **settings) -> list[dict]:
    return train(folder, steps, **settings)[1]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("steps", type=int)
    numbers = {"micro": 0, "stop-after": 0, "save-every": 4, "keep": 2, "seed": 0, "workers": 0,
               "validate-every": 0}  # fmt: skip
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--ema", type=float, default=0.0)
    for name, default in {"model": "bevt", "precision": "auto", "digests": ""}.items():
        parser.add_argument(f"--{name}", default=default)
    given = vars(parser.parse_args(arguments))
    place, steps, kind = (given.pop(k) for k in ("folder", "steps", "model"))
    with distributed.world():
        for one in ("bevt", "classifier") if kind == "both" else (kind,):
            folder = f"{place}/{one}" if kind == "both" else place
            model, history = train(folder, steps, model=one, **given)
            sums = torch.stack([p.detach().double().sum() for p in model.parameters()])
            same = torch.equal(
                distributed.all_reduce_sum(sums.clone()), sums * distributed.world_size()
            )
            assert same, "the processes end with different models"
            if distributed.rank() == 0:
                print(json.dumps([entry["loss"] for entry in history]))
    if "TINY_RUN_ENDED" in os.environ:  # a process that gets here ends with status 0
        Path(os.environ["TINY_RUN_ENDED"], os.environ.get("RANK", "0")).touch()


if __name__ == "__main__":
    main()
