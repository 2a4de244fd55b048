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

there = keep_freed_memory()
for kept in (True, False):
    keep_freed_memory(kept)
    before = held()
    del_me = [torch.ones(10_000_000) for _ in range(5)]
    full = held()
    del del_me
    print(there, kept, full - before > 150, full - held() > 150)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="tells its memory on Linux only")
def test_freed_memory_is_kept_or_given_back():
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    kept, usual = result.stdout.splitlines()
    if not kept.startswith("True"):
        pytest.skip("another C library than glibc")
    assert kept == "True True True False", "held after it was freed"
    assert usual.startswith("True False") and usual.endswith("True"), "given back"
