"""Samples made from lists of clips and pictures, and the order in which training sees them.

A data set is a picklable object with ``sample(epoch, index)``: a dict of arrays that depends on
(seed, stream, epoch, index) and on nothing else, so that neither worker, process nor resume shows.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from random import Random
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Dataset

from bevt_lib.base.seeds import Purpose, Stream, numpy_generator, python_generator
from bevt_lib.datasets import augment
from bevt_lib.datasets.lists import PICTURES, Entries, Entry
from bevt_lib.datasets.sampling import eval_frames, sample_frames, uniform_frames
from bevt_lib.datasets.video import BadFile, read_frames, read_image, with_timeout

REPLACEMENTS = 4  # items tried in place of one whose file is bad
Sample = dict[str, Any]
MakeMask = Callable[[Random], np.ndarray]
ChooseFrames = Callable[[int], np.ndarray]  # from how many there are


class Items(Protocol):
    """What a stream of training items is made from."""

    def __len__(self) -> int: ...

    def sample(self, epoch: int, index: int) -> Sample: ...


class PretrainClips:
    """Unlabelled clips: both views of one crop, and which tokens are hidden.

    ``sample`` gives "pixels" uint8 (T, size, size, 3), "tokenizer_input"
    uint8 (T, input_size, input_size, 3) and "mask" bool (D, h, w), True = hidden. Raises
    BadFile for a file that can't be read within ``timeout`` seconds (0: any time).
    """

    stream = Stream.VIDEO

    def __init__(
        self,
        entries: Sequence[Entry],
        *,
        frames: int,
        interval: int,
        size: int,
        short: tuple[int, int],
        input_size: int,
        mask: MakeMask,
        seed: int,
        jitter: float = 0.0,
        timeout: float = 0.0,
    ):
        self.entries: Sequence[Entry] = Entries(entries)
        self.frames, self.interval = frames, interval
        self.size, self.short, self.input_size = size, short, input_size
        self.mask, self.seed, self.jitter, self.timeout = mask, seed, jitter, timeout

    def __len__(self) -> int:
        return len(self.entries)

    def choose(self, epoch: int, index: int) -> ChooseFrames:
        """Make the function that chooses a sample's frames."""
        rng = numpy_generator(self.seed, Purpose.FRAMES, self.stream, epoch, index)
        return partial(sample_frames, length=self.frames, interval=self.interval, rng=rng)

    def read(self, epoch: int, index: int) -> np.ndarray:
        """Decode the frames of one sample."""
        return read_frames(self.entries[index].path, self.choose(epoch, index), self.timeout)

    def sample(self, epoch: int, index: int) -> Sample:
        key = (self.stream, epoch, index)
        pixels, view = augment.pretraining_views(
            self.read(epoch, index), self.size, self.input_size, self.short,
            numpy_generator(self.seed, Purpose.CROP, *key), jitter=self.jitter,
        )  # fmt: skip
        mask = self.mask(python_generator(self.seed, Purpose.MASK, *key))
        return {"pixels": pixels, "tokenizer_input": view, "mask": mask}


class PretrainImages(PretrainClips):
    """Unlabelled pictures: the same with one frame. Mask (1, h, w)."""

    stream = Stream.IMAGE

    def __init__(self, entries: Sequence[Entry], **settings: Any):
        super().__init__(entries, frames=1, interval=1, **settings)

    def read(self, epoch: int, index: int) -> np.ndarray:
        path = self.entries[index].path
        return with_timeout(self.timeout, partial(read_image, path), path)


