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
from safetensors.torch import load_file

from bevt_lib import finetune, parts
from bevt_lib.base.config import Optim
from bevt_lib.presets import FINETUNE, paper_joint
from bevt_lib.scoring import classes
from bevt_lib.training import checkpoint
from bevt_lib.training.loop import TIMINGS, split_batch
from bevt_lib.training.optim import learning_rate, parameter_groups, start_average, update_average
from bevt_lib.weights.formats import released_name

SCRIPT = Path(tiny_run.__file__)


def command(folder, steps, *options):
    return [sys.executable, str(SCRIPT), str(folder), str(steps), *options]


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


@pytest.mark.slow
def test_sigterm_saves_and_ends_well(whole, tmp_path):
    """Kills, and signals to processes of torchrun, are in ``test_resume.py``."""
    metrics = tmp_path / "metrics.jsonl"
    child = subprocess.Popen(command(tmp_path, 24, "--save-every", "9"),
                             env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    while child.poll() is None and not (metrics.exists() and len(metrics.open().readlines()) >= 4):
        time.sleep(0.01)
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=60) == 0
    found = checkpoint.latest(tmp_path)
    assert found is not None and int(found.name[5:]) == len(metrics.open().readlines()) < 24
    assert losses(tiny_run.run(str(tmp_path), 24, save_every=3)) == losses(whole[0])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(whole, tmp_path, capsys):
    tiny_run.run(str(tmp_path), 24, stop_after=8)
    newest = tmp_path / "checkpoints" / "step_00000008"
    flip_a_bit(newest / "model.safetensors")
    assert losses(tiny_run.run(str(tmp_path), 24)) == losses(whole[0])
    assert "step_00000008 is damaged" in capsys.readouterr().err


def test_a_run_folder_holds_plain_files_and_the_last_two_checkpoints(whole):
    _, folder = whole
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    files = ("model.safetensors", "optimizer.safetensors", "state.json")
    expected = {f"checkpoints/step_{s:08d}/{f}" for s in (20, 24) for f in files}
    assert names == expected | {"config.json", "metrics.jsonl"}


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """An uninterrupted run of 12 steps with a weight average: its model, record and folder.

    Every checkpoint is kept.
    """
    folder = tmp_path_factory.mktemp("averaged")
    return *tiny_run.train(str(folder), 12, ema=0.3, save_every=1, keep=12), folder


def checkpoint_at(folder, step):
    return folder / "checkpoints" / f"step_{step:08d}"


def equals(model, tensors):
    state = model.state_dict()
    return state.keys() == tensors.keys() and all(torch.equal(state[k], tensors[k]) for k in state)


def test_the_average_is_the_decayed_sum_of_all_weights(averaged):
    """(1 - d)^n of the start weights and d (1 - d)^(n - k) of those after step k, in float64."""
    model, _, folder = averaged
    weights = [tiny_run.build_model().state_dict()]
    weights += [load_file(checkpoint_at(folder, n) / "model.safetensors") for n in range(1, 13)]
    for n in (1, 2, 12):
        shares = [0.7**n] + [0.3 * 0.7 ** (n - k) for k in range(1, n + 1)]
        found = load_file(checkpoint_at(folder, n) / "ema.safetensors")
        assert found.keys() == weights[0].keys()
        for name, value in found.items():
            mean = sum(s * w[name].double() for s, w in zip(shares, weights, strict=False))
            assert value.dtype == torch.float32
            assert torch.allclose(value.double(), mean, rtol=1e-5, atol=1e-6), (n, name)
    assert equals(model, found) and not equals(model, weights[-1])


def test_the_average_changes_nothing_in_training(averaged):
    assert losses(averaged[1]) == losses(tiny_run.run("", 12))


def test_eight_small_averages_are_one_of_the_eightfold_share():
    """Released: 8 micro-iterations a step, the weights the same in all of them."""
    torch.manual_seed(0)
    start, end = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    small, once = start_average(start), start_average(start)
    for _ in range(8):
        update_average(small, end, 0.0002)
    update_average(once, end, 1 - (1 - 0.0002) ** 8)
    for name, value in once.items():
        assert torch.allclose(value, small[name], rtol=1e-5, atol=1e-7)
        assert not torch.equal(value, start.state_dict()[name])


