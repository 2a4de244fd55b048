"""Keyed randomness: what happens to an item depends on (seed, purpose, key), never on the process.

A generator is made for each use and thrown away, so neither worker, rank, process count nor resume
changes what is drawn. (Our choice; the released code draws from per-worker global generators.)
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch


class Purpose(IntEnum):
    """What a generator is for. The numbers are part of every result: never renumber them."""

    ORDER = 0
    FRAMES = 1
    CROP = 2
    MASK = 3
    NOISE = 4
    WEIGHTS = 5
    RENDER = 6
    SPLIT = 7
    REPLACE = 8


class Stream(IntEnum):
    """Which stream of items a key belongs to, so that two streams never draw alike."""

    VIDEO = 0
    IMAGE = 1


def numpy_generator(seed: int, purpose: Purpose, *key: int) -> np.random.Generator:
    """Make the NumPy generator of (seed, purpose, key); all integers non-negative."""
    return np.random.default_rng(np.random.SeedSequence([seed, int(purpose), *key]))


def python_generator(seed: int, purpose: Purpose, *key: int) -> random.Random:
    """Make the ``random.Random`` of (seed, purpose, key), for the mask generators."""
    state = np.random.SeedSequence([seed, int(purpose), *key]).generate_state(4)
    return random.Random(int.from_bytes(state.tobytes(), "little"))


def torch_generator(seed: int, purpose: Purpose, *key: int) -> torch.Generator:
    """Make the CPU ``torch.Generator`` of (seed, purpose, key)."""
    state = np.random.SeedSequence([seed, int(purpose), *key]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)


def uniform_noise(seed: int, positions: Sequence[int], size: int, *key: int) -> torch.Tensor:
    """Draw uniforms in [0, 1) keyed by each sample's position: float32 (len(positions), size)."""
    generators = [numpy_generator(seed, Purpose.NOISE, *key, p) for p in positions]
    return torch.from_numpy(np.stack([g.random(size, dtype=np.float32) for g in generators]))


@contextmanager
def seeded_globals(seed: int, purpose: Purpose, *key: int) -> Iterator[None]:
    """Seed torch, NumPy and Python's global generators from a key; restore all three afterwards."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    number = int(np.random.SeedSequence([seed, int(purpose), *key]).generate_state(1)[0])
    for set_seed in (torch.manual_seed, np.random.seed, random.seed):
        set_seed(number)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
