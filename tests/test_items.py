"""Lists, samples and positions: keyed, complete, and clear about bad input."""

import pickle
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import av
import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from bevt_lib.base import files
from bevt_lib.base.config import ClipSpec
from bevt_lib.base.seeds import Purpose, Stream, python_generator
from bevt_lib.cli import parse
from bevt_lib.datasets import augment, sources, synthetic, video
from bevt_lib.datasets.items import (
    REPLACEMENTS,
    LabelledClips,
    Pictures,
    Positions,
    PretrainClips,
    PretrainImages,
    step_batches,
)
from bevt_lib.datasets.lists import Entries, Entry, read_image_folder, read_list
from bevt_lib.datasets.sampling import eval_frames
from bevt_lib.datasets.sources import pretraining_items
from bevt_lib.datasets.video import BadFile, write_video
from bevt_lib.model.masking import block_mask, tube_mask
from bevt_lib.presets import lesson_image, paper_diving48, paper_k400, paper_ssv2

SPEC = ClipSpec(frames=8, interval=1, size=96, short=(98, 112))


@pytest.fixture(scope="module")
def folder():
    return synthetic.render()


@pytest.fixture
def clips(folder):
    hide = partial(tube_mask, (4, 6, 6), target=18, length=(0.5, 0.75))
    entries = read_list(folder / "how_val.txt", folder)
    return PretrainClips(entries, SPEC, input_size=48, mask=hide, seed=0)


def same(a, b):
    return all(np.array_equal(a[k], b[k]) for k in a)


def test_a_sample_depends_on_its_key_alone(clips):
    assert same(clips.sample(3, 7), clips.sample(3, 7))
    assert not same(clips.sample(3, 7), clips.sample(4, 7))
    clips.seed = 1
    other = clips.sample(3, 7)
    clips.seed = 0
    assert not same(clips.sample(3, 7), other)


def test_streams_do_not_draw_alike(folder):
    hide = partial(tube_mask, (1, 6, 6), target=18)
    settings = {"spec": replace(SPEC, frames=1), "input_size": 48, "mask": hide, "seed": 0}
    images = PretrainImages(read_image_folder(folder / "images" / "val"), **settings)
    clips = PretrainClips(images.entries, **settings)
    masks = [(images.sample(0, i)["mask"], clips.mask) for i in range(3)]
    clips.read = images.read
    for index, (mask, _) in enumerate(masks):
        assert not np.array_equal(mask, clips.sample(0, index)["mask"])


def test_an_image_is_masked_by_one_block_mask():
    """The draws are those of block_mask: a tube of one time step adds none before them."""
    recipe = lesson_image()
    side = recipe.data.size // 16
    images = pretraining_items(recipe, "image", "val")
    for index in range(20):
        rng = python_generator(recipe.run.seed, Purpose.MASK, Stream.IMAGE, 3, index)
        block = block_mask((side, side), rng, target=recipe.masking.target((side, side)))
        mask = images.sample(3, index)["mask"]
        assert mask.shape == (1, side, side) and np.array_equal(mask[0], block)


@pytest.mark.parametrize("workers", [0, 2])
def test_worker_count_does_not_change_samples(clips, workers):
    positions = Positions(clips, seed=0, stream=Stream.VIDEO)
    batches = list(step_batches(0, 3, 4, 0, 1, 2))
    loader = DataLoader(positions, batch_sampler=batches, num_workers=workers)
    seen = [b["pixels"] for b in loader]
    expected = [torch.from_numpy(np.stack([positions[p]["pixels"] for p in b])) for b in batches]
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


