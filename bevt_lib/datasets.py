"""Lists of clips and pictures, and the samples made from them.

A data set is a picklable object with ``sample(epoch, index)``: a dict of arrays that depends on
(seed, stream, epoch, index) and on nothing else, so that neither worker, process nor resume shows.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch.utils.data import Dataset

from bevt_lib import augment
from bevt_lib.seeds import Purpose, Stream, numpy_generator, python_generator
from bevt_lib.video import Video, read_image, sample_frames, test_frames, uniform_frames

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
Sample = dict[str, Any]
MakeMask = Callable[[Random], np.ndarray]


class Entry(NamedTuple):
    """One line of a list."""

    path: Path
    label: int


class Items(Protocol):
    """What a stream of training items is made from."""

    def __len__(self) -> int: ...

    def sample(self, epoch: int, index: int) -> Sample: ...


def read_list(
    path: Path, root: Path, *, num_classes: int | None = None, labelled: bool = True
) -> list[Entry]:
    """Read a Kinetics-style list: one ``path label`` a line, paths relative to ``root``.

    A path may hold spaces: the label is the last word. With ``labelled=False`` a line may be a bare
    path (label -1). Raises ValueError naming file, line and fix for a missing or empty list, a
    malformed line, or a label outside 0 .. num_classes - 1.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise ValueError(f"{path}: can't read this list ({reason}); give another") from None
    entries = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, label = line.strip(), -1
        words = name.rsplit(maxsplit=1)
        if len(words) == 2 and words[1].removeprefix("-").isdecimal():
            name, label = words[0], int(words[1])
        elif labelled:
            raise ValueError(
                f"{path}, line {number}: {name[:60]!r} is not `path label`: write the video's "
                "path, a space and the class number"
            )
        if labelled and not 0 <= label < (num_classes or math.inf):
            known = f"0..{num_classes - 1}" if num_classes else "0, 1, 2, ..."
            raise ValueError(
                f"{path}, line {number}: label {label} is out of range {known}: correct the list "
                "or set --num-classes"
            )
        entries.append(Entry(Path(root) / name, label))
    if not entries:
        raise ValueError(f"{path}: the list is empty: write one `path label` a line")
    return entries


def read_image_folder(root: Path) -> list[Entry]:
    """List pictures in the ImageNet layout root/<class>/<picture>, sorted.

    Raises ValueError where the folder is missing or holds no picture.
    """
    root = Path(root)
    folders = root.iterdir() if root.is_dir() else []
    classes = sorted(p for p in folders if p.is_dir() and not p.name.startswith("."))
    entries = [
        Entry(picture, label)
        for label, folder in enumerate(classes)
        for picture in sorted(folder.iterdir())
        if picture.suffix.lower() in PICTURES
    ]
    if not entries:
        raise ValueError(f"{root}: no pictures found: lay them out as {root}/<class>/<name>.jpg")
    return entries


class PretrainClips:
    """Unlabelled clips: both views of one crop, and which tokens are hidden.

    ``sample`` gives "pixels" uint8 (T, size, size, 3), "view" uint8 (T, view_size, view_size, 3)
    and "mask" bool (D, h, w), True = hidden. Raises VideoError for a file that can't be decoded.
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
        view_size: int,
        mask: MakeMask,
        seed: int,
        jitter: float = 0.0,
    ):
        self.entries = list(entries)
        self.frames, self.interval = frames, interval
        self.size, self.short, self.view_size = size, short, view_size
        self.mask, self.seed, self.jitter = mask, seed, jitter

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, path: Path, key: tuple[int, ...]) -> np.ndarray:
        """Decode the frames of one sample."""
        video = Video(path)
        rng = numpy_generator(self.seed, Purpose.FRAMES, *key)
        return video.frames(sample_frames(len(video), self.frames, self.interval, rng))

    def sample(self, epoch: int, index: int) -> Sample:
        key = (self.stream, epoch, index)
        pixels, view = augment.pretraining_views(
            self.read(self.entries[index].path, key), self.size, self.view_size, self.short,
            numpy_generator(self.seed, Purpose.CROP, *key), jitter=self.jitter,
        )  # fmt: skip
        mask = self.mask(python_generator(self.seed, Purpose.MASK, *key))
        return {"pixels": pixels, "view": view, "mask": mask}


class PretrainImages(PretrainClips):
    """Unlabelled pictures: the same with one frame. Mask (1, h, w)."""

    stream = Stream.IMAGE

    def __init__(self, entries: Sequence[Entry], **settings: Any):
        super().__init__(entries, frames=1, interval=1, **settings)

    def read(self, path: Path, key: tuple[int, ...]) -> np.ndarray:
        return read_image(path)


class Pictures:
    """Pictures as a tokenizer in training sees them. ``sample`` gives "view" uint8 (v, v, 3).

    An entry is a picture file, or a film with the frame's number as label; the view is made as in
    pretraining.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        *,
        size: int,
        short: tuple[int, int],
        view_size: int,
        seed: int,
    ):
        self.entries = list(entries)
        self.size, self.short, self.view_size, self.seed = size, short, view_size, seed

    def __len__(self) -> int:
        return len(self.entries)

    def sample(self, epoch: int, index: int) -> Sample:
        path, frame = self.entries[index]
        is_picture = path.suffix.lower() in PICTURES
        frames = read_image(path) if is_picture else Video(path).frames([frame])
        rng = numpy_generator(self.seed, Purpose.CROP, Stream.IMAGE, epoch, index)
        _, view = augment.pretraining_views(frames, self.size, self.view_size, self.short, rng)
        return {"view": view[0]}


