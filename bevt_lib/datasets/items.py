"""Samples made from lists of clips and pictures, and the order in which training sees them.

A data set is a picklable object with ``sample(epoch, index)``: a dict of arrays that depends on
(seed, stream, epoch, index) and nothing else, so that workers, processes and resume change nothing.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from random import Random
from typing import Any, ClassVar, Protocol

import numpy as np
from torch.utils.data import Dataset

from bevt_lib.base.config import ClipSpec
from bevt_lib.base.seeds import Purpose, Stream, numpy_generator, python_generator
from bevt_lib.datasets import augment, sampling
from bevt_lib.datasets.decoded import Decoded
from bevt_lib.datasets.lists import VIDEOS, Entries, Entry
from bevt_lib.datasets.video import BadFile, ChooseFrames, read_frames, read_image, with_timeout

REPLACEMENTS = 4  # other items tried in place of one whose file is bad
Sample = dict[str, Any]
MakeMask = Callable[[Random], np.ndarray]


class Items(Protocol):
    """What a stream of training items is made from."""

    def __len__(self) -> int: ...

    def sample(self, epoch: int, index: int) -> Sample: ...


@dataclass(eq=False)
class Clips:
    """What the data sets below share: entries, how clips are cut (``spec``), how files are read.

    Reading raises BadFile for a file that can't be read within ``timeout`` seconds (0: any time).
    What is embedded may be kept ``decoded``. ``origin`` says how many entries there are and where
    they come from.
    """

    entries: Sequence[Entry]
    spec: ClipSpec
    _: KW_ONLY
    seed: int
    timeout: float = 0.0
    decoder: str = "auto"
    decoded: Decoded | None = None
    origin: str = ""
    stream: ClassVar[Stream] = Stream.VIDEO

    def __post_init__(self) -> None:
        self.entries = Entries(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def rng(self, purpose: Purpose, epoch: int, index: int) -> np.random.Generator:
        """Make the generator of a sample."""
        return numpy_generator(self.seed, purpose, self.stream, epoch, index)

    def choose(self, epoch: int, index: int) -> ChooseFrames:
        """Make the function that chooses a training sample's frames."""
        length, rng = self.spec.frames, self.rng(Purpose.FRAMES, epoch, index)
        if self.spec.sampling == "uniform":
            return partial(sampling.uniform_frames, length=length, rng=rng)
        interval = self.spec.interval
        return partial(sampling.sample_frames, length=length, interval=interval, rng=rng)

    def decode(self, index: int, choose: ChooseFrames) -> np.ndarray:
        """Decode the chosen frames of a video."""
        path = self.entries[index].path
        read = partial(read_frames, path, timeout=self.timeout, decoder=self.decoder)
        return self.decoded.frames(path, choose, read) if self.decoded else read(choose)