def test_each_epoch_shows_every_item_once(clips):
    positions = Positions(clips, seed=0, stream=Stream.VIDEO)
    n = len(positions)
    first = [positions.index_at(p)[1] for p in range(n)]
    second = [positions.index_at(p)[1] for p in range(n, 2 * n)]
    assert sorted(first) == sorted(second) == list(range(n)) and first != second
    assert positions.index_at(n - 1)[0] == 0 and positions.index_at(n)[0] == 1
    assert [positions.index_at(p)[1] for p in range(n)] == first


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_share_a_global_batch_without_overlap(world):
    for step in range(2, 5):
        ranks = [list(step_batches(step, step + 1, 12, r, world, 2)) for r in range(world)]
        assert all(len(batch) == 2 for rank in ranks for batch in rank)
        together = [p for rank in ranks for batch in rank for p in batch]
        assert together == list(range(12 * step, 12 * step + 12))


def test_labelled_clips_are_not_flipped_for_how(folder):
    entries = read_list(folder / "how_val.txt", folder, num_classes=8)
    spec = replace(SPEC, short=(112, 112))
    plain = LabelledClips(entries, spec, seed=0, train=True, flip=False, crop="random")
    for epoch in range(6):
        out = plain.sample(epoch, 0)
        first = out["pixels"][0].astype(int)
        whole = synthetic.render_clip(synthetic.draw_scene("val", 0, *synthetic.labels("val", 0)))
        gaps = [
            np.abs(frame[y : y + 96, x : x + 96].astype(int) - first).mean()
            for frame in whole for y in range(0, 17, 2) for x in range(0, 17, 2)
        ]  # fmt: skip
        assert min(gaps) < 12 and out["label"] == entries[0].label


def test_views_are_clips_by_crops(folder):
    entries = read_list(folder / "what_val.txt", folder)
    items = LabelledClips(entries, replace(SPEC, clips=2, crops=3), seed=0, train=False)
    views = items.test_views(0)
    assert views.shape == (6, 8, 96, 96, 3) and np.array_equal(views, items.test_views(0, 2, 3))
    assert not np.array_equal(views[0], views[3])
    assert np.array_equal(items.sample(0, 0)["pixels"], items.sample(9, 0)["pixels"])


BAD_LISTS = {
    "missing": (None, "can't read"),
    "empty": ("\n\n", "empty"),
    "malformed": ("a.mp4 0\nb.mp4\n", "line 2"),
    "label out of range": ("a.mp4 0\nb.mp4 8\n", "line 2.*out of range 0..7"),
}


@pytest.mark.parametrize("kind", BAD_LISTS)
def test_bad_lists_name_file_and_line(tmp_path, kind):
    content, message = BAD_LISTS[kind]
    path = tmp_path / "list.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_list(path, tmp_path, num_classes=8)
    assert "list.txt" in str(error.value) and "\n" not in str(error.value)


