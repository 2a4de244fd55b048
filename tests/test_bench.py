"""The benchmark: its own films, equal frames from every loader, and sums that add up."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from test_cli import run

from bevt_lib import bench, finetune, pretrain
from bevt_lib.base.files import data_folder
from bevt_lib.cli import parse
from bevt_lib.datasets.lists import read_entries
from bevt_lib.datasets.video import Video, read_frames
from bevt_lib.presets import paper_joint, paper_k400, paper_ssv2
from bevt_lib.scoring import cost, loaders, speed


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    return loaders.render(tmp_path_factory.mktemp("films"))


def test_films_are_what_re_encoded_kinetics_is(films):
    entries = read_entries(*films)
    assert len({entry.path.read_bytes() for entry in entries}) == loaders.FILMS
    for entry in entries:
        film = Video(entry.path)
        assert len(film) == 300 and film.frames([0, 299]).shape == (2, 256, 340, 3)
        assert 100_000 < entry.path.stat().st_size < 1_000_000  # 80 to 800 kbit/s


def test_all_loops_decode_the_same_frames(films):
    path = read_entries(*films)[1].path
    for start in (0, 100, 172):
        chosen = start + 8 * np.arange(16)
        ours = read_frames(path, lambda total, c=chosen: c % total)
        assert np.array_equal(ours, loaders.pyav_loop(path, lambda total, c=chosen: c % total))
        pytest.importorskip("decord")  # no wheel for some machines
        assert np.array_equal(ours, loaders.decord_loop(path, lambda total, c=chosen: c % total))


@pytest.mark.parametrize("preset", [paper_joint, paper_k400, paper_ssv2])
def test_a_gpu_that_trains_at_the_assumed_rate_takes_the_planned_hours(preset):
    """The plan's GPU-hours for all epochs are those of all clips at the benchmark's rate."""
    recipe = preset()
    command = pretrain if preset is paper_joint else finetune
    clips = recipe.data.expected_items * recipe.optim.epochs
    hours = float(re.search(r"GPU-hours +([\d,.]+) on", command.plan(recipe))[1].replace(",", ""))
    assert clips / bench.assumed_rate(recipe) / 3600 == pytest.approx(hours, rel=0.01)


def test_cores_for_a_gpu_count_clips_and_images():
    rates = {"this loader, decode + augment": 20.0, "this loader, decode": 30.0,
             "decord loop, decode": 15.0, "PyAV loop, decode": 10.0,
             "images, decode + augment": 160.0}  # fmt: skip
    text = bench.report(paper_joint(), rates, 40.0)  # with 8 images a clip
    assert "one GPU at 40.0 clips/s and 320.0 images/s (as given) takes 4.0 cores" in text
    assert re.search(r"decord loop, decode +15\.0 clips/s a core, .* 2\.00 times as fast", text)
    assert re.search(r"PyAV loop, decode +10\.0 clips/s a core, .* 3\.00 times as fast", text)
    recipe = parse(paper_k400(), ["--data.frames", "8"])
    del rates["decord loop, decode"]
    text = bench.report(recipe, rates | {"images, decode + augment": 1.0}, None)
    assert "decord loop, decode: doesn't give" in text and "PyAV loop, decode: d" not in text
    rate = bench.assumed_rate(recipe)
    assert f"at {rate:.1f} clips/s (ASSUMED of an {cost.GPU}" in text
    assert f"takes {rate / 20:.1f} cores" in text


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["1", "2"])
def test_the_benchmark_runs_as_a_command(films, processes):
    listed, root = films
    result = run("bevt_lib.bench", "--list", str(listed), "--root", str(root), "--rounds", "1",
                 "--clips", "2", "--rate", "10", "--processes", processes)  # fmt: skip
    assert result.returncode == 0, result.stderr
    for name in ("paper_joint", "paper_k400", "paper_ssv2"):
        part = result.stdout.partition(f"{name}: ")[2].partition("paper_")[0]
        assert re.search(r"decode \+ augment +\d+\.\d clips/s a core\n", part)
        assert "(as given) takes" in part


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--rounds", "0"], "more than 0"), (["--rate", "-1"], "more than 0"),
     (["--list", "nowhere.txt"], r"nowhere\.txt: can't read this list")],
)  # fmt: skip
def test_wrong_settings_end_in_one_line(words, message):
    with pytest.raises(ValueError, match=message):
        bench.main(words)


@pytest.mark.slow
def test_training_is_measured_beside_the_textbook(tmp_path):
    """At rehearsal sizes: every row, written as it comes, and both sides compute the same."""
    out = tmp_path / "table.json"
    result = run("bevt_lib.bench", "train", "--tiny", "--pairs", "1", "--out", str(out))
    assert result.returncode == 0, result.stderr
    table = json.loads(out.read_text())
    assert {"machine", "versions", "commit", "load", "threads", "rows"} <= set(table)
    kinds = {row["kind"] for row in table["rows"]}
    wanted = {"joint", "finetune", "inference", "tokenizing", "memory", "limits", "profile",
              "growth", "processes"}  # fmt: skip
    assert wanted <= kinds <= wanted | {"loading"}
    for row in table["rows"]:
        assert row["name"] in result.stdout
        if "ratio" in row:
            assert row["low"] <= row["ratio"] <= row["high"]
        assert row.get("differs", 0) < 1e-4 and row.get("changed", 0) == 0


def test_both_sides_take_the_same_steps():
    """Twelve steps of the joint loss at a real rate: the kit and the textbook stay together."""
    step = speed.JointStep(speed.TINY_SIZES)
    optim = replace(speed.OPTIM, lr=1e-3)
    adamw = [step.update.optimizer, step.shadow.adamw]
    for group in adamw[1].param_groups:
        group["lr"] = optim.lr
    curves = []
    for turn in range(12):
        mine = step.update.step([step.batch(turn)], turn, optim.lr, {})
        curves.append((mine["loss"], step.textbook(turn)[0]))
    ours, theirs = np.array(curves).T
    assert np.allclose(ours, theirs, rtol=1e-4)
    assert abs(ours - ours[0]).max() > 0.01  # they do move


def test_the_stored_table_is_what_the_notebook_shows():
    table = json.loads((data_folder() / "results" / "bench_cpu.json").read_text())
    assert table["sizes"] == "full" and table["commit"] and not table["commit"].endswith("dirty")
    names = {row["name"] for row in table["rows"]}
    assert {"joint_step", "joint_step, all frames named", "finetune_step", "inference_b",
            "tokenizing", "loading, paper_joint", "matrix product", "stage 3"} <= names  # fmt: skip
    for row in table["rows"]:
        assert row.get("differs", 0) < 1e-4 and row.get("changed", 0) == 0


@pytest.mark.parametrize("words, message", [
    (["train", "--only", "speed"], "--only takes memory, joint"),
    (["train", "--pairs", "0"], "more than 0"),
    (["storing"], "loading or train, not 'storing'"),
])  # fmt: skip
def test_what_is_not_measured_is_told(words, message):
    with pytest.raises(ValueError, match=message):
        bench.main(words)
