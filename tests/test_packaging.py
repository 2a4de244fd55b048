"""The package as a user meets it: environments agree, imports work, floors hold."""

import ast
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "bevt_lib"
ROOMS = [
    "base", "model", "weights", "tokenizers", "datasets", "training", "scoring", "notebook",
]  # fmt: skip
SHARED = {"cli", "presets", "parts"}  # what lies at the top beside the commands


def test_environment_yml_installs_from_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, _, pip = environment["dependencies"]
    assert python == "python=" + project["requires-python"].removeprefix(">=")
    assert _ == "pip" and pip == {"pip": ["-e .[test]"]}
    assert "test" in project["optional-dependencies"]


def imported(path: Path) -> set[str]:
    """List the modules of the kit that a file imports anywhere, functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bevt_lib"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("bevt_lib")}
    return {name.removeprefix("bevt_lib.") for name in found}


def test_every_room_imports_only_from_those_before_it():
    for path in sorted(LIBRARY.rglob("*.py")):
        room, *inside = path.relative_to(LIBRARY).parts
        height = ROOMS.index(room) if inside else len(ROOMS)
        for name in imported(path):
            first = name.partition(".")[0]
            assert first not in ROOMS or ROOMS.index(first) <= height, f"{path}: {name}"
            assert first in ROOMS or not inside, f"{path} is in a room and imports {name}"
            assert first in {*ROOMS, *SHARED}, f"{path} uses the command {first} as a library"


def test_a_room_opens_with_one_sentence_and_nothing_else():
    assert {p.parent.name for p in LIBRARY.glob("*/__init__.py")} == set(ROOMS)
    for path in LIBRARY.glob("*/__init__.py"):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree) and len(tree.body) == 1, path


def test_the_readme_shows_the_tree_as_it_is():
    shown = (ROOT / "README.md").read_text().split("```\nbevt_lib/\n")[1].split("data/  ")[0]
    for room in ROOMS:
        row = re.search(rf"^  {room}/ +(.*?)(?:  .*)?$", shown, re.M)
        files = {p.stem for p in (LIBRARY / room).glob("*.py")} - {"__init__"}
        assert row and set(row[1].split()) == files, room
    top = {p.stem for p in LIBRARY.glob("*.py")} - {"__init__"}
    assert top <= set(re.findall(r"\w+", shown)), top - set(re.findall(r"\w+", shown))


def test_the_names_that_others_use_are_each_in_one_place():
    names = (
        "Video VideoError BadFile read_image pretraining_views read_image_folder read_list "
        "read_entries Classifier BEVT export read_weights start_classifier load_model "
        "load_tokenizer"
    )
    homes: dict[str, list[str]] = {name: [] for name in names.split()}
    for path in LIBRARY.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in homes:
                homes[node.name].append(path.name)
    assert all(len(found) == 1 for found in homes.values()), homes


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_works_where_torchvision_does_not_load():
    """Whatever torchvision does by itself, after the guard timm and its transforms import."""
    assert run_python("import bevt_lib, timm, torchvision; print(torchvision.ops.nms)")


def test_a_working_torchvision_is_left_untouched(tmp_path):
    (tmp_path / "torchvision.py").write_text("mark = 'as it was'\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import torchvision; before = "
        "vars(torchvision).copy(); import bevt_lib; import torchvision as again; "
        "print(again is torchvision, vars(again) == before, 'torch' in sys.modules)"
    )
    assert run_python(code) == "True True False"


def test_another_torchvision_error_is_not_swallowed(tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('something else')\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "try:\n    import bevt_lib\nexcept RuntimeError as e:\n    print(e)"
    )
    assert run_python(code) == "something else"


def test_importing_opens_no_file_and_sets_no_seed():
    code = (
        "import bevt_lib, torch, numpy, random; a = torch.get_rng_state().clone(); "
        "b = random.getstate(); import bevt_lib.pretrain, bevt_lib.finetune; "
        "print(torch.equal(a, torch.get_rng_state()), b == random.getstate(), "
        "torch.cuda.is_initialized())"
    )
    assert run_python(code) == "True True False"


def lines_of_code(path: Path) -> int:
    """Count the lines that hold code: no blank lines, comments or docstrings."""
    text = path.read_text()
    quiet = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in quiet:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


# Read when needed: tokenizers, other codes' files, rendered clips.
BESIDE = {"datasets/synthetic", "datasets/lists", "base/files"}


def test_the_library_stays_readable_in_an_afternoon():
    """The way from pixels to a trained model, the whole, and no file of two rooms."""
    code = {
        path.relative_to(LIBRARY).with_suffix("").as_posix(): lines_of_code(path)
        for path in LIBRARY.rglob("*.py")
    }
    path = {n for n in code if n.startswith(("base/", "model/", "datasets/", "training/"))} - BESIDE
    assert sum(code[name] for name in path) <= 2750, {name: code[name] for name in path}
    assert sum(code.values()) <= 6450, code  # 5,700 before anything was fast
    assert max(len(p.read_text().splitlines()) for p in LIBRARY.rglob("*.py")) <= 450


def test_data_stays_small():
    names = subprocess.run(
        ["git", "ls-files", "data"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    sizes = [(ROOT / n).stat().st_size for n in names if n and (ROOT / n).exists()]
    assert 0 < sum(sizes) < 10_000_000