class LabelledClips:
    """Clips with labels. ``sample`` gives "pixels" uint8 (T, size, size, 3) and "label".

    Sampling is "dense" (every ``interval``-th frame) or "uniform" (one of each of ``frames``
    segments of the video). In training the short side is resized to a random integer in ``short``
    and the crop is "random_resized" (released) or "random"; a flip in every second clip if
    ``flip``; RandAugment of (operations, magnitude); a box erased in a share ``erasing`` of the
    clips. Otherwise the centre of the middle clip. Raises VideoError for a file that can't be
    decoded.
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
    ):
        if crop not in ("random_resized", "random"):
            raise ValueError(f"crop must be random_resized or random, got {crop!r}")
        if sampling not in ("dense", "uniform"):
            raise ValueError(f"sampling must be dense or uniform, got {sampling!r}")
        self.entries = list(entries)
        self.frames, self.interval, self.size, self.short = frames, interval, size, short
        self.seed, self.train, self.flip, self.crop = seed, train, flip, crop
        self.sampling, self.rand_augment, self.erasing = sampling, rand_augment, erasing

    def __len__(self) -> int:
        return len(self.entries)

    def label(self, index: int) -> int:
        """Give a clip's class number."""
        return self.entries[index].label

    def sample(self, epoch: int, index: int) -> Sample:
        if not self.train:
            return {"pixels": self.views(index, 1, 1)[0], "label": self.label(index)}
        key = (Stream.VIDEO, epoch, index)
        video = Video(self.entries[index].path)
        rng = numpy_generator(self.seed, Purpose.FRAMES, *key)
        if self.sampling == "uniform":
            chosen = uniform_frames(len(video), self.frames, rng)
        else:
            chosen = sample_frames(len(video), self.frames, self.interval, rng)
        frames = video.frames(chosen)
        rng = numpy_generator(self.seed, Purpose.CROP, *key)
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
        video = Video(self.entries[index].path)
        if self.sampling == "uniform":
            chosen = uniform_frames(len(video), self.frames)
        else:
            chosen = test_frames(len(video), self.frames, self.interval, num_clips)
        frames = video.frames(chosen.reshape(-1))
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
    and each epoch shows every item once. A sample also holds its "position".
    """

    def __init__(self, items: Items, *, seed: int, stream: Stream, workers: int = 0):
        self.items, self.seed, self.stream, self.workers = items, seed, stream, workers
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.items)

    def index_at(self, position: int) -> tuple[int, int]:
        """Give (epoch, index) of a position."""
        epoch, place = divmod(position, len(self.items))
        if self._order is None or self._order[0] != epoch:
            rng = numpy_generator(self.seed, Purpose.ORDER, self.stream, epoch)
            self._order = epoch, rng.permutation(len(self.items))
        return epoch, int(self._order[1][place])

    def __getitem__(self, position: int) -> Sample:
        return {**self.items.sample(*self.index_at(position)), "position": position}


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
