"""Clips kept decoded: the frames that decoding gives, whatever interrupts the writing of them."""

import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from torch.utils.data import DataLoader

from bevt_lib import presets
from bevt_lib.base.seeds import Stream
from bevt_lib.cli import parse
from bevt_lib.datasets import decoded, sources, synthetic
from bevt_lib.datasets.decoded import Decoded
from bevt_lib.datasets.items import Positions
from bevt_lib.datasets.lists import Entry
from bevt_lib.datasets.video import read_frames, read_image

CLIP, STILL = Path("clips/val/00005.mp4"), Path("images/val/fruit/00004.jpg")


@pytest.fixture
def folder(tmp_path):
    """A rendered folder with some of its clips and stills, and nothing kept decoded."""
    for name in [CLIP, STILL, *(Path(f"clips/val/{i:05d}.mp4") for i in range(4))]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(synthetic.render() / name, tmp_path / name)
    return tmp_path


def reader(path, calls):
    """Give what reads a file, and notes that it did."""

    def read(choose):
        calls.append(path)
        return read_frames(path, choose) if path.suffix == ".mp4" else read_image(path)

    return read


def fail(choose):
    raise AssertionError("read again")


@pytest.mark.parametrize(("name", "shown"), [(CLIP, [3, 4, 4, 0, 15]), (STILL, [0])])
def test_kept_frames_are_the_decoded_ones_and_read_once(folder, name, shown):
    path, calls = folder / name, []
    expected = reader(path, [])(lambda total: np.array(shown))
    for read in (reader(path, calls), fail):
        mine = Decoded(folder).frames(path, lambda total: np.array(shown), read)
        assert mine.dtype == np.uint8 and np.array_equal(mine, expected)
    every = Decoded(folder).frames(path, np.arange, fail)
    assert np.array_equal(every, reader(path, [])(np.arange)) and len(calls) == 1


def test_a_black_picture_is_not_taken_for_a_hole(folder):
    black = np.zeros((1, synthetic.SIDE, synthetic.SIDE, 3), np.uint8)
    calls = []
    for _ in range(2):
        Decoded(folder).frames(folder / STILL, np.arange, lambda c: calls.append(c) or black)
    assert len(calls) == 1


@pytest.mark.parametrize("written", [0, 1, 300_000, 602_112, 602_239])
def test_a_clip_written_in_part_is_decoded_again(folder, written):
    """A kill or a power cut leaves the first bytes of a record, or some of its pages, as holes."""
    path, calls = folder / CLIP, []
    Decoded(folder).frames(path, np.arange, reader(path, calls))
    file, size = folder / "decoded" / "clips_val.rgb", 16 * 112 * 112 * 3 + 16 * 8
    with file.open("r+b") as out:
        out.seek(5 * size + written)
        out.write(bytes(size - written))
    for read in (reader(path, calls), fail):
        mine = Decoded(folder).frames(path, np.arange, read)
        assert np.array_equal(mine, read_frames(path, np.arange))
    assert len(calls) == 2 and file.stat().st_size == size * synthetic.CLIPS["val"]


def test_damaged_frames_alone_are_decoded_again(folder):
    path, calls = folder / CLIP, []
    Decoded(folder).frames(path, np.arange, reader(path, calls))
    records = np.memmap(folder / "decoded" / "clips_val.rgb", decoded.KINDS["clips"][1], "r+")
    records[5]["pixels"][7, :20] = 0
    Decoded(folder).frames(path, lambda total: np.array([6, 8]), fail)
    mine = Decoded(folder).frames(path, lambda total: np.array([7]), reader(path, calls))
    assert np.array_equal(mine, read_frames(path, lambda total: [7])) and len(calls) == 2


def test_without_room_or_file_frames_are_decoded_each_time(folder, monkeypatch):
    path, calls = folder / CLIP, []
    kept = Decoded(folder)
    kept.frames(folder / "clips/val/00000.mp4", np.arange, reader(path, []))
    shutil.rmtree(folder / "decoded")  # while a run goes on
    for _ in range(2):
        assert len(kept.frames(path, np.arange, reader(path, calls))) == 16
    assert len(calls) == 2 and not (folder / "decoded").exists()
    decoded._records.cache_clear()
    full = SimpleNamespace(free=decoded.SPARE)
    monkeypatch.setattr(decoded.shutil, "disk_usage", lambda path: full)
    for _ in range(2):
        kept.frames(path, np.arange, reader(path, calls))
    assert len(calls) == 4


def test_files_from_elsewhere_are_always_read(folder, tmp_path_factory):
    path, calls = tmp_path_factory.mktemp("own") / "00005.mp4", []
    shutil.copy(folder / CLIP, path)
    for _ in range(2):
        Decoded(folder).frames(path, np.arange, reader(path, calls))
    assert len(calls) == 2 and not (folder / "decoded").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_are_those_without(folder, workers):
    """Of all data sets, read twice, also by processes that fill the same file."""
    video = sources.pretraining_items(presets.lesson_joint(), "video", "val")
    image = sources.pretraining_items(presets.lesson_joint(), "image", "val")
    clip = sources.labelled_items(presets.lesson_what(), "val")
    for items, names in ((video, [0, 1, 2, 3, 5]), (clip, [0, 1, 2, 3, 5]), (image, [STILL])):
        items.entries = [Entry(folder / (n if items is image else f"clips/val/{n:05d}.mp4"), 0)
                         for n in names]  # fmt: skip
        positions = Positions(items, seed=0, stream=Stream.VIDEO)
        items.decoded = None
        expected = [positions[p] for p in range(20)]
        items.decoded = Decoded(folder)
        loader = DataLoader(positions, batch_sampler=[[p] for p in range(20)], num_workers=workers)
        for sample, batch in zip(expected, loader, strict=True):
            assert all(np.array_equal(batch[key][0], sample[key]) for key in sample)
    assert (folder / "decoded" / "images_val.rgb").exists()
    assert len(pickle.dumps(positions.items)) < 10_000  # no pixels go to spawned workers


def test_a_folder_that_cannot_be_written_is_told_in_one_line(folder):
    (folder / "decoded").touch()
    with pytest.raises(ValueError, match=r"decoded clips in .*: make it writable, or leave out --"):
        Decoded(folder).frames(folder / CLIP, np.arange, fail)


def test_decoded_data_are_kept_where_asked_and_told_in_one_line(capsys):
    what = presets.lesson_what()
    assert sources.labelled_items(what).decoded is None
    asked = parse(what, ["--data.decoded", "true"])
    items = {split: sources.labelled_items(asked, split) for split in ("train", "val")}
    assert {one.decoded for one in items.values()} == {Decoded(synthetic.render())}
    sources.print_origins(items)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[2].startswith("decoded clips and stills are kept in rendered/")
    assert "up to 4.3 GB" in lines[2]
    own = ["--data.decoded", "true", "--data.video-list", "l", "--data.val-list", "l"]
    with pytest.raises(ValueError, match=r"own and doesn't use --data\.decoded: leave"):
        sources.check_sources(parse(what, own))
    joint = parse(presets.lesson_joint(), own[:4])  # its pictures are embedded
    sources.check_sources(joint)