def test_paths_may_hold_spaces_and_labels_may_be_missing_in_pretraining(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("a clip.mp4 3\nother.mp4\n")
    entries = read_list(path, tmp_path, labelled=False)
    assert [(e.path.name, e.label) for e in entries] == [("a clip.mp4", 3), ("other.mp4", -1)]


def test_an_image_folder_without_pictures_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no pictures found"):
        read_image_folder(tmp_path / "nothing")


def test_a_missing_video_is_named(clips, tmp_path):
    clips.entries = [Entry(tmp_path / "gone.mp4", 0)]
    with pytest.raises(BadFile, match=r"gone\.mp4"):
        clips.sample(0, 0)


STEP = 4  # grey levels from one frame of a counting film to the next


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    """Films whose pixels count: grey rises by STEP a frame and by half a level per column."""
    root = tmp_path_factory.mktemp("counting")
    ramp = np.broadcast_to(np.arange(96) / 2, (64, 96))[None, ..., None]
    for name, length in (("short.mp4", 10), ("long.mp4", 40)):
        grey = ramp + STEP * np.arange(length)[:, None, None, None]
        frames = np.rint(grey).astype(np.uint8).repeat(3, axis=-1)
        write_video(root / name, frames, crf=1)
    (root / "list.txt").write_text("short.mp4 0\nlong.mp4 1\n")
    return read_list(root / "list.txt", root, num_classes=2)


def frame_numbers(pixels, left=0):
    """Read the frame numbers back from crops of a counting film that start at column ``left``."""
    column = (left + np.arange(pixels.shape[2])) / 2
    level = pixels.astype(float).mean((1, 3)) - column[None]
    return np.rint(level.mean(1) / STEP).astype(int).tolist()


def whole_crops(entries, sampling="dense", **settings):
    """Labelled clips that are cropped at random from the films' own size."""
    spec = ClipSpec(frames=5, interval=3, size=64, short=(64, 64), sampling=sampling)
    return LabelledClips(entries, spec, seed=0, **settings)


def test_a_training_clip_holds_every_third_frame_and_wraps(counting):
    clips = whole_crops(counting, train=True, flip=False, crop="random")
    starts = set()
    for epoch in range(60):
        # Where a crop lies shifts all its frames by the same level: only differences count.
        film, short = (clips.sample(epoch, i)["pixels"].mean((1, 2, 3)) / STEP for i in (1, 0))
        assert np.rint(np.diff(film)).tolist() == [3, 3, 3, 3]
        assert np.rint(np.diff(short)).tolist() == [3, 3, 3, -7]  # frames 0 3 6 9 2
        starts.add(round(film[0]))
    assert len(starts) > 15
    assert clips.sample(0, 1)["label"] == 1


def test_test_views_are_clip_by_clip_start_end_middle(counting):
    items = whole_crops(counting, train=False, flip=False)
    views = items.test_views(1, 2, 3)
    starts = eval_frames(40, 5, 3, 2)[:, 0]
    for view, (start, left) in zip(
        views, [(s, left) for s in starts for left in (0, 32, 16)], strict=True
    ):
        assert frame_numbers(view, left) == [start + 3 * i for i in range(5)]
    centre = items.sample(0, 1)["pixels"]
    middle = eval_frames(40, 5, 3, 1)[0]
    assert frame_numbers(centre, 16) == middle.tolist()
    with pytest.raises(ValueError, match="1 or 3"):
        items.test_views(1, 1, 2)


@pytest.mark.parametrize(("flip", "share"), [(False, (0, 0)), (True, (0.35, 0.65))])
def test_clips_are_flipped_as_a_whole_and_only_where_asked(counting, flip, share):
    clips = whole_crops(counting, train=True, flip=flip, crop="random")
    mirrored = []
    for epoch in range(100):
        pixels = clips.sample(epoch, 1)["pixels"].astype(int)
        falls = pixels[:, :, 0].mean((1, 2)) > pixels[:, :, -1].mean((1, 2))
        assert falls.all() or not falls.any()
        mirrored.append(falls[0])
    assert share[0] <= np.mean(mirrored) <= share[1]


def test_pretraining_clips_take_frames_at_the_interval(counting):
    spec = ClipSpec(frames=4, interval=5, size=64, short=(64, 64))
    hide = partial(np.zeros, (2, 4, 4), bool)
    clips = PretrainClips(counting, spec, input_size=32, mask=lambda rng: hide(), seed=0)
    sample = clips.sample(0, 1)
    for part in ("pixels", "tokenizer_input"):
        grey = sample[part].astype(float).mean((1, 2, 3)) / STEP
        assert np.rint(np.diff(grey)).tolist() == [5, 5, 5]


def test_a_crop_must_be_named_rightly(counting):
    with pytest.raises(ValueError, match="random_resized or random, got 'center'"):
        whole_crops(counting, train=True, flip=False, crop="center")
    with pytest.raises(ValueError, match="one of dense, uniform, got 'unifrom'"):
        whole_crops(counting, train=True, flip=False, sampling="unifrom")


# The segments of the films of 10 and 40 frames cut in 5, by hand: 1.8 and 7.8 frames each.
BOUNDS = {0: [0, 2, 4, 5, 7, 9], 1: [0, 8, 16, 23, 31, 39]}


@pytest.mark.parametrize("index", BOUNDS)
def test_uniform_sampling_takes_a_frame_of_each_segment(counting, index):
    bounds = np.array(BOUNDS[index])
    settings = {"flip": False, "crop": "random", "sampling": "uniform"}
    clips = whole_crops(counting, train=True, **settings)
    steps = np.stack([
        np.rint(np.diff(clips.sample(epoch, index)["pixels"].mean((1, 2, 3)) / STEP))
        for epoch in range(60)
    ])  # fmt: skip  # where a crop lies shifts all frames by the same level
    assert (steps <= bounds[2:] - bounds[:-2]).all() and (steps >= 0).all()
    assert (steps.max(0) - steps.min(0) >= 0.5 * (bounds[2:] - bounds[:-2])).all()
    assert (np.abs(steps.mean(0) - (bounds[2:] - bounds[:-2]) / 2) < 1.3).all()
    tested = whole_crops(counting, train=False, **settings)
    middles = ((bounds[:-1] + bounds[1:]) // 2).tolist()
    for view, left in zip(tested.test_views(index, 1, 3), (0, 32, 16), strict=True):
        assert frame_numbers(view, left) == middles
    assert frame_numbers(tested.sample(0, index)["pixels"], 16) == middles
    with pytest.raises(ValueError, match=r"1 test clip, not 4: --test-clips 1$"):
        tested.test_views(index, 4, 3)


def test_a_box_is_erased_last_and_nothing_else_changes(counting):
    """Same frames, crop and flip as without; its colour is untouched by RandAugment."""
    plain, erased, both = (
        whole_crops(counting, train=True, flip=True, erasing=share, rand_augment=operations)
        for share, operations in ((0.0, (0, 0)), (1.0, (0, 0)), (1.0, (4, 7)))
    )
    for epoch in range(8):
        first, second, third = (c.sample(epoch, 1)["pixels"] for c in (plain, erased, both))
        box = (second == (124, 116, 104)).all(-1)  # the films are grey, it isn't
        assert 0.015 < box[0].mean() < 0.35 and (box == box[:1]).all()
        assert np.array_equal(first[~box], second[~box])
        assert 0.015 < (third == (124, 116, 104)).all(-1).mean() < 0.35
        assert np.array_equal(third, both.sample(epoch, 1)["pixels"])
    tested = whole_crops(counting, train=False, flip=True, erasing=1.0, rand_augment=(4, 7))
    assert frame_numbers(tested.sample(0, 1)["pixels"], 16) == eval_frames(40, 5, 3, 1)[0].tolist()


def test_augmented_clips_are_the_same_in_any_process(counting):
    clips = whole_crops(counting, train=True, flip=False, erasing=0.5, rand_augment=(4, 7))
    positions = Positions(clips, seed=0, stream=Stream.VIDEO)
    loader = DataLoader(positions, batch_sampler=[[p] for p in range(6)], num_workers=2)
    for position, batch in enumerate(loader):
        assert np.array_equal(batch["pixels"][0].numpy(), positions[position]["pixels"])


@pytest.mark.parametrize("recipe", [paper_ssv2(), paper_diving48()], ids=lambda r: r.task)
def test_paper_recipes_of_motion_read_a_list_as_released(counting, tmp_path, recipe):
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"{entry.path} {entry.label}\n" for entry in counting))
    data = replace(recipe.data, video_list=str(listed), val_list=str(listed), video_root="/")
    recipe = replace(recipe, data=data)
    items = sources.labelled_items(recipe)
    assert items.sample(0, 0)["pixels"].shape == (32, 224, 224, 3)  # of a film of 10 frames
    boxes = [(items.sample(e, 1)["pixels"] == (124, 116, 104)).all(-1)[0].mean() for e in range(24)]
    assert 1 <= sum(share > 0.015 for share in boxes) <= 12  # a quarter of them
    views = sources.labelled_items(recipe, "test").test_views(1)
    assert views.shape == (3, 32, 224, 224, 3)
    grey = views[2].astype(float).mean((1, 2, 3)) / STEP  # 0 to 39 from all over the film
    assert abs(grey[-1] - grey[0] - 38) <= 1
    assert recipe.optim.ema == pytest.approx(0.0015988806, abs=1e-9)  # 1 - 0.9998^8


