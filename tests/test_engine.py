"""The loop: exact resume, any number of processes, safe checkpoints, clear refusals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_run
import torch
from golden_numbers import CASES, FOLDER

from bevt_lib import checkpoint
from bevt_lib.config import Optim
from bevt_lib.engine import TIMINGS, split_batch
from bevt_lib.optim import factors, learning_rate

SCRIPT = Path(tiny_run.__file__)
RUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def command(folder, steps, *options, processes=0):
    start = [*RUN, f"--nproc-per-node={processes}"] if processes else [sys.executable]
    return [*start, str(SCRIPT), str(folder), str(steps), *options]


def launch(*args, processes=0, **kwargs):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command(*args, processes=processes), capture_output=True, text=True,
                            env=environment, timeout=300, **kwargs)  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The record of an uninterrupted run of 24 steps, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    return tiny_run.run(str(folder), 24), folder


def losses(history):
    return [entry["loss"] for entry in history]


def test_it_learns(whole):
    curve = losses(whole[0])
    assert np.mean(curve[-4:]) < 0.9 * np.mean(curve[:4])


def test_a_resumed_run_is_the_uninterrupted_one(whole, tmp_path):
    history, _ = whole
    tiny_run.run(str(tmp_path), 24, stop_after=10)
    resumed = tiny_run.run(str(tmp_path), 24)
    without_timings = [{k: v for k, v in e.items() if k not in TIMINGS} for e in resumed]
    assert without_timings == [{k: v for k, v in e.items() if k not in TIMINGS} for e in history]
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in written] == list(range(24))


def test_accumulation_changes_nothing_but_rounding(whole):
    accumulated = tiny_run.run("", 24, micro=2)
    assert np.allclose(losses(accumulated), losses(whole[0]), rtol=1e-3)
    assert np.allclose(losses(accumulated)[:3], losses(whole[0])[:3], rtol=1e-5)


@pytest.mark.slow
def test_two_and_three_processes_see_and_learn_the_same(whole, tmp_path):
    curve = losses(whole[0])
    for processes in (2, 3):
        spread = launch(tmp_path / str(processes), 24, processes=processes)
        assert np.allclose(spread, curve, rtol=1e-3), (spread, curve)
        assert np.allclose(spread[:3], curve[:3], rtol=1e-5)


@pytest.mark.slow
def test_a_run_begun_on_one_process_continues_on_two(whole, tmp_path):
    tiny_run.run(str(tmp_path), 24, stop_after=9)
    continued = launch(tmp_path, 24, processes=2)
    assert np.allclose(continued, losses(whole[0]), rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_continues_where_it_was(whole, tmp_path, number):
    """SIGKILL loses at most the steps since the last save; SIGTERM saves and exits 0."""
    metrics = tmp_path / "metrics.jsonl"
    child = subprocess.Popen(command(tmp_path, 24, "--save-every", "3"),
                             env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    deadline = time.time() + 120
    while time.time() < deadline and child.poll() is None:
        if metrics.exists() and len(metrics.read_text().splitlines()) >= 7:
            break
        time.sleep(0.01)
    child.send_signal(number)
    status = child.wait(timeout=60)
    assert status == (0 if number == signal.SIGTERM else -signal.SIGKILL)
    found = checkpoint.latest(tmp_path)
    assert found is not None and int(found.name[5:]) >= 6
    assert losses(tiny_run.run(str(tmp_path), 24, save_every=3)) == losses(whole[0])


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(whole, tmp_path, capsys):
    tiny_run.run(str(tmp_path), 24, stop_after=8)
    newest = tmp_path / "checkpoints" / "step_00000008"
    content = bytearray((newest / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (newest / "model.safetensors").write_bytes(content)
    assert losses(tiny_run.run(str(tmp_path), 24)) == losses(whole[0])
    assert "step_00000008 is damaged" in capsys.readouterr().err


def test_a_run_folder_holds_plain_files_and_the_last_two_checkpoints(whole):
    _, folder = whole
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    files = ("model.safetensors", "optimizer.safetensors", "state.json")
    expected = {f"checkpoints/step_{s:08d}/{f}" for s in (20, 24) for f in files}
    assert names == expected | {"config.json", "metrics.jsonl"}


def test_another_configuration_in_the_same_folder_is_refused(whole):
    _, folder = whole
    with pytest.raises(ValueError, match=r"another configuration \(steps: 24 there, 30 here"):
        tiny_run.run(str(folder), 30)
    with pytest.raises(ValueError, match=r"run\.seed"):
        tiny_run.run(str(folder), 24, seed=1)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="can't write to the run folder"):
        tiny_run.run(str(tmp_path / "run"), 24)


def test_a_file_in_the_folders_place_is_refused(tmp_path):
    (tmp_path / "run").write_text("not a folder")
    with pytest.raises(ValueError, match="can't write to the run folder"):
        tiny_run.run(str(tmp_path / "run"), 24)


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path, monkeypatch):
    prepare = tiny_run.prepare

    def poison(batch, step):
        batch = prepare(batch, step)
        if step == 6:
            batch["video"]["pixels"] = batch["video"]["pixels"] * float("nan")
        return batch

    monkeypatch.setattr(tiny_run, "prepare", poison)
    with pytest.raises(ValueError, match="at step 6"):
        tiny_run.run(str(tmp_path), 24)
    found = checkpoint.latest(tmp_path)
    assert found is not None and found.name == "step_00000004"


@pytest.mark.parametrize("batch, processes, micro", [(6, 4, 0), (6, 2, 2), (6, 1, 5)])
def test_a_batch_that_cannot_be_cut_is_refused(batch, processes, micro):
    with pytest.raises(ValueError, match="can't be cut"):
        split_batch({"video": batch}, processes, micro)


def test_a_batch_is_cut_as_the_released_recipe_cuts_it():
    split = split_batch({"video": 256, "image": 2048}, 32, 4)
    assert split.accumulation == 2 and split.micro == {"video": 4, "image": 32}


def schedules():
    if "lr_schedule" not in CASES:
        return []
    golden = json.loads((FOLDER / CASES["lr_schedule"]["file"]).read_text())
    return [(name, case) for name, case in golden.items() if isinstance(case, dict)]


@pytest.mark.parametrize("name, case", [s for s in schedules() if s[0] == "pretrain"])
def test_the_pretraining_rate_is_the_released_one(name, case):
    """The released schedule counts micro-iterations; here one step stands for one of them."""
    per_epoch = CASES["lr_schedule"]["micro_iterations_per_epoch"]
    optim = Optim(lr=case["base_lr"], clips=1, epochs=case["total_epochs"], warmup=10)
    for _, _, step, rate in case["points"]:
        assert np.isclose(learning_rate(optim, step, per_epoch), rate, rtol=1e-9), step


def group_files():
    return [FOLDER / name for name in CASES.get("param_groups", [])]


@pytest.mark.parametrize("path", group_files(), ids=lambda p: p.stem)
def test_parameter_groups_are_the_released_ones(path):
    from bevt_lib.presets import paper_joint, paper_k400

    golden = json.loads(path.read_text())
    recipe = {"h_param_groups_pretrain": paper_joint, "h_param_groups_k400": paper_k400}[path.stem]
    optim = recipe().optim
    assert optim.lr == golden["base_lr"] and optim.weight_decay == golden["base_weight_decay"]
    for row in golden["rows"]:
        rate, decay = factors(row["name"], optim.rules)
        assert np.isclose(rate, row["lr_mult"], rtol=1e-9), row["name"]
        assert np.isclose(decay * optim.weight_decay, row["weight_decay"]), row["name"]


def test_adamw_state_survives_a_checkpoint(tmp_path):
    from bevt_lib.optim import parameter_groups

    torch.manual_seed(0)
    models = [torch.nn.Linear(4, 3) for _ in range(2)]
    optimizers = [
        torch.optim.AdamW(parameter_groups(m, Optim(lr=0.1, clips=1, steps=1))) for m in models
    ]
    for _ in range(3):
        optimizers[0].zero_grad()
        models[0](torch.ones(2, 4)).square().sum().backward()
        optimizers[0].step()
    folder = checkpoint.save(tmp_path, 3, models[0], optimizers[0], keep=2)
    assert checkpoint.load(folder, models[1], optimizers[1]) == 3
    for model, optimizer in zip(models, optimizers, strict=True):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
    assert torch.equal(models[0].weight, models[1].weight)
