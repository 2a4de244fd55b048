"""Nothing is lost: kills, stop signals, damaged files, full disks; and the best is kept."""

import json
import os
import random
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import kill_runs
import numpy as np
import pytest
import tiny_run
import torch
from safetensors.torch import load_file

from bevt_lib.base.config import flatten
from bevt_lib.parts import build_classifier
from bevt_lib.presets import lesson_how, lesson_image
from bevt_lib.training import checkpoint, run_folder
from bevt_lib.training.loop import TIMINGS

STEPS = kill_runs.STEPS
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run nobody killed, with every checkpoint kept."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    tiny_run.run(str(folder), STEPS, keep=99, **kill_runs.SETTINGS)
    return folder


def run(folder, **settings):
    return tiny_run.run(str(folder), STEPS, **kill_runs.SETTINGS | settings)


def checkpoint_at(folder, step):
    return folder / "checkpoints" / f"step_{step:08d}"


def values(history):
    return [{k: v for k, v in entry.items() if k not in TIMINGS} for entry in history]


@pytest.mark.slow
def test_kills_lose_nothing():
    """More by ``python tests/kill_runs.py``, which ends with status 1 where anything is lost."""
    command = [sys.executable, kill_runs.__file__, "--kills", "26", "--torchrun", "4"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=590)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    kills = dict((way, int(n)) for n, way in re.findall(r"^ *(\d+)  (.*)$", done.stdout, re.M))
    assert sum(kills.values()) >= 26 and kills["at any moment"] >= 1
    assert set(kills) >= {*kill_runs.POINTS, *kill_runs.TORCHRUN_WAYS}


@pytest.mark.slow
def test_sigterm_to_the_launcher_or_one_worker_saves_and_ends_all_well(tmp_path):
    """A process that comes to the end of the script, with status 0, leaves a file."""
    folder, ended = tmp_path / "run", tmp_path / "ended"
    ended.mkdir()
    for whom in ("launcher", "worker"):
        child = kill_runs.launch(folder, TINY_RUN_ENDED=str(ended))
        lines = len(run_folder.read_metrics(folder)) + 4
        assert kill_runs.wait_for_lines(folder, lines, child)
        victim = child.pid if whom == "launcher" else kill_runs.children(child.pid)[1]
        os.kill(victim, signal.SIGTERM)
        status = child.wait(timeout=60)
        log = folder.with_suffix(".log").read_text()
        assert {p.name for p in ended.iterdir()} == {"0", "1"}, log[-3000:]
        assert "asked to stop" in log and (status == 0 or whom == "launcher")
        [p.unlink() for p in ended.iterdir()]
        done = len(run_folder.read_metrics(folder))
        assert lines <= done < STEPS and kill_runs.newest(folder) == done
    tiny_run.run(str(folder), STEPS, stop_after=done, **kill_runs.SETTINGS)
    assert len(run_folder.read_metrics(folder)) == done


def test_a_stopped_run_is_told_from_a_finished_one(tmp_path, monkeypatch):
    """Asked to stop in a step that a validation follows: it comes first when the run goes on."""
    genuine = tiny_run.prepare

    def stop_at_nine(batch, step):
        if step == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return genuine(batch, step)

    monkeypatch.setattr(tiny_run, "prepare", stop_at_nine)
    stopped = run(tmp_path / "a")
    assert len(stopped) == 11 < STEPS and kill_runs.newest(tmp_path / "a") == 11
    monkeypatch.setattr(tiny_run, "prepare", genuine)
    monkeypatch.setattr(run_folder, "asked_to_stop", asked_in_step_nine)
    stopped = run(tmp_path / "b")
    assert len(stopped) == 10 and "val/score" not in stopped[-1]
    monkeypatch.undo()
    calls = []
    monkeypatch.setattr(tiny_run, "score", lambda *a, f=tiny_run.score: calls.append(a[2]) or f(*a))
    finished = run(tmp_path / "b")
    assert calls == [10, 15, 20, 24] and len(finished) == STEPS
    assert values(run(tmp_path / "a")) == values(finished)


@contextmanager
def asked_in_step_nine():
    asked = iter([False] * 9 + [True])
    yield lambda: next(asked)