def test_a_resumed_average_is_the_uninterrupted_one(averaged, tmp_path):
    model, history, folder = averaged
    early, _ = tiny_run.train(str(tmp_path), 12, ema=0.3, stop_after=5)
    assert equals(early, load_file(checkpoint_at(folder, 5) / "ema.safetensors"))
    for _ in range(2):  # the second time the run is finished already
        resumed, record = tiny_run.train(str(tmp_path), 12, ema=0.3)
        assert losses(record) == losses(history)
        assert equals(resumed, model.state_dict())
    states = [json.loads((checkpoint_at(f, 12) / "state.json").read_text())["sha256"]
              for f in (folder, tmp_path)]  # fmt: skip
    assert states[0] == states[1] and "ema.safetensors" in states[0]


@pytest.mark.parametrize("damage", [flip_a_bit, Path.unlink])
def test_a_checkpoint_with_a_damaged_average_is_passed_by(averaged, tmp_path, capsys, damage):
    tiny_run.run(str(tmp_path), 12, ema=0.3, stop_after=8)
    damage(checkpoint_at(tmp_path, 8) / "ema.safetensors")
    assert checkpoint.latest(tmp_path) == checkpoint_at(tmp_path, 4)
    assert "step_00000008 is damaged" in capsys.readouterr().err
    assert equals(tiny_run.train(str(tmp_path), 12, ema=0.3)[0], averaged[0].state_dict())


def test_a_run_without_an_average_is_not_continued_with_one(whole):
    with pytest.raises(ValueError, match=r"another configuration \(optim\.ema: 0\.0 there, 0\.3"):
        tiny_run.run(str(whole[1]), 24, ema=0.3)


