"""A tiny joint pretraining through the real loop: for tests, alone or under torchrun.

    python tests/tiny_run.py FOLDER STEPS [--micro N] [--stop-after N] [--save-every N] [--seed N]
                             [--ema SHARE]

Real model, masks, noise, data order and checkpoints; pixels and ids are keyed random arrays, ids
copied from the pixels so that there is something to learn. Prints the losses as JSON on rank 0.
"""

import argparse
import json
from random import Random

import numpy as np
import torch

from bevt_lib import dist, engine
from bevt_lib.augment import normalise
from bevt_lib.bevt import BEVT
from bevt_lib.config import Optim, Run
from bevt_lib.datasets import Positions
from bevt_lib.engine import Source
from bevt_lib.masking import block_mask, tube_mask
from bevt_lib.seeds import Purpose, Stream, numpy_generator, python_generator, seeded_globals


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
        return {"pixels": pixels, "ids": ids, "mask": mask}


def prepare(batch, step):
    return {s: {**part, "pixels": normalise(part["pixels"])} for s, part in batch.items()}


def build_model(seed: int = 0) -> BEVT:
    with seeded_globals(seed, Purpose.WEIGHTS):
        return BEVT(vocab_size=8, embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 2),
                    window=(2, 2, 2), drop_path=0.2, linear_std=0.0)  # fmt: skip


def train(folder: str, steps: int, *, micro: int = 0, stop_after: int = 0, save_every: int = 4,
          keep: int = 2, seed: int = 0, ema: float = 0.0) -> tuple[BEVT, list[dict]]:  # fmt: skip
    torch.set_num_threads(1)
    model = build_model(seed)
    sources = {
        "video": Source(Positions(Arrays(Stream.VIDEO, 4), seed=seed, stream=Stream.VIDEO), 6),
        "image": Source(Positions(Arrays(Stream.IMAGE, 1), seed=seed, stream=Stream.IMAGE), 12),
    }
    optim = Optim(lr=3e-3, clips=6, images=12, steps=steps, warmup=2, clip_norm=3.0,
                  ema=ema)  # fmt: skip
    settings = Run(folder=folder, micro_batch=micro, stop_after=stop_after, save_every=save_every,
                   keep=keep, seed=seed)  # fmt: skip
    config = {"steps": steps, "run.seed": seed, "optim.ema": ema}
    history = engine.fit(
        model, sources, optim, settings, steps=steps, prepare=prepare, config=config
    )
    return model, history


def run(folder: str, steps: int, **settings) -> list[dict]:
    return train(folder, steps, **settings)[1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("steps", type=int)
    for name, default in (("micro", 0), ("stop-after", 0), ("save-every", 4), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--ema", type=float, default=0.0)
    given = vars(parser.parse_args())
    with dist.world():
        model, history = train(given.pop("folder"), given.pop("steps"), **given)
        sums = torch.stack([p.detach().double().sum() for p in model.parameters()])
        same = torch.equal(dist.sum_over_processes(sums.clone()), sums * dist.world_size())
        assert same, "the processes end with different models"
        if dist.rank() == 0:
            print(json.dumps([entry["loss"] for entry in history]))
