"""Run notebooks whole and store their outputs: ``python notebooks/execute.py [NAME.ipynb ...]``.

Without names, all of them. Timings and widget states are not stored, so that only what changed
shows in a diff. One thread, as in the tests.
"""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def execute(path: Path) -> None:
    """Run one notebook from a fresh kernel, in its own folder, and write it back."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", record_timing=False, store_widget_state=False,
        coalesce_streams=True, resources={"metadata": {"path": str(path.parent)}},
    )  # fmt: skip
    client.execute()
    notebook.metadata.language_info = {"name": "python"}
    nbformat.write(notebook, path)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    here = Path(__file__).parent
    for path in map(Path, sys.argv[1:] or sorted(here.glob("*.ipynb"))):
        execute(path.resolve())
        print("ran", path)
