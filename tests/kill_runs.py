"""Kill tiny runs with SIGKILL in every way, and see that nothing is lost.

    python tests/kill_runs.py [--kills 100] [--seed 0] [--torchrun 12]

A run of 24 steps with validations, a weight average, two loader processes at times, and checkpoints
every third step is killed at random moments and at the named points of a save, one to three times,
and started again by the same command. After each kill the newest checkpoint must be readable and no
older than it was; at the end every line of the record must be that of the run nobody killed, to the
bit, and the best model the same. ``--torchrun`` of the kills hit two-process runs: a worker, both,
the launcher, or a worker that torchrun restarts by itself. Ends with status 1 if anything is lost.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import tiny_run

from bevt_lib.training import checkpoint, run_folder
from bevt_lib.training.loop import TIMINGS

STEPS, SAVE_EVERY, VALIDATE_EVERY, EMA = 24, 3, 5, 0.3
SETTINGS = {"save_every": SAVE_EVERY, "validate_every": VALIDATE_EVERY, "ema": EMA}
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=2"]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(owner: object, name: str, when: Callable[..., bool], how: str, count: int) -> None:
    """Die before, amid or after the ``count``-th call of owner.name of which ``when`` is true."""
    genuine, calls = getattr(owner, name), [0]

    def patched(*args, **kwargs):
        hit = when(*args)
        calls[0] += hit
        struck = hit and calls[0] == count
        if struck and how == "before":
            die()
        result = genuine(*args, **kwargs)
        if struck:
            if how == "amid":  # a file half written
                os.truncate(args[1], os.path.getsize(args[1]) // 2)
            die()
        return result

    setattr(owner, name, patched)


def half_removed(path, *args, **kwargs) -> bool:
    """Remove a file of an old checkpoint, as the start of removing it all."""
    old = Path(path).name.startswith(".old_step") and Path(path).exists()
    if old:
        sorted(Path(path).iterdir())[0].unlink()
    return old


def target(name: str):
    return lambda source, place, *rest: Path(place).name.startswith(name)


def any_call(*args) -> bool:
    return True


# Named points of a save: (owner, function, which calls, before | amid | after, calls there may be)
POINTS = {
    "before the write": (checkpoint, "save_tensors", any_call, "before", 20),
    "in mid-file": (checkpoint, "save_tensors", any_call, "amid", 20),
    "before the rename": (os, "rename", target("step_"), "before", 8),
    "after the rename, before pruning": (os, "rename", target("step_"), "after", 8),
    "in mid-pruning": (shutil, "rmtree", half_removed, "before", 6),
    "after the save, before its validation": (tiny_run, "score", any_call, "before", 5),
    "after the validation, before the best": (tiny_run, "score", any_call, "after", 5),
    "before the best is in place": (os, "rename", target("best"), "before", 2),
    "with the old best put aside": (os, "rename", target(".old_best"), "after", 1),
    "after the best, before its line": (os, "rename", target("best"), "after", 2),
    "in cutting the record back": (os, "replace", target("metrics"), "before", 1),
}  # fmt: skip


def start(folder: Path, log: Path, workers: int, strike: Callable[[], None] | None) -> int:
    """Fork a run; ``strike`` prepares its death. Forked, as importing torch takes seconds."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        if strike:
            strike()
        tiny_run.run(str(folder), STEPS, workers=workers, **SETTINGS)
        status = 0
    finally:
        os._exit(status)


def curve(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]


def best(folder: Path) -> dict:
    assert checkpoint.is_intact(folder / "best"), "the best model is damaged"
    return json.loads((folder / "best" / "state.json").read_text())


def newest(folder: Path) -> int:
    """Give the step of the newest checkpoint, which must be readable; 0 where there is none."""
    folders = sorted((folder / "checkpoints").glob("step_*"))
    if not folders:
        return 0
    assert checkpoint.latest(folder) == folders[-1], "the newest checkpoint is unreadable"
    return int(folders[-1].name[5:])


def check_end(folder: Path, whole: Path) -> None:
    assert curve(folder) == curve(whole), "the record is not that of the run nobody killed"
    assert best(folder) == best(whole), "the best model is another"
    names = {p.name for p in folder.iterdir()}
    assert names <= {"config.json", "metrics.jsonl", "checkpoints", "best"}, names
    kept = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert kept == sorted(p.name for p in (whole / "checkpoints").iterdir()), kept


def seconds_of(folder: Path, log: Path) -> float:
    began = time.monotonic()
    _, status = os.waitpid(start(folder, log, 0, None), 0)
    assert status == 0, log.read_text()[-2000:]
    return time.monotonic() - began


