"""Before notebooks are compared: one thread each, and the clips rendered (no progress bar then)."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config):
    from bevt_lib.datasets import synthetic

    synthetic.render()