def test_settings_that_can_not_work_are_refused_before_training():
    for words, message in (
        (["--rand-augment", "4,31"], "magnitude of 0 to 30"),
        (["--erasing", "25"], "0 to 1, got 25"),
    ):
        with pytest.raises(ValueError, match=message):
            parse(paper_ssv2(), words)
    recipe = parse(paper_k400(), ["--sampling", "uniform"])
    with pytest.raises(ValueError, match="1 test clip, not 4: --test-clips 1"):
        sources.labelled_items(recipe)


def test_a_pickled_data_set_gives_the_same_samples(clips):
    copy = pickle.loads(pickle.dumps(clips))
    assert same(copy.sample(2, 5), clips.sample(2, 5))


def test_workers_forked_after_decoding_still_decode(clips):
    """Long videos too: the decoders' and OpenCV's threads don't survive a fork."""
    films = sorted((files.data_folder() / "film").glob("*.mp4"))
    clips.entries = [Entry(film, -1) for film in films] * 2
    positions = Positions(clips, seed=0, stream=Stream.VIDEO)
    expected = [positions[p]["pixels"] for p in range(8)]
    loader = DataLoader(
        positions, batch_sampler=[[p] for p in range(8)], num_workers=2, timeout=60,
        multiprocessing_context="fork", worker_init_fn=augment.one_thread,
    )  # fmt: skip
    for batch, pixels in zip(loader, expected, strict=True):
        assert np.array_equal(batch["pixels"][0].numpy(), pixels)


