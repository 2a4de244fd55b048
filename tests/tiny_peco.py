"""A tiny VQ-VAE training through the real loop: for tests, alone or under torchrun.

    python tests/tiny_peco.py FOLDER STEPS [--micro N] [--stop-after N]

Pictures are keyed random arrays. On rank 0 it prints, as JSON, the losses, the codes and how often
each is used, at the end.
"""

import argparse
import json

import numpy as np
import torch

from bevt_lib.base import distributed
from bevt_lib.base.config import Optim, Run
from bevt_lib.base.seeds import Purpose, Stream, numpy_generator, seeded_globals, torch_generator
from bevt_lib.datasets.items import Positions
from bevt_lib.tokenizers.base import to_unit
from bevt_lib.tokenizers.peco import Peco, PecoShape
from bevt_lib.training import loop
from bevt_lib.training.task import Source, Task


class Blots:
    """Pictures of 8x8 blots of a few colours with some noise."""

    def __len__(self) -> int:
        return 20

    def sample(self, epoch: int, index: int) -> dict:
        rng = numpy_generator(0, Purpose.CROP, Stream.IMAGE, index)
        blots = 60 * rng.integers(0, 4, (2, 2, 3)) + rng.integers(0, 20, (2, 2, 3))
        return {"tokenizer_input": blots.astype(np.uint8).repeat(8, 0).repeat(8, 1)}


def alike(painted, pixels):
    """A stand-in for a perceptual network: how far the mean colours are apart."""
    return (painted.mean((2, 3)) - pixels.mean((2, 3))).square().sum(1)


def train(folder: str, steps: int, *, micro: int = 0, stop_after: int = 0):
    torch.set_num_threads(1)
    with seeded_globals(0, Purpose.WEIGHTS):
        model = Peco(PecoShape(hidden=4, blocks=1, code_dim=4, factor=8, vocab_size=12), alike)
    items = Positions(Blots(), seed=0, stream=Stream.IMAGE)
    start = np.stack([Blots().sample(0, i)["tokenizer_input"] for i in range(6)])
    model.start_codebook(to_unit(torch.from_numpy(start)), torch_generator(0, Purpose.WEIGHTS))
    model.codes[:2] += 100.0  # dead from the start, to be revived
    model.uses[:2] = 0.0
    task = Task(
        model=model, sources={"picture": Source(items, 12)}, steps=steps,
        prepare=lambda batch, step: {"picture": batch["picture"] | {
            "pixels": to_unit(batch["picture"]["tokenizer_input"])}},
        after_step=lambda step: model.update_codes(torch_generator(0, Purpose.WEIGHTS, 1, step)),
        config={"steps": steps},
    )  # fmt: skip
    run = Run(folder=folder, micro_batch=micro, stop_after=stop_after, save_every=4)
    return model, loop.fit(task, Optim(lr=1e-2, images=12, steps=steps), run)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("steps", type=int)
    for name in ("micro", "stop-after"):
        parser.add_argument(f"--{name}", type=int, default=0)
    given = vars(parser.parse_args())
    with distributed.world():
        model, history = train(given.pop("folder"), given.pop("steps"), **given)
        if distributed.rank() == 0:
            print(json.dumps([[e["loss"] for e in history], model.codes.tolist(),
                              model.uses.tolist()]))  # fmt: skip