def flip_a_bit(path, rng):
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def truncate(path, rng):
    os.truncate(path, rng.randrange(path.stat().st_size))


FILES = ("model.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", [flip_a_bit, truncate])
def test_a_damaged_file_is_recognised(whole, tmp_path, file, damage):
    """Forty times each, anywhere in the file, a flip that leaves JSON's content as it was aside."""
    folder = checkpoint_at(whole, 9)
    copies = tmp_path / "copy"
    copies.mkdir()
    for name in FILES:
        (copies / name).symlink_to(folder / name)
    assert checkpoint.is_intact(copies)
    state = json.loads((folder / "state.json").read_text())
    for seed in range(40):
        (copies / file).unlink()
        (copies / file).write_bytes((folder / file).read_bytes())
        damage(copies / file, random.Random(seed))
        if file == "state.json" and damage is flip_a_bit:
            text = (copies / file).read_bytes()
            same = text.isascii() and without_sum(text) == without_sum(json.dumps(state))
            assert not checkpoint.is_intact(copies) or same, seed
        else:
            assert not checkpoint.is_intact(copies), seed


def without_sum(text):
    try:
        return {k: v for k, v in json.loads(text).items() if len(k) != 4 or k == "step"}
    except ValueError:
        return None


@pytest.mark.parametrize("damaged, before", [((12,), 10), ((12, 10), 9)])
def test_damaged_checkpoints_are_named_and_the_one_before_is_used(
    whole, tmp_path, capsys, damaged, before
):
    run(tmp_path, stop_after=12, keep=3)
    for step in damaged:
        flip_a_bit(checkpoint_at(tmp_path, step) / "model.safetensors", random.Random(step))
    assert checkpoint.latest(tmp_path) == checkpoint_at(tmp_path, before)
    told = capsys.readouterr().err
    assert all(f"step_{step:08d} is damaged" in told for step in damaged)
    assert values(run(tmp_path, keep=3)) == values(run_folder.read_metrics(whole))
    assert kill_runs.best(tmp_path) == kill_runs.best(whole)


def test_the_newest_good_checkpoint_is_not_pruned_for_damaged_later_ones(tmp_path):
    tiny_run.run(str(tmp_path), STEPS, stop_after=12, save_every=3, keep=3)
    for step in (12, 9):
        flip_a_bit(checkpoint_at(tmp_path, step) / "model.safetensors", random.Random(0))
    tiny_run.run(str(tmp_path), STEPS, stop_after=7, save_every=7)
    assert [p.name[-2:] for p in sorted((tmp_path / "checkpoints").iterdir())] == ["06", "07"]
    assert kill_runs.newest(tmp_path) == 7


def test_with_no_whole_checkpoint_the_run_does_not_start_again(whole, tmp_path):
    run(tmp_path, stop_after=9)
    for folder in (tmp_path / "checkpoints").iterdir():
        truncate(folder / "optimizer.safetensors", random.Random(0))
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged .*step_00000009"):
        run(tmp_path)
    assert len(run_folder.read_metrics(tmp_path)) == 9


@pytest.mark.parametrize("tail", [b'{"step": 9, "lo', b"\0" * 40, b'{"step": 9, "loss": \xff\xfe'])
def test_a_torn_record_is_cut_back(whole, tmp_path, tail):
    run(tmp_path, stop_after=9)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    assert values(run(tmp_path)) == values(run_folder.read_metrics(whole))
    written = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert values(map(json.loads, written)) == values(run_folder.read_metrics(whole))


def test_a_lost_last_line_comes_back_from_the_checkpoint(whole, tmp_path):
    run(tmp_path, stop_after=9)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:8]))
    assert values(run(tmp_path)) == values(run_folder.read_metrics(whole))


