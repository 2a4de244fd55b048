"""Freed memory: kept by the process where asked, given back otherwise."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys, torch
from pathlib import Path
from bevt_lib.base.memory import keep_freed_memory

def held():  # MB
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6

there = "keep" in sys.argv and keep_freed_memory()
before = held()
blocks = [torch.ones(10_000_000) for _ in range(5)]
full = held()
del blocks
print(there, full - before > 150, full - held() > 150)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="tells its memory on Linux only")
def test_freed_memory_is_kept_or_given_back():
    told = {}
    for how in ("usual", "keep"):
        result = subprocess.run(
            [sys.executable, "-c", PROGRAM, how], capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        told[how] = result.stdout.strip()
    if told["keep"].startswith("False"):
        pytest.skip("another C library than glibc")
    assert told == {"usual": "False True True", "keep": "True True False"}