def children(pid: int) -> list[int]:
    try:
        return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def one_process_run(folder: Path, whole: Path, rng: random.Random, length: float, points: list,
                    kills: Counter) -> None:  # fmt: skip
    """Kill a run one to three times, then let it end. ``points``: named ones still to be met."""
    reached, log = 0, folder.with_suffix(".log")
    for _ in range(rng.choice((1, 1, 2, 3))):
        way = points.pop() if points else rng.choice(("at any moment", "a loader process"))
        workers = int(way == "a loader process")
        strike = None
        if way in POINTS:
            *place, most = POINTS[way]
            strike = partial(kill_at, *place, count=rng.randint(1, most))
        child = start(folder, log, workers, strike)
        if way not in POINTS:
            time.sleep(rng.uniform(0.1, 1) * length)
            for victim in children(child)[:1] if workers else [child]:
                os.kill(victim, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if status == 0:  # it was faster, or the point is met less often
            points += [way] if way in POINTS else []
            break
        assert status in (signal.SIGKILL, 1 << 8), log.read_text()[-2000:]
        kills[way] += 1
        assert newest(folder) >= reached, "a checkpoint was lost"
        reached = newest(folder)
    _, status = os.waitpid(start(folder, log, 0, None), 0)
    assert status == 0, log.read_text()[-2000:]
    check_end(folder, whole)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def launch(folder: Path, *options: str, **environment: str) -> subprocess.Popen:
    """Start a two-process run under torchrun."""
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}"]
    arguments = [str(folder), str(STEPS), "--save-every", str(SAVE_EVERY), "--validate-every",
                 str(VALIDATE_EVERY), "--ema", str(EMA)]  # fmt: skip
    command = [*LAUNCH, *rendezvous, *options, tiny_run.__file__, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    with folder.with_suffix(".log").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def wait_for_lines(folder: Path, count: int, child: subprocess.Popen) -> bool:
    """Wait until the record has so many lines; False: the run ended before."""
    while child.poll() is None:
        if len(run_folder.read_metrics(folder)) >= count:
            return True
        time.sleep(0.005)
    return False


def torchrun_run(folder: Path, whole: Path, rng: random.Random, way: str, kills: Counter) -> None:
    """Kill processes of a two-process run at a random step, then let it end."""
    restarts = 3 if way == "a worker that torchrun restarts" else 0
    child = launch(folder, f"--max-restarts={restarts}")
    count, before = rng.randint(1, STEPS - 6), kills[way]
    while wait_for_lines(folder, count, child):
        reached = newest(folder)
        workers = children(child.pid)
        victims = [child.pid] if way == "the launcher" else rng.sample(workers, 1)
        for victim in workers if way == "both workers" else victims:
            os.kill(victim, signal.SIGKILL)
        kills[way] += 1
        count += rng.randint(1, 6)
        if kills[way] - before >= max(1, restarts):
            break
    status = child.wait(timeout=120)
    if restarts:
        assert status == 0, folder.with_suffix(".log").read_text()[-3000:]
    else:
        assert newest(folder) >= reached, "a checkpoint was lost"
        child = launch(folder)
        assert child.wait(timeout=120) == 0, folder.with_suffix(".log").read_text()[-3000:]
    check_end(folder, whole)


TORCHRUN_WAYS = ("one worker", "the launcher", "both workers", "a worker that torchrun restarts")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--torchrun", type=int, default=12, help="kills of two-process runs")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    rng, kills, runs = random.Random(asked.seed), Counter(), 0
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        length = seconds_of(place / "whole", place / "whole.log")
        points = list(POINTS) * max(1, asked.kills // (2 * len(POINTS)))
        rng.shuffle(points)
        while sum(kills.values()) < asked.kills - asked.torchrun:
            runs += 1
            one_process_run(place / f"run_{runs}", place / "whole", rng, length, points, kills)
        alone, ways = sum(kills.values()), ()
        if asked.torchrun:
            assert launch(place / "two").wait(timeout=120) == 0, (place / "two.log").read_text()
        while sum(kills.values()) - alone < asked.torchrun:
            runs += 1
            ways = ways[1:] or TORCHRUN_WAYS
            torchrun_run(place / f"run_{runs}", place / "two", rng, ways[0], kills)
    for way, number in kills.items():
        print(f"{number:4d}  {way}")
    print(f"{sum(kills.values())} kills, {runs} runs of {STEPS} steps: all ended with the record "
          f"of the run nobody killed ({time.monotonic() - began:.0f} s)")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
