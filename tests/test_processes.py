"""The number of processes changes speed only; all runs here compute in float64."""

import json
import os
import subprocess
import sys
from pathlib import Path

import kill_runs
import numpy as np
import pytest
import tiny_run
import torch
from safetensors.torch import load_file

from bevt_lib.training import checkpoint
from bevt_lib.training.loop import TIMINGS

MODELS = ("bevt", "classifier")
STEPS = 20
SPREAD = [sys.executable, "-m", "torch.distributed.run"]


def start(*arguments, processes=2, **options):
    """Start a tiny run under torchrun, whose ``options`` are by default those of one machine."""
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in options.items()]
    flags = [f"--nproc-per-node={processes}", *(flags or ["--standalone"])]
    command = [*SPREAD, *flags, tiny_run.__file__, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip


def curves(child):
    """Wait for a run; give the losses it prints, a list for each model."""
    out, err = child.communicate(timeout=300)
    assert child.returncode == 0, err[-3000:]
    assert "find_unused_parameters" not in err, "DDP looks for parameters that are all used"
    return [json.loads(line) for line in out.splitlines() if line.startswith("[")]


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").open()]


def everything(folder):
    """Give all numbers of a record but the times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    return np.array([[v for k, v in sorted(e.items()) if k not in TIMINGS] for e in lines])


def seen(folder):
    """Collect what all processes saw: {(step, stream, position): digest}, each once."""
    lines = [json.loads(x) for file in folder.glob("digests.*") for x in file.open()]
    found = {tuple(key): digest for *key, digest in lines}
    assert len(found) == len(lines), "an item was seen twice"
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The runs on one process: drop path 0.2, dropout 0.5 in the classifier, no accumulation."""
    place = tmp_path_factory.mktemp("alone")
    for kind in MODELS:
        tiny_run.run(str(place / kind), STEPS, model=kind, precision="fp64", ema=0.3,
                     digests=str(place / f"digests.{kind}"))  # fmt: skip
    return place


def test_one_process_learns_with_noise(alone):
    for kind in MODELS:
        curve = losses(alone / kind)
        assert np.mean(curve[-3:]) < 0.9 * np.mean(curve[:3])
        network = tiny_run.build_model(kind=kind)
        noise = {s: torch.rand(2, n) for s, n in network.noise_sizes.items()}
        assert noise and network.swin.stages[-1].blocks[-1].drop_path == pytest.approx(0.2)
    assert network.dropout == 0.5
    without = tiny_run.build_model(kind="classifier")
    without.dropout = 0.0
    pixels = torch.randn(2, 3, 4, 32, 32)
    assert not torch.equal(network.logits(pixels, noise["clip"]),
                           network.logits(pixels))  # fmt: skip


def test_accumulation_changes_nothing(alone):
    for kind in MODELS:
        cut = [e["loss"] for e in tiny_run.run("", STEPS, model=kind, precision="fp64", micro=1)]
        assert np.abs(np.subtract(cut, losses(alone / kind))).max() < 1e-8


@pytest.mark.slow
@pytest.mark.parametrize("processes, micro, workers", [(2, 1, 2), (3, 1, 0)])
def test_processes_and_workers_change_nothing(alone, tmp_path, processes, micro, workers):
    options = ["--model", "both", "--precision", "fp64", "--micro", str(micro), "--workers",
               str(workers), "--ema", "0.3", "--digests", str(tmp_path / "digests")]  # fmt: skip
    spread = curves(start(str(tmp_path), str(STEPS), *options, processes=processes))
    assert len(spread) == 2 and len(list(tmp_path.glob("digests.*"))) == processes
    assert seen(tmp_path) == seen(alone)
    for kind in MODELS:
        a, b = everything(tmp_path / kind), everything(alone / kind)
        assert a.shape == b.shape and np.abs(a - b).max() < 1e-8, np.abs(a - b).max()
        last = f"checkpoints/step_{STEPS:08d}"
        for file in ("model.safetensors", "ema.safetensors"):
            ours, theirs = (load_file(place / kind / last / file) for place in (tmp_path, alone))
            for name, value in ours.items():
                assert value.dtype == torch.float64
                assert torch.allclose(value, theirs[name], rtol=0, atol=1e-8), (file, name)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(alone, tmp_path):
    options = {"precision": "fp64", "ema": 0.3}
    tiny_run.run(str(tmp_path), STEPS, stop_after=6, **options)
    flags = ["--precision", "fp64", "--ema", "0.3"]
    curves(start(str(tmp_path), str(STEPS), "--stop-after", "13", *flags))
    network, _ = tiny_run.train(str(tmp_path), STEPS, **options)
    assert np.abs(everything(tmp_path) - everything(alone / "bevt")).max() < 1e-8
    average = load_file(checkpoint.latest(alone / "bevt") / "ema.safetensors")
    for name, value in network.state_dict().items():
        assert torch.allclose(value, average[name], rtol=0, atol=1e-8), name


@pytest.mark.slow
def test_two_nodes_learn_the_same(alone, tmp_path):
    """Two launchers that meet by c10d stand for two machines, of one process and of two."""
    meeting = {"nnodes": 2, "rdzv_backend": "c10d", "rdzv_id": "tiny",
               "rdzv_endpoint": f"127.0.0.1:{kill_runs.free_port()}"}  # fmt: skip
    nodes = [start(str(tmp_path), str(STEPS), "--precision", "fp64", "--ema", "0.3",
                   processes=n, **meeting) for n in (1, 2)]  # fmt: skip
    told = [curves(node) for node in nodes]
    assert sorted(map(len, told)) == [0, 1]  # rank 0 tells
    assert np.abs(everything(tmp_path) - everything(alone / "bevt")).max() < 1e-8


@pytest.mark.slow
def test_real_clips_through_the_command_are_the_same_on_two_processes(tmp_path):
    """Decoded, cropped, masked and tokenized clips and stills of the lesson, three steps."""
    options = "lesson_joint --run.precision fp64 --run.stop-after 3 --run.threads 1 "
    options += "--optim.clips 4 --optim.images 4 --model.drop-path 0.2"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    spread = [*SPREAD, "--standalone", "--nproc-per-node=2"]
    for name, launcher, workers in (("one", [sys.executable], 1), ("two", spread, 0)):
        own = ["--run.folder", str(tmp_path / name), "--data.workers", str(workers)]
        command = [*launcher, "-m", "bevt_lib.pretrain", *options.split(), *own]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = everything(tmp_path / "one"), everything(tmp_path / "two")
    assert one.shape == two.shape and len(one) == 3
    assert np.abs(one - two).max() < 1e-8, np.abs(one - two).max()


@pytest.mark.slow
def test_an_error_of_the_first_process_ends_all_in_one_line(tmp_path):
    Path(tmp_path, "run").write_text("not a folder")
    child = start(str(tmp_path / "run"), "4")
    _, err = child.communicate(timeout=120)
    assert child.returncode and err.count("ValueError: can't write to the run folder") == 2