@dataclass(eq=False)
class PretrainClips(Clips):
    """Unlabelled clips: pixels, the same crop for the tokenizer, and which tokens are hidden.

    ``sample`` gives "pixels" uint8 (T, size, size, 3), "tokenizer_input"
    uint8 (T, input_size, input_size, 3) and "mask" bool (D, h, w), True = hidden.
    """

    _: KW_ONLY
    input_size: int
    mask: MakeMask | None = None
    jitter: float = 0.0

    def read(self, epoch: int, index: int) -> np.ndarray:
        """Decode the frames of one sample."""
        return self.decode(index, self.choose(epoch, index))

    def cut(self, epoch: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Cut one sample: what the model sees, and the same for the tokenizer."""
        return augment.pretraining_views(
            self.read(epoch, index), self.spec.size, self.input_size, self.spec.short,
            self.rng(Purpose.CROP, epoch, index), jitter=self.jitter,
        )  # fmt: skip

    def sample(self, epoch: int, index: int) -> Sample:
        assert self.mask
        pixels, small = self.cut(epoch, index)
        mask = self.mask(python_generator(self.seed, Purpose.MASK, self.stream, epoch, index))
        return {"pixels": pixels, "tokenizer_input": small, "mask": mask}


class PretrainImages(PretrainClips):
    """Unlabelled pictures: the same with one frame. Mask (1, h, w)."""

    stream: ClassVar[Stream] = Stream.IMAGE

    def read(self, epoch: int, index: int) -> np.ndarray:
        path = self.entries[index].path

        def read(choose: ChooseFrames) -> np.ndarray:
            return with_timeout(self.timeout, partial(read_image, path), path)

        return self.decoded.frames(path, np.arange, read) if self.decoded else read(np.arange)


class Pictures(PretrainImages):
    """Pictures for training a tokenizer. ``sample`` gives "tokenizer_input" uint8 (v, v, 3).

    An entry is a picture file, or a video with the frame's number as label; it is cut as in
    pretraining.
    """

    def read(self, epoch: int, index: int) -> np.ndarray:
        path, frame = self.entries[index]
        if path.suffix[1:].lower() in VIDEOS:
            return self.decode(index, lambda total: np.array([frame]))
        return super().read(epoch, index)

    def sample(self, epoch: int, index: int) -> Sample:
        return {"tokenizer_input": self.cut(epoch, index)[1][0]}


@dataclass(eq=False)
class LabelledClips(Clips):
    """Clips with labels. ``sample`` gives "pixels" uint8 (T, size, size, 3) and "label".

    In training the short side is resized to a random integer in ``spec.short`` and the crop is
    "random_resized" (released) or "random"; then a flip of every second clip if ``flip``;
    RandAugment of (operations, magnitude); a box erased in a share ``erasing`` of the clips.
    Otherwise the centre of the middle clip.
    """

    _: KW_ONLY
    train: bool
    flip: bool = False
    crop: str = "random_resized"
    rand_augment: tuple[int, int] = (0, 0)
    erasing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crop not in ("random_resized", "random"):
            raise ValueError(f"crop must be random_resized or random, got {self.crop!r}")

    def label(self, index: int) -> int:
        """Give a clip's class number."""
        return self.entries[index].label

    def sample(self, epoch: int, index: int) -> Sample:
        if not self.train:
            return {"pixels": self.test_views(index, 1, 1)[0], "label": self.label(index)}
        frames = self.decode(index, self.choose(epoch, index))
        rng = self.rng(Purpose.CROP, epoch, index)
        frames = augment.resize_short(frames, int(rng.integers(*self.spec.short, endpoint=True)))
        cut = augment.random_crop if self.crop == "random" else augment.random_resized_crop
        frames = cut(frames, self.spec.size, rng)
        if self.flip and rng.random() < 0.5:
            frames = augment.flip(frames)
        if self.rand_augment[0]:
            frames = augment.rand_augment(frames, *self.rand_augment, rng)
        if self.erasing:
            frames = augment.erase_box(frames, self.erasing, rng)
        return {"pixels": np.ascontiguousarray(frames), "label": self.label(index)}

    def test_views(self, index: int, clips: int = 0, crops: int = 0) -> np.ndarray:
        """Cut a test video into clips x crops: uint8 (V, T, size, size, 3), clip by clip.

        0: as many as ``spec`` says. One crop is the centre; three lie along the long side, whose
        short side is then ``size`` (released).
        """
        spec = replace(self.spec, clips=clips or self.spec.clips, crops=crops or self.spec.crops)

        def choose(total: int) -> np.ndarray:
            if spec.sampling == "uniform":
                return sampling.uniform_frames(total, spec.frames)
            return sampling.eval_frames(total, spec.frames, spec.interval, spec.clips).ravel()

        frames = self.decode(index, choose)
        three = spec.crops == 3
        frames = augment.resize_short(frames, spec.size if three else round(sum(spec.short) / 2))
        cut = augment.three_crops if three else augment.center_crop
        views = np.reshape(cut(frames, spec.size), (spec.crops, spec.clips, spec.frames, -1))
        return views.swapaxes(0, 1).reshape(-1, spec.frames, spec.size, spec.size, 3)


class Positions(Dataset):
    """An endless stream over a data set, addressed by position since the start of training.

    Position p is item ``p % n`` of epoch ``p // n``'s keyed permutation: batches may cross epochs,
    and each epoch shows every item once. A sample also holds its "position" and whether it was
    "replaced" (1; else 0) because its file is bad.
    """

    def __init__(self, items: Items, *, seed: int, stream: Stream, workers: int = 0):
        self.items, self.seed, self.stream, self.workers = items, seed, stream, workers
        self.entries: Sequence[Entry] | None = getattr(items, "entries", None)
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.items)

    def fingerprint(self) -> str:
        """Sum up what a resumed run must find again: how many items, and which."""
        entries = self.entries
        return entries.fingerprint() if isinstance(entries, Entries) else f"{len(self):,}"

    def name(self, index: int) -> str:
        """Name an item: its file's path, if it has one."""
        return str(self.entries[index].path) if self.entries else f"item {index}"

    def index_at(self, position: int) -> tuple[int, int]:
        """Give (epoch, index) of a position."""
        epoch, place = divmod(position, len(self.items))
        if self._order is None or self._order[0] != epoch:
            rng = numpy_generator(self.seed, Purpose.ORDER, self.stream, epoch)
            self._order = epoch, rng.permutation(len(self.items))
        return epoch, int(self._order[1][place])

    def __getitem__(self, position: int) -> Sample:
        """Give the sample at a position, or another item's if its file is bad.

        Which other is keyed by position and attempt, so it depends on neither process, worker nor
        resume. One line on stderr names both. Raises the file's error after REPLACEMENTS tries.
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
                rng = numpy_generator(self.seed, Purpose.REPLACE, self.stream, position, attempt)
                index = (index + int(rng.integers(1, len(self.items)))) % len(self.items)
                attempt += 1
                sys.stderr.write(f"bad file: {error}; instead of it: {self.name(index)}\n")


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
