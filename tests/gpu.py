"""Start the parts of tests/gpu.sh one after the other, each under its time limit.

    python tests/gpu.py OUT [--tiny] [--spent SECONDS] [CORRECTNESS SPEED LEARNING]

OUT/results.json holds, for each part, its "state" (running, done, out of time, or how it failed)
and its checks, each with "right": true, false, or null where there is nothing to be right. It is
whole at any moment. Imports nothing that takes long: a limit counts from its part's first second.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PARTS = {"correctness": 140, "speed": 150, "learning": 190}  # seconds
CODE = Path(__file__).with_name("gpu_parts.py")
RENDER = (
    "import os; from bevt_lib.datasets import synthetic; synthetic.render(None, os.cpu_count())"
)


def read(out: Path) -> dict[str, Any]:
    """Read the results so far."""
    return json.loads((out / "results.json").read_text())


def write(out: Path, results: dict[str, Any]) -> None:
    """Replace the results by whole new ones."""
    part = out / ".results.part"
    part.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(part, out / "results.json")


def note(out: Path, part: str, check: str = "", **values: Any) -> None:
    """Note values of a part, or of a check of it."""
    results = read(out)
    entry = results["parts"].setdefault(part, {"state": "running", "checks": {}})
    (entry["checks"].setdefault(check, {}) if check else entry).update(values)
    write(out, results)


def run_part(name: str, out: Path, limit: float, words: list[str]) -> None:
    """Run a part in a process group of its own, which is killed at the limit."""
    began = time.monotonic()
    note(out, name, limit=round(limit, 1))
    end = time.time() + limit
    command = [sys.executable, str(CODE), name, str(out), f"{end:.1f}", *words]
    child = subprocess.Popen(command, process_group=0)
    try:
        status = child.wait(limit)
        state = f"failed with status {status}" if status else "done"
    except subprocess.TimeoutExpired:
        state = "out of time"
    finally:
        kill_group(child)
    note(out, name, state=state, seconds=round(time.monotonic() - began, 1))


def kill_group(child: subprocess.Popen) -> None:
    """Kill what is left of a process group, and collect its leader."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def is_right(results: dict[str, Any]) -> bool:
    """Whether every part was done and no check was wrong."""
    return all(
        part["state"] == "done"
        and all(c.get("right") is not False for c in part["checks"].values())
        for part in results["parts"].values()
    )


def summary(results: dict[str, Any]) -> str:
    """Write a line for each part and each check."""
    words = {True: "right", False: "WRONG", None: "-"}
    lines = []
    for name, part in results["parts"].items():
        lines.append(f"{name}: {part['state']}, {part['seconds']} of {part['limit']} s")
        for check, found in part["checks"].items():
            error = str(found.get("error", "")).strip().splitlines()[-1:]
            lines.append(f"  {words[found.get('right')]:6s}{check}  {''.join(error)}")
    return "\n".join(lines)


def main() -> int:
    """Run the parts; return 0 if every one was done and everything was right."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("limits", type=float, nargs="*", help="seconds of each part; 0: leave out")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--spent", type=float, default=0.0, help="seconds of the set-up")
    given = parser.parse_intermixed_args()
    if len(given.limits) not in (0, len(PARTS)):
        parser.error(f"give {len(PARTS)} limits: {', '.join(PARTS)}")
    limits = dict(zip(PARTS, given.limits or PARTS.values(), strict=True))
    end = time.monotonic() + sum(limits.values()) - given.spent
    write(given.out, {"tiny": given.tiny, "limits": limits, "setup": given.spent, "parts": {}})
    # The clips are rendered beside the first checks; whoever needs them waits for the lock.
    rendering = subprocess.Popen([sys.executable, "-c", RENDER], process_group=0)
    for name, limit in limits.items():
        left = end - time.monotonic()
        if limit:
            seconds = left if name == "learning" else min(limit, left)
            run_part(name, given.out, max(0.1, seconds), ["--tiny"] * given.tiny)
    kill_group(rendering)
    results = read(given.out)
    results["right"] = is_right(results)
    write(given.out, results)
    print(summary(results))
    return 0 if results["right"] else 1


if __name__ == "__main__":
    sys.exit(main())