class Pictures:
    """Pictures as a tokenizer in training sees them. ``sample`` gives
    "tokenizer_input" uint8 (v, v, 3).

    An entry is a picture file, or a film with the frame's number as label; the view is made as in
    pretraining.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        *,
        size: int,
        short: tuple[int, int],
        input_size: int,
        seed: int,
    ):
        self.entries: Sequence[Entry] = Entries(entries)
        self.size, self.short, self.input_size, self.seed = size, short, input_size, seed

    def __len__(self) -> int:
        return len(self.entries)

    def sample(self, epoch: int, index: int) -> Sample:
        path, frame = self.entries[index]
        is_picture = path.suffix.lower() in PICTURES
        frames = read_image(path) if is_picture else read_frames(path, lambda n: [frame])
        rng = numpy_generator(self.seed, Purpose.CROP, Stream.IMAGE, epoch, index)
        _, view = augment.pretraining_views(frames, self.size, self.input_size, self.short, rng)
        return {"tokenizer_input": view[0]}


class LabelledClips:
    """Clips with labels. ``sample`` gives "pixels" uint8 (T, size, size, 3) and "label".

    Sampling is "dense" (every ``interval``-th frame) or "uniform" (one of each of ``frames``
    segments of the video). In training the short side is resized to a random integer in ``short``
    and the crop is "random_resized" (released) or "random"; a flip in every second clip if
    ``flip``; RandAugment of (operations, magnitude); a box erased in a share ``erasing`` of the
    clips. Otherwise the centre of the middle clip. Raises BadFile for a file that can't be read
    within ``timeout`` seconds (0: any time).
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        *,
        frames: int,
        interval: int,
        size: int,
        short: tuple[int, int],
        seed: int,
        train: bool,
        flip: bool,
        crop: str = "random_resized",
        sampling: str = "dense",
        rand_augment: tuple[int, int] = (0, 0),
        erasing: float = 0.0,
        timeout: float = 0.0,
    ):
        if crop not in ("random_resized", "random"):
            raise ValueError(f"crop must be random_resized or random, got {crop!r}")
        if sampling not in ("dense", "uniform"):
            raise ValueError(f"sampling must be dense or uniform, got {sampling!r}")
        self.entries: Sequence[Entry] = Entries(entries)
        self.frames, self.interval, self.size, self.short = frames, interval, size, short
        self.seed, self.train, self.flip, self.crop = seed, train, flip, crop
        self.sampling, self.rand_augment, self.erasing = sampling, rand_augment, erasing
        self.timeout = timeout

    def __len__(self) -> int:
        return len(self.entries)

    def label(self, index: int) -> int:
        """Give a clip's class number."""
        return self.entries[index].label

    def choose(self, epoch: int, index: int) -> ChooseFrames:
        """Make the function that chooses a training sample's frames."""
        rng = numpy_generator(self.seed, Purpose.FRAMES, Stream.VIDEO, epoch, index)
        if self.sampling == "uniform":
            return partial(uniform_frames, length=self.frames, rng=rng)
        return partial(sample_frames, length=self.frames, interval=self.interval, rng=rng)

    def sample(self, epoch: int, index: int) -> Sample:
        if not self.train:
            return {"pixels": self.views(index, 1, 1)[0], "label": self.label(index)}
        path = self.entries[index].path
        frames = read_frames(path, self.choose(epoch, index), self.timeout)
        rng = numpy_generator(self.seed, Purpose.CROP, Stream.VIDEO, epoch, index)
        frames = augment.resize_short(frames, int(rng.integers(*self.short, endpoint=True)))
        if self.crop == "random":
            frames = augment.random_crop(frames, self.size, rng)
        else:
            frames = augment.random_resized_crop(frames, self.size, rng)
        if self.flip and rng.random() < 0.5:
            frames = augment.flip(frames)
        if self.rand_augment[0]:
            frames = augment.rand_augment(frames, *self.rand_augment, rng)
        if self.erasing:
            frames = augment.erase_box(frames, self.erasing, rng)
        return {"pixels": np.ascontiguousarray(frames), "label": self.label(index)}

    def views(self, index: int, num_clips: int, num_crops: int) -> np.ndarray:
        """Cut a test video into clips x crops: uint8 (V, T, size, size, 3), clip by clip.

        One crop is the centre; three lie along the long side, whose short side is then ``size``
        (released).
        """
        if num_crops not in (1, 3):
            raise ValueError(f"test crops must be 1 or 3, got {num_crops}")
        if self.sampling == "uniform" and num_clips != 1:
            raise ValueError(f"uniform sampling has 1 test clip, not {num_clips}: --test-clips 1")

        def choose(total: int) -> np.ndarray:
            if self.sampling == "uniform":
                return uniform_frames(total, self.frames)
            return eval_frames(total, self.frames, self.interval, num_clips).reshape(-1)

        frames = read_frames(self.entries[index].path, choose, self.timeout)
        short = self.size if num_crops == 3 else round(sum(self.short) / 2)
        frames = augment.resize_short(frames, short)
        cut = augment.three_crops if num_crops == 3 else _only_centre
        crops = np.stack(cut(frames, self.size)).reshape(
            num_crops, num_clips, self.frames, self.size, self.size, 3
        )
        return np.ascontiguousarray(crops.swapaxes(0, 1)).reshape(-1, *crops.shape[2:])


