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
FLOORS = [
    {"config", "dist", "files", "seeds", "terms"},
    {"swin", "masking", "dalle", "tokenizer", "dvae", "peco", "video", "augment"},
    {"bevt", "synthetic", "lists", "datasets", "formats", "weights"},
    {"optim", "checkpoint", "metrics"},
    {"update", "record", "engine", "presets"},
    {
        "pretrain",
        "finetune",
        "evaluate",
        "train_tokenizer",
        "predict",
        "convert_weights",
        "check_data",
        "bench",
        "encoders",
        "cost",
        "perceptual",
        "tokenizer_scores",
    },
    {"viz", "widgets"},
]
WITHIN_A_FLOOR = {("dvae", "dalle"), ("peco", "dalle"), ("widgets", "viz")}
WITHIN_A_FLOOR |= {("tokenizer", "dalle"), ("tokenizer", "peco")}
WITHIN_A_FLOOR |= {(door, other) for door in FLOORS[5] for other in ("pretrain", "finetune")}
WITHIN_A_FLOOR |= {("weights", "formats"), ("weights", "bevt"), ("datasets", "lists")}
WITHIN_A_FLOOR |= {("engine", "update"), ("engine", "record")}
WITHIN_A_FLOOR |= {("pretrain", "cost"), ("finetune", "cost"), ("evaluate", "cost")}
WITHIN_A_FLOOR |= {("bench", "cost"), ("train_tokenizer", "cost")}
WITHIN_A_FLOOR |= {(door, "perceptual") for door in ("train_tokenizer", "tokenizer_scores")}
WITHIN_A_FLOOR |= {("perceptual", "encoders")}


def test_environment_yml_installs_from_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, _, pip = environment["dependencies"]
    assert python == "python=" + project["requires-python"].removeprefix(">=")
    assert _ == "pip" and pip == {"pip": ["-e .[test]"]}
    assert "test" in project["optional-dependencies"]


def test_every_file_has_its_floor_and_imports_only_from_below():
    height = {name: i for i, floor in enumerate(FLOORS) for name in floor}
    for path in sorted((ROOT / "bevt_lib").glob("*.py")):
        if path.stem == "__init__":
            continue
        assert path.stem in height, f"{path.name} has no floor"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bevt_lib"):
                inner = (node.module or "").partition(".")[2]
                imported = [inner] if inner else [alias.name for alias in node.names]
                for name in imported:
                    lower = height[name] < height[path.stem]
                    assert lower or (path.stem, name) in WITHIN_A_FLOOR, f"{path.name}: {name}"


def test_the_readme_shows_every_file_on_its_floor():
    shown = (ROOT / "README.md").read_text().split("```\nbevt_lib/")[1].split("data/  ")[0]
    words = re.findall(r"^ +(\w.*?)(?:  |$)", shown, re.M)
    rows = [set(row.split()) for row in words]
    floors = [*rows[:5], set().union(*rows[5:-1]), rows[-1]]
    assert floors == FLOORS


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


# Read when needed: training tokenizers, other codes' files, rendered clips, recipes as values.
BESIDE = {"dvae", "peco", "dalle", "files", "lists", "formats", "synthetic", "presets"}


def test_the_library_stays_readable_in_an_afternoon():
    """The way from pixels to a trained model; what lies beside it is read when needed."""
    paths = {p.stem: p for p in (ROOT / "bevt_lib").glob("*.py")}
    code = {name: lines_of_code(path) for name, path in paths.items()}
    path = {name for floor in FLOORS[:5] for name in floor} - BESIDE
    assert sum(code[name] for name in path) <= 2750, {name: code[name] for name in path}
    assert sum(code[name] for name in BESIDE) <= 1500, {name: code[name] for name in BESIDE}
    assert max(len(p.read_text().splitlines()) for p in paths.values()) <= 450


def test_data_stays_small():
    names = subprocess.run(
        ["git", "ls-files", "data"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    sizes = [(ROOT / n).stat().st_size for n in names if n and (ROOT / n).exists()]
    assert 0 < sum(sizes) < 10_000_000
