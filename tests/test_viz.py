"""The record of real tiny runs, read and drawn."""

import json

import numpy as np
import pytest
import tiny_run

from bevt_lib.viz import read_run, show_runs, tell_run

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
    told = tell_run(tmp_path, window=3)
    first, last = (np.mean([e["image/loss"] for e in part]) for part in (history[:3], history[-3:]))
    assert f"{STEPS} steps" in told and "best val/top1 0.750 at step 7" in told
    assert f"image/loss {first:.3f} -> {last:.3f}" in told
    assert "val/" not in tell_run(whole)


def test_a_folder_without_a_record_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no record of a run"):
        show_runs([tmp_path])
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "lo')
    with pytest.raises(ValueError, match=r"no step in metrics\.jsonl"):
        read_run(tmp_path)