def test_a_bad_file_in_a_worker_ends_in_its_own_line(clips, tmp_path):
    """The command prints the last line of what a loader process raises."""
    clips.entries = [Entry(tmp_path / "gone.mp4", -1)]
    loader = DataLoader(Positions(clips, seed=0, stream=Stream.VIDEO), batch_sampler=[[0]],
                        num_workers=1)  # fmt: skip
    with pytest.raises(ValueError) as error:
        list(loader)
    assert "gone.mp4: no such video file; check" in str(error.value).strip().splitlines()[-1]


def keyed(purpose, *key):
    """The generator of a key, written out."""
    return np.random.default_rng(np.random.SeedSequence([0, purpose, *key]))


@pytest.fixture
def one_bad(folder, clips, tmp_path):
    """Ten good clips and, in their middle, one whose file is gone."""
    entries = read_list(folder / "how_val.txt", folder)[:10]
    clips.entries = [*entries[:5], Entry(tmp_path / "gone.mp4", 5), *entries[5:]]
    return clips


def test_a_bad_file_is_replaced_in_a_keyed_way(one_bad, capfd):
    positions = Positions(one_bad, seed=0, stream=Stream.VIDEO)
    replaced = 0
    for position in range(33):  # three epochs
        epoch, index = positions.index_at(position)
        sample = positions[position]
        if index == 5:
            index = (5 + int(keyed(8, Stream.VIDEO, position, 0).integers(1, 11))) % 11
            replaced += 1
            line = capfd.readouterr().err
            assert line.count("\n") == 1 and line.startswith("bad file: ")
            assert "gone.mp4: no such video file" in line
            assert line.endswith(f"instead of it: {one_bad.entries[index].path}\n")
            assert sample["replaced"] == 1
        else:
            assert sample["replaced"] == 0
        assert sample["position"] == position and same(one_bad.sample(epoch, index), sample)
    assert replaced == 3 and capfd.readouterr().err == ""


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_replacements_depend_on_neither_workers_nor_resume(one_bad, workers):
    positions = Positions(one_bad, seed=0, stream=Stream.VIDEO)
    expected = [positions[p] for p in range(24)]
    for start in (0, 8):  # anew, and as a run that goes on at position 16
        loader = DataLoader(
            Positions(one_bad, seed=0, stream=Stream.VIDEO), num_workers=workers,
            batch_sampler=list(step_batches(start, 12, 2, 0, 1, 2)),
        )  # fmt: skip
        batches = list(loader)
        assert sum(int(b["replaced"].sum()) for b in batches) >= 1
        for number, batch in enumerate(batches, start):
            for key in ("pixels", "tokenizer_input", "mask", "position", "replaced"):
                mine = np.stack([expected[2 * number + i][key] for i in (0, 1)])
                assert np.array_equal(batch[key].numpy(), mine)