# A process whose third checkpoint finds the disk full, for machines where nothing can be mounted.
FULL_AT_THE_THIRD = """
import errno
from bevt_lib import checkpoint
genuine, calls = checkpoint.save_tensors, []
def full(tensors, path):
    calls.append(path)
    if len(calls) > 4:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    genuine(tensors, path)
checkpoint.save_tensors = full
"""
OWN_PATH = ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
COMMAND = "import tiny_run; from bevt_lib.cli import run_command; run_command(tiny_run.main)"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_ends_in_one_line_and_leaves_the_last_checkpoint(whole, tmp_path, processes):
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(
        f.stat().st_size + 4096 for f in checkpoint_at(whole, 9).iterdir() if "ema" not in f.name
    )
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(2.5 * size)}", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    script = tmp_path / "command.py"
    script.write_text(("" if mounted else FULL_AT_THE_THIRD) + COMMAND)
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launcher, str(script), str(disk / "run"), str(STEPS), "--save-every", "3"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=OWN_PATH, timeout=120)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == (2 if processes == 1 else 1), done.stderr[-2000:]
        # The launcher may stop one before it can tell.
        assert 1 <= len(errors) <= processes and len(set(errors)) == 1
        assert "No space left on device" in errors[0] and "last checkpoint" in errors[0]
        assert "exitcode  : 2" in done.stderr or processes == 1
        assert "in fit" not in done.stderr
        kept = sorted(p.name for p in (disk / "run" / "checkpoints").iterdir())
        assert kept == ["step_00000003", "step_00000006"]
        assert kill_runs.newest(disk / "run") == 6
        if mounted:  # make room, and the same command goes on
            subprocess.run(["mount", "-o", f"remount,size={9 * size}", str(disk)], check=True)
        else:
            script.write_text(COMMAND)
        if processes == 1:
            done = subprocess.run(command, capture_output=True, text=True, env=OWN_PATH,
                                  timeout=120)  # fmt: skip
            assert done.returncode == 0, done.stderr[-2000:]
            written = [e["loss"] for e in run_folder.read_metrics(disk / "run")]
            assert written == [e["loss"] for e in run_folder.read_metrics(whole)]
    finally:
        if mounted:
            subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_a_killed_loader_process_ends_in_one_line(tmp_path):
    script = tmp_path / "command.py"
    script.write_text(COMMAND)
    command = [sys.executable, str(script), str(tmp_path / "run"), "4000", "--workers", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=OWN_PATH) as child:
        assert kill_runs.wait_for_lines(tmp_path / "run", 5, child)
        os.kill(kill_runs.children(child.pid)[0], signal.SIGKILL)
        lines = child.stderr.read().splitlines()
    assert child.returncode == 2 and len(lines) == 2
    assert re.match(
        r"error: DataLoader worker .*(killed|exited).*\(.*fewer --data\.workers", lines[1]
    )


def test_a_record_that_cannot_be_written_stops_the_run_at_its_next_save(tmp_path, monkeypatch):
    genuine = os.write

    def full(file, content):
        if b'"step": 4' in content:
            return genuine(file, content[:7])
        return genuine(file, content)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(ValueError, match=r"can't write metrics.jsonl \(No space"):
        run(tmp_path)
    assert kill_runs.newest(tmp_path) == 5
    monkeypatch.undo()
    assert [e["step"] for e in run(tmp_path)] == list(range(STEPS))


def test_two_runs_in_one_folder_are_kept_apart(whole, monkeypatch):
    """The lock is the process's own: another process has to hold it."""
    monkeypatch.setattr(run_folder, "LOCK_TIMEOUT", 0.3)
    hold = ("import fcntl, sys; file = open(sys.argv[1], 'r+'); fcntl.lockf(file, fcntl.LOCK_EX); "
            "print('held', flush=True); sys.stdin.read()")  # fmt: skip
    with subprocess.Popen([sys.executable, "-c", hold, str(whole / "config.json")], text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:  # fmt: skip
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="another run is active in"):
            run(whole, keep=99)
        other.kill()
    assert len(run(whole, keep=99)) == STEPS


def test_a_run_begun_before_a_field_existed_goes_on(tmp_path):
    mine = flatten(lesson_image())
    old = {k: v for k, v in mine.items() if k not in ("optim.ema", "data.jitter", "needs_init")}
    run_folder.check_config(tmp_path, old)
    run_folder.check_config(tmp_path, mine)
    with pytest.raises(ValueError, match=r"\(optim\.ema: 0\.0 there, 0\.3 here\)"):
        run_folder.check_config(tmp_path, mine | {"optim.ema": 0.3})
    with pytest.raises(ValueError, match=r"optim\.lr: 0\.003 there, 1 here"):
        run_folder.check_config(tmp_path, mine | {"optim.lr": 1})
    run_folder.check_config(
        tmp_path, mine | {"run.precision": "bf16", "data.video_root": "elsewhere"}
    )
    run_folder.check_config(tmp_path, mine | {"items.image": "3,072 (0123456789ab)"})