def _only_centre(frames: np.ndarray, size: int) -> list[np.ndarray]:
    return [augment.center_crop(frames, size)]


class Positions(Dataset):
    """An endless stream over a data set, addressed by position since the start of training.

    Position p is item ``p % n`` of epoch ``p // n``'s keyed permutation: batches may cross epochs,
    and each epoch shows every item once. A sample also holds its "position" and whether it was
    "replaced" (1; else 0) because its file is bad.
    """

    def __init__(self, items: Items, *, seed: int, stream: Stream, workers: int = 0):
        self.items, self.seed, self.stream, self.workers = items, seed, stream, workers
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.items)

    def fingerprint(self) -> str:
        """Tell what a resumed run must find again: how many items, and which."""
        entries = getattr(self.items, "entries", None)
        return entries.fingerprint() if isinstance(entries, Entries) else f"{len(self):,}"

    def index_at(self, position: int) -> tuple[int, int]:
        """Give (epoch, index) of a position."""
        epoch, place = divmod(position, len(self.items))
        if self._order is None or self._order[0] != epoch:
            rng = numpy_generator(self.seed, Purpose.ORDER, self.stream, epoch)
            self._order = epoch, rng.permutation(len(self.items))
        return epoch, int(self._order[1][place])

    def __getitem__(self, position: int) -> Sample:
        """Give the sample at a position, or in place of a bad file's another one.

        Which one is keyed by position and attempt, so that it depends on neither process, worker
        nor resume. One line on stderr names both. Raises the file's error after REPLACEMENTS.
        """
        epoch, index = self.index_at(position)
        attempt = 0
        while True:
            try:
                sample = self.items.sample(epoch, index)
                return {**sample, "position": position, "replaced": int(attempt > 0)}
            except BadFile as error:
                if attempt == REPLACEMENTS or len(self.items) == 1:
                    raise
                key = (self.stream, position, attempt)
                rng = numpy_generator(self.seed, Purpose.REPLACE, *key)
                index = (index + int(rng.integers(1, len(self.items)))) % len(self.items)
                attempt += 1
                entries = getattr(self.items, "entries", None)
                other = entries[index].path if entries else f"item {index}"
                sys.stderr.write(f"bad file: {error}; instead of it: {other}\n")


def step_batches(
    start: int, stop: int, global_batch: int, rank: int, world: int, micro_batch: int
) -> Iterator[list[int]]:
    """Give this process's micro-batches of positions for steps ``start`` .. ``stop`` - 1, in order.

    Step s sees positions [s * G, (s + 1) * G); each process takes one contiguous slice of it.
    """
    assert global_batch % (world * micro_batch) == 0, (global_batch, world, micro_batch)
    share = global_batch // world
    for step in range(start, stop):
        first = step * global_batch + rank * share
        for micro in range(first, first + share, micro_batch):
            yield list(range(micro, micro + micro_batch))
