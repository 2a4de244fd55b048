"""The rendered clips and stills, kept decoded on disk after they were read for the first time.

One file per split, beside what it was decoded from and as long-lived:

    rendered/<version>/decoded/clips_train.rgb      a record per clip: its pixels, a sum per frame

A record that was never or not wholly written has other sums than its pixels, and is decoded again.
Any number of processes may share the files: all write the same bytes.
"""

import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from bevt_lib.datasets.synthetic import CLIPS, FRAMES, SIDE, STILLS
from bevt_lib.datasets.video import ChooseFrames

SPARE = 2e9  # bytes that are left free on the disk
KINDS = {  # of items: how many per split, and what is kept of one
    kind: (counts, np.dtype([("pixels", "u1", (frames, SIDE, SIDE, 3)), ("sums", "u8", (frames,))]))
    for kind, counts, frames in (("clips", CLIPS, FRAMES), ("images", STILLS, 1))
}


@dataclass(frozen=True)
class Decoded:
    """What is kept of a folder that :func:`synthetic.render` made."""

    folder: Path

    def __str__(self) -> str:
        size = sum(sum(counts.values()) * record.itemsize for counts, record in KINDS.values())
        return (f"decoded clips and stills are kept in rendered/{self.folder.name}/decoded: up to "
                f"{size / 1e9:.1f} GB, while {SPARE / 1e9:.0f} GB stay free")  # fmt: skip

    def frames(
        self, path: Path, choose: ChooseFrames, read: Callable[[ChooseFrames], np.ndarray]
    ) -> np.ndarray:
        """Give the frames that ``read(choose)`` gives of a file: uint8 (T, H, W, 3).

        A file of the folder is read by ``read`` only the first time, any other always.
        """
        if not path.is_relative_to(self.folder):
            return read(choose)
        kind, split = path.relative_to(self.folder).parts[:2]
        file = self.folder / "decoded" / f"{kind}_{split}.rgb"
        record = _records(file, kind, split)[int(path.stem)]
        chosen = choose(len(record["sums"]))
        sums = record["sums"][chosen]
        if sums.all() and (_sums(pixels := record["pixels"][chosen]) == sums).all():
            return pixels
        whole = read(np.arange)
        with suppress(OSError):  # the disk is full, or the file was removed: read it next time
            if shutil.disk_usage(file.parent).free > SPARE:
                with file.open("r+b") as out:
                    out.seek(int(path.stem) * record.nbytes)
                    whole.tofile(out)
                    _sums(whole).tofile(out)
        return whole[chosen]


def _sums(pixels: np.ndarray) -> np.ndarray:
    """Add up the bytes of each frame, eight at a time: uint64 (T,). Not 0 for black, as holes."""
    return pixels.reshape(len(pixels), -1).view(np.uint64).sum(1) + np.uint64(1)


@lru_cache
def _records(file: Path, kind: str, split: str) -> np.ndarray:
    """Map a file; it starts as one hole as large as all of its records.

    Raises ValueError where it can't be written.
    """
    counts, record = KINDS[kind]
    try:
        file.parent.mkdir(exist_ok=True)
        with file.open("ab") as out:
            out.truncate(counts[split] * record.itemsize)
    except OSError as error:
        what = f"can't keep decoded clips in {file.parent} ({error.strerror})"
        raise ValueError(f"{what}: make it writable, or leave out --data.decoded") from None
    return np.memmap(file, record, "r", shape=(counts[split],))