def test_when_one_looks_may_change_in_mid_run_but_not_the_items(tmp_path):
    lists = {"items.clip": "8 (0123456789ab)"}
    mine = flatten(lesson_how()) | lists
    run_folder.check_config(tmp_path, mine)
    run_folder.check_config(
        tmp_path, mine | {"val_epochs": 2.0, "views_at_once": 1, "test_clips": 1}
    )
    grown = mine | {"items.clip": "7 (ba9876543210)"}
    with pytest.raises(ValueError, match=r"items\.clip: 8 \(0123456789ab\) there, 7 .*lists and"):
        run_folder.check_config(tmp_path, grown)
    with pytest.raises(ValueError, match=r"0\.1 here\): choose another --run\.folder"):
        run_folder.check_config(tmp_path, mine | {"smoothing": 0.1})


@pytest.mark.skipif(os.name == "nt", reason="has no such modes")
def test_colleagues_may_read_what_a_run_leaves(tmp_path):
    """As the folder's other files: safetensors by itself keeps its files to their owner."""
    before = os.umask(0o027)
    try:
        run(tmp_path, stop_after=3)
        build_classifier(lesson_how()).save_pretrained(tmp_path / "model")
    finally:
        os.umask(before)
    files = [f for f in tmp_path.rglob("*") if f.is_file()]
    assert sum(f.suffix == ".safetensors" for f in files) == 4
    assert {oct(f.stat().st_mode & 0o777) for f in files} == {"0o640"}


def test_validation_changes_nothing_in_training(whole):
    plain = tiny_run.run("", STEPS, ema=kill_runs.EMA)
    scored = run_folder.read_metrics(whole)
    assert [e["loss"] for e in plain] == [e["loss"] for e in scored]
    assert [e["step"] + 1 for e in scored if "val/score" in e] == [5, 10, 15, 20, 24]


def test_the_best_is_the_average_at_its_step(whole):
    scores = {
        e["step"] + 1: e["val/score"] for e in run_folder.read_metrics(whole) if "val/score" in e
    }
    step = max(scores, key=scores.get)
    assert kill_runs.best(whole)["step"] == step and kill_runs.best(whole)["score"] == scores[step]
    kept = load_file(whole / "best" / "model.safetensors")
    average = load_file(checkpoint_at(whole, step) / "ema.safetensors")
    assert kept.keys() == average.keys() and all((kept[k] == average[k]).all() for k in kept)
    network = tiny_run.build_model()
    network.load_state_dict(kept)
    with torch.no_grad():
        again = tiny_run.score(network, tiny_run.build_sources(), step)
    assert again["score"] == scores[step]


def test_a_worse_model_is_not_kept_and_the_best_is_found_again(tmp_path):
    told = iter([0.1, 0.5, 0.3, 0.2, 0.4])
    settings = {"validate_every": 5, "save_every": 4, "best_by": "x",
                "validate": lambda done: {"x": next(told), "y": 9.0}}  # fmt: skip
    tiny_run.run(str(tmp_path), STEPS, stop_after=12, **settings)
    best = kill_runs.best(tmp_path)
    assert (best["step"], best["x"]) == (10, 0.5)
    history = tiny_run.run(str(tmp_path), STEPS, **settings)
    assert kill_runs.best(tmp_path)["step"] == 10
    assert [e["val/x"] for e in history if "val/x" in e] == [0.1, 0.5, 0.3, 0.2, 0.4]
    assert np.array([e["val/y"] for e in history if "val/y" in e]).tolist() == [9.0] * 5


def test_a_checkpoint_of_before_can_be_read(whole, tmp_path):
    """Older state.json files have neither a sum of their own nor the last line nor a scaler."""
    run(tmp_path, stop_after=9)
    path = checkpoint_at(tmp_path, 9) / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({k: state[k] for k in ("step", "sha256")}))
    assert values(run(tmp_path)) == values(run_folder.read_metrics(whole))
