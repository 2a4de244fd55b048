"""tests/gpu.sh, rehearsed on the CPU: all its parts, a kill, and a part that is out of time."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("gpu.sh")
NOT_HERE = sys.platform == "win32" or not (shutil.which("bash") and shutil.which("tee"))
pytestmark = [pytest.mark.slow, pytest.mark.skipif(NOT_HERE, reason="a script for bash")]


def start(out, *limits):
    """Start a rehearsal in a session of its own."""
    hidden = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    return subprocess.Popen(["bash", str(SCRIPT), str(out), "--tiny", *limits],
                            env=os.environ | hidden, start_new_session=True)  # fmt: skip


def results(out):
    return json.loads((out / "results.json").read_text())


def test_the_rehearsal_ends_with_every_result(tmp_path):
    assert start(tmp_path, "400", "200", "200").wait(800) == 0
    found = results(tmp_path)
    assert found["right"] and found["tiny"] and list(found["parts"]) == list(found["limits"])
    for part in found["parts"].values():
        assert part["state"] == "done"
        assert all(c["right"] in (True, None) and "error" not in c for c in part["checks"].values())
    checks = {name: part["checks"] for name, part in found["parts"].items()}
    judged = {name for name, c in checks["correctness"].items() if c["right"]}
    assert judged == {
        "golden numbers, fp64", "golden numbers, fp32", "attention, fp32", "attention, bf16",
        "bf16 and fp16 step", "world of one process", "ids changed by fp16",
        "resume after kill -9",
    }  # fmt: skip
    assert len(checks["correctness"]["attention, bf16"]["deviation"]) == 12
    table = json.loads((tmp_path / "bench_gpu.json").read_text())
    kinds = {"joint", "finetune", "limits", "inference", "tokenizing"}
    assert {row["kind"] for row in table["rows"]} == kinds == set(checks["speed"])
    stages = checks["learning"]
    assert set(stages) == {
        "rendered clips", "small_image", "small_joint", "small_what", "small_how"}  # fmt: skip
    for name in set(stages) - {"rendered clips"}:
        stage = stages[name]
        assert stage["steps"] == stage["planned_steps"] > 0 and 0 <= stage["data_wait"] <= 1
        assert any(key.endswith("loss") for key in stage["curve"]) and stage["held out"]
        assert load_file(tmp_path / stage["weights"]["file"])
    names = list(tmp_path.rglob("*"))
    assert len(names) <= 8 and all(p.parent == tmp_path for p in names)
    assert max(p.stat().st_size for p in names) < 16 * 2**20
    log = (tmp_path / "log.txt").read_text()
    assert log.count("== correctness") == len(checks["correctness"]) and "WRONG" not in log


def test_a_part_out_of_time_is_noted_and_the_next_runs(tmp_path):
    assert start(tmp_path, "1", "200", "0").wait(300) == 1
    found = results(tmp_path)
    states = {name: part["state"] for name, part in found["parts"].items()}
    assert states == {"correctness": "out of time", "speed": "done"} and not found["right"]


def first_checks(out):
    """Give the names of part one's checks so far."""
    try:
        return list(results(out)["parts"]["correctness"]["checks"])
    except (OSError, KeyError):
        return []


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="a session's processes are found in /proc")
def test_a_killed_script_leaves_what_it_found(tmp_path):
    script, deadline = start(tmp_path, "400", "200", "200"), time.monotonic() + 300
    while "golden numbers, fp64" not in first_checks(tmp_path):
        assert script.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    end_session(script.pid)
    assert script.wait(60) == -signal.SIGKILL
    found = results(tmp_path)
    assert found["parts"]["correctness"]["state"] == "running" and "right" not in found
    assert found["parts"]["correctness"]["checks"]["golden numbers, fp64"]["right"]
    assert (tmp_path / "log.txt").read_text().count("== correctness") >= 2


def end_session(leader):
    """Kill all processes of a session."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(int(folder.name)) == leader:
                os.kill(int(folder.name), signal.SIGKILL)
