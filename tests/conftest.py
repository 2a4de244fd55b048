"""One thread a test process: two of them share the cores, and threads that wait burn time."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
