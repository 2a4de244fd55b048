"""The benchmark: its own films, equal frames from every loader, and sums that add up."""

import re

import numpy as np
import pytest
from test_cli import run

from bevt_lib import bench, finetune, pretrain
from bevt_lib.cli import parse
from bevt_lib.datasets.lists import read_entries
from bevt_lib.datasets.video import Video, read_frames
from bevt_lib.presets import paper_joint, paper_k400, paper_ssv2
from bevt_lib.scoring import cost, loaders


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