def test_good_files_are_never_replaced(clips, capfd):
    positions = Positions(clips, seed=0, stream=Stream.VIDEO)
    assert not any(positions[p]["replaced"] for p in range(0, 300, 9))
    assert capfd.readouterr().err == ""


def test_where_all_files_are_bad_the_last_error_is_raised(clips, tmp_path, capfd):
    clips.entries = [Entry(tmp_path / f"gone{i}.mp4", -1) for i in range(20)]
    with pytest.raises(BadFile, match=r"gone\d+\.mp4: no such video file"):
        Positions(clips, seed=0, stream=Stream.VIDEO)[0]
    assert capfd.readouterr().err.count("\n") == REPLACEMENTS


@pytest.mark.parametrize("error", [TypeError("a bug"), ValueError("a wrong setting")])
def test_other_errors_than_bad_files_are_raised(one_bad, monkeypatch, error):
    def fail(*arguments, **settings):
        raise error

    monkeypatch.setattr(augment, "pretraining_views", fail)
    with pytest.raises(type(error), match=str(error)):
        Positions(one_bad, seed=0, stream=Stream.VIDEO)[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_decoder_that_hangs_is_timed_out(one_bad, tmp_path, monkeypatch, capfd, workers):
    frames = video.Video.frames

    def hang(film, indices, decoder):
        if film.path.name == "hangs.mp4":
            time.sleep(30)
        return frames(film, indices, decoder)

    monkeypatch.setattr(video.Video, "frames", hang)
    (tmp_path / "hangs.mp4").write_bytes(one_bad.entries[0].path.read_bytes())
    one_bad.entries[5] = Entry(tmp_path / "hangs.mp4", 5)
    one_bad.timeout = 0.5
    positions = Positions(one_bad, seed=0, stream=Stream.VIDEO)
    began = time.monotonic()
    loader = DataLoader(positions, num_workers=workers, batch_sampler=[[p] for p in range(11)],
                        worker_init_fn=augment.one_thread)  # fmt: skip
    assert sum(int(batch["replaced"]) for batch in loader) == 1
    assert time.monotonic() - began < 15
    assert "hangs.mp4: not read after 0.5 s" in capfd.readouterr().err


def test_packed_entries_are_the_entries(tmp_path):
    (tmp_path / "list.txt").write_text("a b/é.mp4 3\n/else/ñ.mp4 -1\nc.mp4 0\n")
    entries = read_list(tmp_path / "list.txt", tmp_path, labelled=False)
    packed = pickle.loads(pickle.dumps(Entries(entries)))
    assert list(packed) == entries and len(packed) == 3 and not len(Entries([]))
    assert packed[-1] == entries[-1] and packed[1:] == entries[1:] and packed[::-2] == entries[::-2]
    assert packed[0].path == tmp_path / "a b" / "é.mp4"
    for outside in (3, -4):
        with pytest.raises(IndexError):
            packed[outside]


def test_a_list_is_told_by_its_names_labels_and_order():
    def fingerprint(*pairs, root="/here"):
        return Entries([Entry(Path(root) / name, label) for name, label in pairs]).fingerprint()

    one = fingerprint(("a/x.mp4", 0), ("b/yy.mp4", 1))
    assert one == fingerprint(("a/x.mp4", 0), ("c/yy.mp4", 1), root="/there") and one.startswith(
        "2 ("
    )
    swapped = fingerprint(("b/yy.mp4", 1), ("a/x.mp4", 0))
    relabelled = fingerprint(("a/x.mp4", 1), ("b/yy.mp4", 1))
    renamed = fingerprint(("a/x.mp", 0), ("b/4yy.mp4", 1))
    others = {one, swapped, relabelled, renamed, fingerprint(("a/x.mp4", 0))}
    assert len(others) == 5
    items = SimpleNamespace(entries=Entries([Entry(Path("x.mp4"), 0)]))
    assert Positions(items, seed=0, stream=Stream.VIDEO).fingerprint() == fingerprint(("x.mp4", 0))


@pytest.fixture(scope="module")
def kinetics_film(tmp_path_factory):
    """A film of 340x256 as Kinetics is re-encoded: moving, grained, with B-frames."""
    path = tmp_path_factory.mktemp("films") / "film.mp4"
    rng = np.random.default_rng(0)
    large = cv2.resize(rng.integers(0, 256, (6, 9, 3)).astype(np.uint8), (400, 256))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 340, 256, "yuv420p"
        for number in range(150):
            grain = rng.integers(-5, 6, (256, 340, 1))
            picture = np.clip(np.roll(large, number, 1)[:, :340] + grain, 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        every = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    return path, every


@pytest.mark.parametrize("decoder", ["auto", "decord"])
def test_pretraining_samples_equal_a_slow_plain_version(kinetics_film, decoder):
    """All frames decoded, all resized whole, then cut, mirrored and shrunk one by one."""
    if decoder == "decord":
        pytest.importorskip("decord")  # has no wheel for some machines
    path, every = kinetics_film
    spec = ClipSpec(frames=16, interval=8, size=224, short=(256, 320))
    items = PretrainClips([Entry(path, -1)], spec, input_size=112, mask=lambda rng: 0, seed=0,
                          timeout=60, decoder=decoder)  # fmt: skip
    flips = 0
    for epoch in range(6):
        rng = keyed(1, Stream.VIDEO, epoch, 0)
        frames = every[rng.integers(0, 150 - 16 * 8 + 1) + 8 * np.arange(16)]
        rng = keyed(2, Stream.VIDEO, epoch, 0)
        short = int(rng.integers(256, 321))
        width = int(340 * short / 256 + 0.5)
        top, left = rng.integers(0, short - 224 + 1), rng.integers(0, width - 224 + 1)
        flipped = rng.random() < 0.5
        flips += flipped
        sample = items.sample(epoch, 0)
        for frame, mine, small in zip(
            frames, sample["pixels"], sample["tokenizer_input"], strict=True
        ):
            large = cv2.resize(frame, (width, short), interpolation=cv2.INTER_CUBIC)
            cut = large[top : top + 224, left : left + 224]
            cut = np.ascontiguousarray(cut[:, ::-1] if flipped else cut)
            assert np.array_equal(mine, cut)
            shrunk = cv2.resize(cut, (112, 112), interpolation=cv2.INTER_LANCZOS4)
            assert np.array_equal(small, shrunk)
    assert 0 < flips < 6


def test_fine_tuning_samples_equal_a_slow_plain_version(kinetics_film):
    path, every = kinetics_film
    spec = ClipSpec(frames=32, interval=2, size=224, short=(256, 256))
    items = LabelledClips([Entry(path, 7)], spec, seed=0, train=True, flip=True, timeout=60)
    for epoch in range(6):
        rng = keyed(1, Stream.VIDEO, epoch, 0)
        frames = every[rng.integers(0, 150 - 32 * 2 + 1) + 2 * np.arange(32)]
        rng = keyed(2, Stream.VIDEO, epoch, 0)
        rng.integers(256, 257)
        while True:
            area = rng.uniform(0.08, 1.0) * 256 * 340
            aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
            wide, high = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
            if wide <= 340 and high <= 256:
                break
        top, left = rng.integers(0, 256 - high + 1), rng.integers(0, 340 - wide + 1)
        flipped = rng.random() < 0.5
        sample = items.sample(epoch, 0)
        assert sample["label"] == 7
        for frame, mine in zip(frames, sample["pixels"], strict=True):
            cut = np.ascontiguousarray(frame[top : top + high, left : left + wide])
            small = cv2.resize(cut, (224, 224), interpolation=cv2.INTER_LINEAR)
            assert np.array_equal(mine, small[:, ::-1] if flipped else small)


def test_a_run_that_starts_later_sees_the_same_tail():
    everything = list(step_batches(0, 9, 12, 1, 2, 3))
    assert list(step_batches(5, 9, 12, 1, 2, 3)) == everything[5 * 2 :]


def test_streams_are_shuffled_apart(clips):
    orders = [
        [Positions(clips, seed=seed, stream=stream).index_at(p)[1] for p in range(len(clips))]
        for seed, stream in ((0, Stream.VIDEO), (0, Stream.IMAGE), (1, Stream.VIDEO))
    ]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        agreeing = np.mean(np.array(orders[i]) == np.array(orders[j]))
        assert agreeing < 0.05  # two unrelated orders agree at one place on average


def test_pictures_for_the_tokenizer_come_from_files_and_films(counting, tmp_path):
    grey = np.full((70, 80, 3), 77, np.uint8)
    Image.fromarray(grey).save(tmp_path / "a.png")
    film = counting[1].path
    pictures = Pictures([Entry(tmp_path / "a.png", 0), Entry(film, 3), Entry(film, 30)],
                        replace(SPEC, size=64, short=(64, 64)), input_size=24, seed=0)  # fmt: skip
    views = [pictures.sample(1, i)["tokenizer_input"] for i in range(3)]
    assert all(view.shape == (24, 24, 3) for view in views)
    assert (views[0] == 77).all()
    between = views[2].astype(float).mean() - views[1].astype(float).mean()
    assert abs(between - 27 * STEP) < 20  # crops may differ by 32 columns, 16 levels


def test_lists_may_hold_tabs_marks_and_windows_line_ends(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeffa b.mp4\t3\r\n\r\nsub/é.mp4 0\r\n".encode())
    entries = read_list(path, tmp_path, num_classes=4)
    assert entries == [Entry(tmp_path / "a b.mp4", 3), Entry(tmp_path / "sub" / "é.mp4", 0)]


@pytest.mark.parametrize("classes", [None, 8])
def test_negative_labels_are_refused_where_labels_matter(tmp_path, classes):
    path = tmp_path / "list.txt"
    path.write_text("a.mp4 1\nb.mp4 -1\n")
    with pytest.raises(ValueError, match=r"list\.txt, line 2: label -1 is out of range"):
        read_list(path, tmp_path, num_classes=classes)
    assert read_list(path, tmp_path, labelled=False)[1] == Entry(tmp_path / "b.mp4", -1)


def test_image_folders_are_numbered_by_sorted_class(tmp_path):
    for name in ("zebra/b.JPEG", "zebra/a.png", "ant/c.jpg", ".cache/d.jpg", "ant/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    entries = read_image_folder(tmp_path)
    assert [(str(e.path.relative_to(tmp_path)), e.label) for e in entries] == [
        ("ant/c.jpg", 0), ("zebra/a.png", 1), ("zebra/b.JPEG", 1)
    ]  # fmt: skip
