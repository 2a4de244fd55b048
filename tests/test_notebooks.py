"""Notebooks as pages: run in order, small, on one idea each; their exercises can be solved."""

import base64
import re
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(path):
    return [c for c in read(path).cells if c.cell_type == "code" and c.source.strip()]


def test_the_notebooks_are_there_in_order():
    assert [p.name[:2] for p in NOTEBOOKS] == [f"{n:02d}" for n in range(len(NOTEBOOKS))]
    assert len(NOTEBOOKS) >= 8


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_was_run_whole_and_stays_small(path):
    cells = code_cells(path)
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    assert not [o for c in cells for o in c.outputs if o.output_type == "error"]
    lengths = sorted(len(c.source.splitlines()) for c in cells)
    assert lengths[-1] <= 25 and lengths[len(lengths) // 2] <= 8, lengths
    assert len(cells) <= 40 and path.stat().st_size <= 300_000
    assert read(path).metadata.kernelspec.name == "python3"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_few_outputs_are_left_uncompared(path):
    """Versions, timings and live training are ignored; every other output is held to the letter."""
    cells = code_cells(path)
    ignored = [c for c in cells if "NBVAL_IGNORE_OUTPUT" in c.source]
    assert not [c for c in cells if re.search(r"NBVAL_(SKIP|RAISES)|nbval-skip", c.source)]
    live = [c for c in ignored if re.search(r"train\(|subprocess|__version__|started", c.source)]
    assert len(ignored) == len(live) <= 4


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_picture_has_a_number_beside_it(path):
    for cell in code_cells(path):
        kinds = [k for o in cell.outputs for k in o.get("data", {})]
        if {"image/png", "image/jpeg"} & set(kinds):
            before = code_cells(path)[: cell.execution_count]
            near = (
                before[-2:] if not any(o.output_type == "stream" for o in cell.outputs) else [cell]
            )
            assert any(o.output_type == "stream" for c in near for o in c.outputs), cell.source


@pytest.mark.parametrize("path", NOTEBOOKS[1:], ids=lambda p: p.stem)
def test_exercises_pass_unanswered_and_their_solutions_are_right(path):
    cells = [c for c in code_cells(path) if re.search(r"^def check_", c.source, re.M)]
    hidden = [m for c in read(path).cells if c.cell_type == "markdown"
              for m in re.findall(r"<details>.*?```python\n(.*?)```", c.source, re.S)]  # fmt: skip
    assert len(hidden) == len(cells) >= 1
    import math

    import numpy as np

    for cell, solution in zip(cells, hidden, strict=True):
        assert "not answered yet" in cell.outputs[0].text
        scope = {"np": np, "math": math}
        exec(cell.source, scope)
        exec(solution, scope)
        call = re.search(r"^print\((check_\w+\(.*\))\)$", cell.source, re.M).group(1)
        assert eval(call, scope) == "right"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_question_is_answered_after_its_cell(path):
    """After "**Predict" come code and, before the next, a text that begins with "**Answer**"."""
    open_question = ran = False
    for cell in read(path).cells:
        ran |= cell.cell_type == "code"
        if cell.cell_type == "markdown":
            if cell.source.startswith("**Answer**"):
                assert open_question and ran, cell.source
                open_question = False
            if "**Predict" in cell.source:
                assert not open_question, cell.source
                open_question, ran = True, False
    assert not open_question


def test_the_readme_shows_notebook_00_s_picture():
    pictures = [o.data["image/jpeg"] for c in code_cells(NOTEBOOKS[0]) for o in c.outputs
                if "image/jpeg" in o.get("data", {})]  # fmt: skip
    assert base64.b64decode(pictures[0]) == (NOTEBOOKS[0].parent / "strip.jpg").read_bytes()


def links(path):
    text = "\n".join(c.source for c in read(path).cells if c.cell_type == "markdown")
    return re.findall(r"\]\((\d\d_\w+\.ipynb)\)", text)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_links_lead_somewhere(path):
    for name in links(path):
        assert (path.parent / name).exists(), name


def test_changing_one_stored_number_makes_nbval_fail(tmp_path):
    import subprocess
    import sys

    path = next(p for p in NOTEBOOKS if p.stem == "02_masking")
    notebook = read(path)
    cell = next(c for c in notebook.cells if "cells hidden" in c.source and c.cell_type == "code")
    cell.outputs[0].text = cell.outputs[0].text.replace("24 of 49", "23 of 49", 1)
    nbformat.write(notebook, tmp_path / path.name)
    command = [sys.executable, "-m", "pytest", "--nbval", "-q", "-n", "0", "-c", "/dev/null",
               str(tmp_path / path.name)]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 1 and "23 of 49" in result.stdout