@pytest.mark.slow
def test_fine_tuning_is_scored_on_the_average(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(classes, "score_split", lambda recipe, model, **_: seen.append(model))
    options = "--optim.ema .5 --optim.clips 2 --run.stop-after 2 --run.test-clips 1 "
    options += "--data.workers 0 --run.folder"
    finetune.main(["lesson_how", *options.split(), str(tmp_path)])
    assert equals(seen[0], load_file(checkpoint_at(tmp_path, 2) / "ema.safetensors"))
    assert not equals(seen[0], load_file(checkpoint_at(tmp_path, 2) / "model.safetensors"))


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


@pytest.mark.parametrize("name, case", schedules())
def test_the_rate_is_the_released_one(name, case, parity):
    """The released schedule counts micro-iterations; here one step stands for one of them."""
    policy = {"by_epoch": True, "warmup_by_epoch": False, "warmup_iters": 0, "warmup_ratio": 0.1,
              "min_lr": 0} | case["config"]  # fmt: skip
    assert policy["policy"] == "CosineAnnealing" and policy["min_lr"] == 0
    per_epoch = CASES["lr_schedule"]["micro_iterations_per_epoch"]
    warmup = policy["warmup_iters"] / (1 if policy["warmup_by_epoch"] else per_epoch)
    optim = Optim(lr=case["base_lr"], clips=1, epochs=case["total_epochs"], warmup=warmup,
                  warmup_start=policy["warmup_ratio"], stairs=policy["by_epoch"])  # fmt: skip
    steps, rates = zip(*[point[2:] for point in case["points"]], strict=True)
    ours = [learning_rate(optim, step, per_epoch) for step in steps]
    assert len(rates) > 20
    parity("h learning rates (relative)", np.abs(np.divide(ours, rates) - 1).max(), 1e-9)


def mmcv_rates(epochs, per_epoch, warmup, by_epoch):
    """What mmcv's hook sets before each iteration: an epoch's regular rate, then the warm-up's."""
    length, rates = warmup * per_epoch, []
    for i in range(epochs * per_epoch):
        done = i // per_epoch / epochs if by_epoch else i / (epochs * per_epoch)
        regular = (1 + np.cos(np.pi * done)) / 2
        if i < length:
            rate = regular * (1 - (1 - i / length) * (1 - 0.1))
        elif i == length or not by_epoch or i % per_epoch == 0:
            rate = regular
        rates.append(rate)
    return rates


@pytest.mark.parametrize("by_epoch", [True, False])
@pytest.mark.parametrize(
    "per_epoch, warmup",
    [(33, 2.5), (100, 2.5), (33, 2), (33, 2.01), (7, 0.3), (7, 2.99), (10, 2.3), (4, 0)],
)
def test_the_rate_is_what_mmcvs_hook_sets(per_epoch, warmup, by_epoch):
    optim = Optim(lr=1.0, clips=1, epochs=5, warmup=warmup, stairs=by_epoch)
    ours = [learning_rate(optim, step, per_epoch) for step in range(5 * per_epoch)]
    assert np.allclose(ours, mmcv_rates(5, per_epoch, warmup, by_epoch), rtol=1e-12, atol=0)


def test_warm_up_of_a_broken_length_holds_its_last_rate_to_the_epochs_end():
    """2.5 epochs of 33 steps end at 82.5: between two steps. Per step, nothing is held."""
    stairs = Optim(lr=1.0, clips=1, epochs=60, warmup=2.5, stairs=True)
    held = {learning_rate(stairs, step, 33) for step in range(82, 99)}
    regular = (1 + np.cos(np.pi * 2 / 60)) / 2
    assert len(held) == 1 and np.isclose(held.pop(), regular * (1 - 0.9 * 0.5 / 82.5), rtol=1e-12)
    assert np.isclose(learning_rate(stairs, 99, 33), (1 + np.cos(np.pi * 3 / 60)) / 2, rtol=1e-12)
    smooth = Optim(lr=1.0, clips=1, epochs=60, warmup=2.5)
    assert len({learning_rate(smooth, step, 33) for step in range(82, 99)}) == 17


def group_files():
    return [FOLDER / name for name in CASES.get("param_groups", [])]


@pytest.mark.parametrize("path", group_files(), ids=lambda p: p.stem)
def test_parameter_groups_are_the_released_ones(path, parity):
    golden = json.loads(path.read_text())
    name = path.stem.removeprefix("h_param_groups_")
    recipe = paper_joint() if name == "pretrain" else FINETUNE[f"paper_{name}"]()
    optim = recipe.optim
    assert optim.lr == golden["base_lr"] and optim.weight_decay == golden["base_weight_decay"]
    with torch.device("meta"):
        model = (parts.build_bevt if name == "pretrain" else parts.build_classifier)(recipe)
    mine = {
        released_name(parameter): (group["factor"], group["weight_decay"])
        for group in parameter_groups(model, optim, released_name)
        for parameter in group["names"]
    }
    assert mine.keys() == {row["name"] for row in golden["rows"]}
    for row in golden["rows"]:
        given = row["lr_mult"], row["weight_decay"]
        parity(
            "h lr factor, weight decay", np.abs(np.subtract(mine[row["name"]], given)).max(), 1e-9
        )


def test_adamw_state_survives_a_checkpoint(tmp_path):
    torch.manual_seed(0)
    models = [torch.nn.Linear(4, 3) for _ in range(2)]
    optimizers = [
        torch.optim.AdamW(parameter_groups(m, Optim(lr=0.1, clips=1, steps=1))) for m in models
    ]
    for _ in range(3):
        optimizers[0].zero_grad()
        models[0](torch.ones(2, 4)).square().sum().backward()
        optimizers[0].step()
    folder = checkpoint.save(tmp_path, 3, models[0], optimizers[0], {}, keep=2)
    assert checkpoint.load(folder, models[1], optimizers[1], {})["step"] == 3
    for model, optimizer in zip(models, optimizers, strict=True):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
    assert torch.equal(models[0].weight, models[1].weight)
