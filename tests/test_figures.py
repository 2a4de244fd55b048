"""The record of real tiny runs, read and drawn; codebooks, looked up."""

import io
import json
from collections import Counter

import numpy as np
import pytest
import tiny_run
import torch
from PIL import Image

from bevt_lib.datasets import sources, synthetic
from bevt_lib.notebook import figures
from bevt_lib.notebook.figures import (
    describe_id,
    draw_clips,
    has_cut,
    id_tiles,
    read_run,
    show_rows,
    show_runs,
    typical_cells,
)
from bevt_lib.notebook.widgets import id_explorer
from bevt_lib.presets import lesson_joint

STEPS, SHORT = 12, 7


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of a run and of a shorter one, whose record is torn in its last line."""
    whole, torn = (tmp_path_factory.mktemp(name) for name in ("whole", "torn"))
    history = tiny_run.run(str(whole), STEPS)
    tiny_run.run(str(torn), STEPS, stop_after=SHORT + 1, seed=1)
    record = torn / "metrics.jsonl"
    record.write_text(record.read_text()[:-40])
    return whole, torn, history


def test_a_record_is_read_as_it_was_made(runs):
    whole, torn, history = runs
    found = read_run(whole)
    assert found.keys() == history[0].keys() - {"step"}
    for name, (steps, values) in found.items():
        assert steps.tolist() == list(range(STEPS))
        assert values.tolist() == [entry[name] for entry in history]
    assert read_run(torn)["loss"][0].tolist() == list(range(SHORT))


def test_runs_are_drawn_smoothed_on_one_axis(runs):
    whole, torn, history = runs
    axis, *others = show_runs([whole, torn], window=3).axes
    assert not others  # nothing was validated
    lines = {line.get_label(): line for line in axis.get_lines()}
    streams = ("video", "image")
    assert list(lines) == [f"{f.name}: {s}" for f in (whole, torn) for s in streams]
    for stream in streams:
        losses = [entry[f"{stream}/loss"] for entry in history]
        slow = [np.mean(losses[max(0, i - 2) : i + 1]) for i in range(STEPS)]
        drawn = lines[f"{whole.name}: {stream}"]
        assert np.allclose(drawn.get_ydata(), slow)
        assert drawn.get_xdata().tolist() == list(range(STEPS))
        assert len(lines[f"{torn.name}: {stream}"].get_xdata()) == SHORT
        assert drawn.get_color() != lines[f"{torn.name}: {stream}"].get_color()
    assert lines[f"{whole.name}: video"].get_linestyle() != drawn.get_linestyle()


def test_validations_are_points_at_their_steps(runs, tmp_path):
    whole, _, history = runs
    marks = {3: 0.25, 7: 0.75, 11: 0.5}
    lines = [{**e, **({"val/top1": marks[e["step"]]} if e["step"] in marks else {})}
             for e in history]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    steps, values = read_run(tmp_path)["val/top1"]
    assert dict(zip(steps.tolist(), values.tolist(), strict=True)) == marks
    axis, right = show_runs([whole, tmp_path]).axes
    (points,) = right.get_lines()
    assert points.get_xydata().tolist() == [[step, value] for step, value in marks.items()]
    assert points.get_linestyle() == "None" and len(axis.get_legend().get_texts()) == 5


def test_a_folder_without_a_record_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no record of a run"):
        show_runs([tmp_path])
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "lo')
    with pytest.raises(ValueError, match=r"no step in metrics\.jsonl"):
        read_run(tmp_path)


class Shades:
    """A tokenizer of 8 grey shades and 4 x 4 px cells: id k is 32 k to 32 k + 31 on average."""

    vocab_size, factor = 8, 4

    def encode(self, view):
        n, height, width, _ = view.shape
        cells = view.float().view(n, height // 4, 4, width // 4, 4, 3).mean(dim=(2, 4, 5))
        return (cells / 32).long()

    def decode(self, ids):
        grey = (ids * 32 + 16).to(torch.uint8)
        return grey.repeat_interleave(4, 1).repeat_interleave(4, 2)[..., None].expand(-1, -1, -1, 3)


@pytest.fixture(scope="module")
def shaded():
    """ClipSpec of 12 pictures, 12 x 12 px, their ids (12, 3, 3) of codes 2 to 5, and two kinds."""
    rng = np.random.default_rng(0)
    shades = rng.integers(2, 6, (12, 3, 3)) * 32 + 16
    views = shades.repeat(4, 1).repeat(4, 2)[..., None] + rng.integers(-9, 10, (12, 12, 12, 3))
    views = views.astype(np.uint8)
    return views, Shades().encode(torch.from_numpy(views)).numpy(), np.arange(12) % 2


def test_typical_cells_are_those_nearest_to_the_mean(shaded):
    views, ids, _ = shaded
    found = [(n, y, x) for n in range(12) for y in range(3) for x in range(3) if ids[n, y, x] == 3]
    cell = {at: views[at[0], 4 * at[1] : 4 * at[1] + 4, 4 * at[2] : 4 * at[2] + 4].astype(float)
            for at in found}  # fmt: skip
    mean = sum(cell.values()) / len(cell)
    expected, seen = [], set()
    for n, y, x in sorted(found, key=lambda at: ((cell[at] - mean) ** 2).sum()):
        if n not in seen and len(expected) < 5:
            wide = np.full((12 + 6, 12 + 6, 3), 128, dtype=np.uint8)  # grey beyond the edge
            wide[3:15, 3:15] = views[n]
            expected.append(wide[4 * y : 4 * y + 10, 4 * x : 4 * x + 10])
            seen.add(n)
    assert len(found) > len(expected) == 5
    assert np.array_equal(typical_cells(views, ids, 3, number=5, margin=3), expected)
    assert typical_cells(views, ids, 7, margin=3).shape == (0, 10, 10, 3)


def test_a_code_is_shown_painted_counted_and_found(shaded):
    views, ids, _ = shaded
    tiles = id_tiles(Shades(), views, ids, 4, number=14)
    assert tiles.shape == (16, 12, 12, 3) and tiles.dtype == np.uint8
    assert (tiles[0] == 4 * 32 + 16).all()
    counts = Counter((y, x) for n in range(12) for y in range(3) for x in range(3)
                     if ids[n, y, x] == 4)  # fmt: skip
    light = {(y, x): int(tiles[1, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].sum())
             for y in range(3) for x in range(3)}  # fmt: skip
    assert len(set(counts[at] for at in light)) > 3
    for a in light:
        for b in light:
            assert (light[a] < light[b]) == (counts[a] < counts[b])
    pictures = len({n for n in range(12) if (ids[n] == 4).any()})
    assert pictures < 14 and (tiles[2 + pictures :] == 128).all()
    middle = typical_cells(views, ids, 4, number=14, margin=4)[:, 4:8, 4:8]
    assert np.array_equal(tiles[2 : 2 + pictures, 4:8, 4:8], middle)  # 12 px for 12: not enlarged
    assert (tiles[2 : 2 + pictures, 3, 3:9] == 255).all()
    assert (tiles[2 : 2 + pictures, 2, 2:10] == 0).all()
    never = id_tiles(Shades(), views, ids, 7)
    assert (never[2:] == 128).all() and len(np.unique(never[1].reshape(-1, 3), axis=0)) == 1


def test_tiles_fit_views_of_the_paper_s_size():
    """14 x 14 ids of 8 px: three cells are no whole part of 112 px."""
    views = np.random.default_rng(0).integers(0, 256, (2, 112, 112, 3), dtype=np.uint8)
    ids = np.zeros((2, 14, 14), dtype=np.int64)

    class Eight(Shades):
        def decode(self, ids):
            return torch.zeros(1, 112, 112, 3, dtype=torch.uint8)

    assert id_tiles(Eight(), views, ids, 0).shape == (8, 112, 112, 3)


def test_what_is_told_of_a_code_is_counted(shaded):
    _, ids, labels = shaded
    uses = Counter()
    for picture, label in zip(ids, labels, strict=True):
        uses[("cat", "dog")[label]] += sum(code == 5 for code in picture.flat)
    told = describe_id(ids, 5, labels, ("cat", "dog"))
    total, (first, second) = sum(uses.values()), uses.most_common()
    assert first[1] > second[1]
    assert told.startswith(f"id 5: {total} of 108 ids ({total / 108:.2%}), in ")
    assert f"in {sum(5 in picture for picture in ids)} of 12 pictures; most in: " in told
    assert told.endswith(f"{first[0]} {first[1]}, {second[0]} {second[1]}")


def test_the_explorer_follows_its_sliders(shaded):
    views, ids, labels = shaded

    given = {"a": ids, "b": 7 - ids}
    both = dict.fromkeys(given, Shades())
    panel = id_explorer(both, given, views, labels, ("cat", "dog"), start=3)
    book, code, line, picture = panel.children
    assert (code.min, code.max, code.value) == (0, 7, 3)
    for name, number, named in (("a", 3, ids), ("a", 5, ids), ("b", 2, 7 - ids)):
        book.value, code.value = name, number
        assert line.value == describe_id(named, number, labels, ("cat", "dog"))
        shown = np.asarray(Image.open(io.BytesIO(picture.value)))
        tiles = id_tiles(Shades(), views, named, number).repeat(2, 1).repeat(2, 2)
        assert shown.shape == (24, 8 * (24 + 8), 3)
        assert np.array_equal(shown.reshape(24, 8, 32, 3)[:, :, :24].swapaxes(0, 1), tiles)


def test_columns_are_titled_by_time_or_by_name(monkeypatch):
    drawn = []
    monkeypatch.setattr(figures.plt, "close", drawn.append)
    rows = {name: np.zeros((4, 2, 2, 3), dtype=np.uint8) for name in ("one", "two")}
    show_rows(rows, every=2)
    show_rows(rows, every=2, titles=["cat", "dog", "cow", "pig"])
    monkeypatch.undo()
    told = [[axis.get_title() for axis in figure.axes] for figure in drawn]
    assert told == [["t=0", "t=2", "", ""], ["cat", "cow", "", ""]]
    for figure in drawn:
        figures.plt.close(figure)


def test_a_long_name_beside_a_row_is_whole(monkeypatch):
    drawn = []
    monkeypatch.setattr(figures.plt, "close", drawn.append)
    show_rows({"a name that is long": np.zeros((1, 2, 2, 3), dtype=np.uint8)})
    monkeypatch.undo()
    (text,) = drawn[0].axes[0].texts
    assert text.get_window_extent(drawn[0].canvas.get_renderer()).x0 > 0
    figures.plt.close(drawn[0])


def test_cuts_are_where_the_rendered_camera_jumps():
    """On 256 validation clips, against the scenes: hardly a cut is missed, and none is made up."""
    items = sources.pretraining_items(lesson_joint(), "video", "val")
    bounds = np.array([synthetic.LOG_SCALE, synthetic.ANGLE]).T
    jumps = []
    for index in range(len(items)):
        scene = synthetic.draw_scene("val", index, *synthetic.labels("val", index))
        times = items.choose(0, index)(synthetic.FRAMES)[:, None]
        course = scene.start[2:] + scene.velocity[2:] * times
        rounds = np.floor((course - bounds[0]) / (bounds[1] - bounds[0]))  # of the sawtooths
        jumps.append(bool(np.diff(rounds, axis=0).any()))
    found = [has_cut(items.sample(0, i)["pixels"]) for i in range(len(items))]
    made_up = [f and not j for f, j in zip(found, jumps, strict=True)]
    assert sum(jumps) > 30 and sum(found) >= 0.9 * sum(jumps) and not any(made_up)


def test_clips_are_drawn_by_seed_without_those_that_have_a_cut():
    still = (
        np.zeros((4, 2, 2, 3), dtype=np.uint8) + np.arange(4, dtype=np.uint8)[:, None, None, None]
    )
    cut = np.where(np.arange(4)[:, None, None, None] > 1, 255 - still, still)
    clips = [cut, still, still, cut, still, still]
    seen = []
    drawn, passed = draw_clips(lambda i: seen.append(i) or clips[i], len(clips), 3, seed=1)
    assert seen == np.random.default_rng(1).permutation(6)[: len(seen)].tolist()
    assert drawn == [i for i in seen if i not in (0, 3)] and passed == len(seen) - 3
    assert draw_clips(clips.__getitem__, 6, 3, seed=1)[0] == drawn
    with pytest.raises(ValueError, match="4 of 6 clips are without a cut, 5 were asked for"):
        draw_clips(clips.__getitem__, 6, 5, seed=0)
