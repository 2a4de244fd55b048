"""Commands as users type them: options, files of values, help; errors in one clear line."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from bevt_lib import (
    bench,
    check_data,
    convert_weights,
    evaluate,
    finetune,
    predict,
    pretrain,
    tokenizer_scores,
    train_tokenizer,
)
from bevt_lib.base import files
from bevt_lib.base.config import UNUSED, flatten
from bevt_lib.cli import choose, parse, run_command
from bevt_lib.presets import FINETUNE, PRETRAIN, TRAIN_TOKENIZER, lesson_image

ROOT = Path(__file__).parent.parent
PRESETS = {
    pretrain: PRETRAIN, finetune: FINETUNE, train_tokenizer: TRAIN_TOKENIZER,
    evaluate: evaluate.PRESETS,
}  # fmt: skip
EVERY = [(command, name) for command, presets in PRESETS.items() for name in presets]
PLAIN = [predict, convert_weights, check_data, bench, tokenizer_scores]


def run(*arguments, **environment):
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120,
                          env=os.environ | environment)  # fmt: skip


WEIGHTS = str(files.data_folder() / "weights" / "lesson_joint.safetensors")
REFUSALS = {
    "unknown preset": (["bevt_lib.pretrain", "lesson_imge"], "did you mean lesson_image"),
    "misspelt override": (
        ["bevt_lib.pretrain", "lesson_image", "--run.sed", "1"], "did you mean --run.seed"),
    "wrong type": (["bevt_lib.pretrain", "lesson_image", "--run.seed", "x"], "--run.seed x"),
    "no value": (["bevt_lib.pretrain", "lesson_image", "--run.seed"], "needs a value"),
    "impossible value": (["bevt_lib.finetune", "lesson_how", "--optim.lr", "-1"], "positive"),
    "wrong image size": (
        ["bevt_lib.pretrain", "lesson_image", "--data.size", "100"], "multiple of 32"),
    "missing tokenizer": (["bevt_lib.pretrain", "paper_image", "--data.image-root", "nowhere"],
                          "with --tokens.weights"),
    "missing start for fine-tuning": (
        ["bevt_lib.finetune", "paper_ssv2", "--data.video-list", "a", "--data.val-list", "b"],
        "--run.init FILE"),
    "missing weights": (
        ["bevt_lib.pretrain", "lesson_joint", "--run.init", "nowhere.safetensors"], "no weights"),
    "missing list": (
        ["bevt_lib.finetune", "paper_k400", "--run.init", "scratch"], "--data.video-list"),
    "no model to evaluate": (["bevt_lib.evaluate", "paper_k400"], "--run.init MODEL"),
    "another model to evaluate": (
        ["bevt_lib.evaluate", "lesson_how", "--run.init", WEIGHTS], "missing 6 (head.bias"),
    "missing start of a small stage": (["bevt_lib.pretrain", "small_joint"], "--run.init FILE"),
    "missing pictures": (
        ["bevt_lib.pretrain", "lesson_image", "--data.image-root", "nowhere"], "no pictures"),
    "uneven batch": (
        ["bevt_lib.pretrain", "lesson_image", "--run.micro-batch", "7"], "can't be cut"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", REFUSALS)
def test_a_mistake_ends_in_one_clear_line(kind, tmp_path):
    arguments, message = REFUSALS[kind]
    result = run(*arguments, "--run.folder", str(tmp_path / "run")) if kind != "no value" else run(
        *arguments)  # fmt: skip
    assert result.returncode == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], lines
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_a_bad_video_in_a_loader_process_ends_in_one_line(tmp_path):
    listed = tmp_path / "list.txt"
    listed.write_text("broken.mp4 0\n")
    (tmp_path / "broken.mp4").write_text("no video")
    places = ["--data.video-root", str(tmp_path), "--run.folder", str(tmp_path / "run")]
    lists = ["--data.video-list", str(listed), "--data.val-list", str(listed)]
    result = run("bevt_lib.finetune", "lesson_how", *lists, *places)
    assert result.returncode == 2
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and "broken.mp4" in last and "Traceback" not in result.stderr


PLANS = {
    "paper_image": ("bevt_lib.pretrain", "2048 images"),
    "paper_joint": ("bevt_lib.pretrain", "312.71 G tokenizer on about 12 frames"),
    "paper_k400": ("bevt_lib.finetune", "281.92 G by fvcore"),
    "paper_ssv2": ("bevt_lib.finetune", "320.95 G by fvcore"),
    "lesson_joint": ("bevt_lib.pretrain", "weights/lesson_image.safetensors"),
    "small_joint": ("bevt_lib.pretrain", "64 videos + 64 images"),
    "small_what": ("bevt_lib.finetune", "every 5 epochs"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_a_plan_reads_no_data(name):
    module, message = PLANS[name]
    result = run(module, name, "--run.dry-run", "--run.processes", "8", BEVT_DATA="/nowhere")
    assert result.returncode == 0, result.stderr
    shown = " ".join(result.stdout.split())
    assert message in shown and "8 process(es)" in shown


def name_of(command):
    """Give a command's name as users type it."""
    return command.__name__.removeprefix("bevt_lib.")


def recipe_of(command, *words):
    return choose(PRESETS[command], words, name_of(command))


def refusal(command, words, monkeypatch, capsys):
    """Run a command that is to refuse its arguments; give the one line it says."""
    monkeypatch.setattr(sys, "argv", ["", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        run_command(command.main)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and not out and err.startswith("error: ") and err.count("\n") == 1
    return err.removeprefix("error: ").strip()


WRONG = {
    "unknown preset": (pretrain, "lesson_imge", "did you mean lesson_image"),
    "nothing like a preset": (pretrain, "xyz", "choose from lesson_image, lesson_joint"),
    "misspelt": (pretrain, "lesson_image --run.sed 1", "--run.sed: did you mean --run.seed?"),
    "misspelt, attached": (
        pretrain, "lesson_image --data.vidoe_list=x", "did you mean --data.video-list?"),
    "nothing like a field": (finetune, "lesson_how --qqqqqq 1", "unknown option --qqqqqq"),
    "single dash": (finetune, "lesson_how -n 1", "unknown option -n"),
    "stray word": (pretrain, "lesson_image 3", "unexpected argument '3'"),
    "no value": (pretrain, "lesson_image --run.seed", "option --run.seed needs a value"),
    "an option for a value": (
        pretrain, "lesson_image --run.seed --run.dry-run", "option --run.seed needs a value"),
    "no number": (pretrain, "lesson_image --run.seed x", "--run.seed x: INT expected"),
    "no whole number": (pretrain, "lesson_image --run.seed=1.5", "--run.seed=1.5: INT expected"),
    "no share": (finetune, "lesson_how --dropout half", "--dropout half: FLOAT expected"),
    "too few": (pretrain, "lesson_image --data.short 98", "--data.short 98: INT,INT expected"),
    "too many": (finetune, "lesson_how --rand-augment 1,2,3", "1,2,3: INT,INT expected"),
    "no switch": (finetune, "lesson_how --flip no", "--flip no: [true|false] expected"),
    "no list of lists": (pretrain, "lesson_image --optim.rules norm,1,0", "JSON expected"),
    "a value that can't be": (
        finetune, "lesson_how --run.seed 1 --optim.lr -1", "--optim.lr -1: optim.lr must be"),
    "two lengths": (
        finetune, "lesson_how --optim.epochs 5", "--optim.epochs 5: give the length as"),
    "no length": (
        finetune, "lesson_how --optim.epochs 0 --run.seed 3 --optim.steps 0",
        "--optim.epochs 0 --optim.steps 0: give the length as"),
    "magnitude": (finetune, "lesson_how --rand-augment 4,31", "--rand-augment 4,31: rand_augment"),
    "images in fine-tuning": (finetune, "lesson_how --optim.images 8", "--optim.images means noth"),
    "pictures in fine-tuning": (
        finetune, "lesson_how --data.image_root=x", "--data.image_root means nothing"),
    "training in evaluation": (
        evaluate, "lesson_how --run.init x --optim.lr 1", "--optim.lr means nothing"),
    "videos for a tokenizer": (
        train_tokenizer, "lesson_dvae --data.video-list x", "--data.video-list means nothing"),
    "validation in pretraining": (
        pretrain, "lesson_joint --data.val-list x", "--data.val-list means nothing"),
    "a setting of the other tokenizer": (
        train_tokenizer, "lesson_dvae --code-dim 3", "unknown option --code-dim"),
    "no such file": (pretrain, "--config nowhere.json", "No such file"),
    "neither preset nor file": (pretrain, "--run.seed 3", "unknown preset ''"),
    "no places": (predict, "", "missing FOLDER and VIDEO"),
    "one place": (convert_weights, "a.pth", "missing OUT"),
    "a third place": (predict, "a b c", "unexpected argument 'c'"),
    "no format": (convert_weights, "a b --to caffe", "--to caffe: {ours,bevt,"),
    "misspelt in a plain command": (check_data, "x --worker 2", "did you mean --workers?"),
    "no processes": (bench, "--processes 0", "--processes, --rounds"),
    "no file for the table": (tokenizer_scores, "--json", "option --json needs a value"),
    "no name of a tokenizer": (tokenizer_scores, "x.safetensors", "NAME=FILE"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_words_are_named_in_one_line(kind, monkeypatch, capsys):
    command, words, message = WRONG[kind]
    assert message in refusal(command, words.split(), monkeypatch, capsys)


VALUES = {
    "--data.short 98,112": {"data.short": (98, 112)},
    "--data.short=[98,112]": {"data.short": (98, 112)},
    "--data_size 64 --data.size=32": None,  # not a field: a section ends in a dot
    "--data.size 64 --data.size=32": {"data.size": 32},
    "--data.image_root=a=b --run.init x": {"data.image_root": "a=b", "run.init": "x"},
    "--data.checked a,b": {"data.checked": ("a", "b")},
    "--data.checked a": {"data.checked": ("a",)},
    "--data.checked=": {"data.checked": ()},
    "--run.folder=": {"run.folder": ""},
    "--optim.lr 1e-4 --optim.clip-norm 0": {"optim.lr": 1e-4, "optim.clip_norm": 0.0},
    "--run.seed -1": {"run.seed": -1},
    "--run.seed=-1 --masking.tube .5,1": {"run.seed": -1, "masking.tube": (0.5, 1.0)},
    "--run.compile": {"run.compile": True},
    "--run.compile --run.seed 1": {"run.compile": True, "run.seed": 1},
    "--run.compile True --keep_token_head": {"run.compile": True, "keep_token_head": True},
    "--data.embedded false": {"data.embedded": False},
    "--data.embedded=false": {"data.embedded": False},
    "--optim.steps 0 --optim.epochs 5": {"optim.steps": 0, "optim.epochs": 5.0},
    "--optim.epochs 5 --optim.steps 0": {"optim.steps": 0, "optim.epochs": 5.0},
    '--optim.rules=[["norm",1,0.5]]': {"optim.rules": (("norm", 1.0, 0.5),)},
}


@pytest.mark.parametrize("words", VALUES)
def test_values_are_read_as_their_fields_say_and_the_preset_stays(words):
    before = flatten(lesson_image())
    if VALUES[words] is None:
        with pytest.raises(ValueError, match="unknown option"):
            parse(lesson_image(), words.split())
        return
    for recipe in (parse(lesson_image(), words.split()),
                   recipe_of(pretrain, "lesson_image", *words.split())):  # fmt: skip
        after = flatten(recipe)
        changed = {k: v for k, v in after.items() if v != before[k]}
        assert {k: after[k] for k in VALUES[words]} == VALUES[words]
        assert changed.keys() <= VALUES[words].keys()
        assert all(type(v) is type(before[k]) for k, v in changed.items())
    assert flatten(lesson_image()) == before


def test_an_empty_text_is_a_value():
    recipe = parse(lesson_image(), ["--data.image-list", "x", "--data.image-list", ""])
    assert recipe == lesson_image()


def help_of(command, words, monkeypatch, capsys):
    """Give a command's help: as printed, and what it says of each option."""
    monkeypatch.setenv("COLUMNS", "90")
    with pytest.raises(SystemExit) as end:
        command.main([*words, "--help"])
    out, err = capsys.readouterr()
    assert end.value.code == 0 and not err and "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 100
    flat = " ".join(re.sub("[─│╭╮╰╯]", " ", out.partition("usage: ")[2]).split())
    options = re.findall(r" --([\w.-]+) ((?:[A-Z]+|\.\.\.|,|\[true\|false\]|\{[^}]*\})+) "
                         r"(.*?) ?\(default: ", flat)  # fmt: skip
    return out, {name: text for name, _, text in options}


@pytest.mark.parametrize(("command", "name"), EVERY, ids=lambda x: getattr(x, "__name__", x))
def test_help_explains_every_field_that_means_something_here(command, name, monkeypatch, capsys):
    out, options = help_of(command, [name], monkeypatch, capsys)
    recipe = flatten(PRESETS[command][name]())
    used = [key for key in recipe if not key.startswith(UNUSED[name_of(command)])]
    assert list(options) == sorted(
        (key.replace("_", "-") for key in used), key=lambda key: list(options).index(key)
    )
    short = {key: text for key, text in options.items() if len(text.split()) < 2}
    assert not short, "without an explanation"
    first, *_ = PRESETS[command][name].__doc__.strip().splitlines()
    assert first in out and "--config FILE" in out and out.count("data options") == 1
    values = {"data.workers": recipe["data.workers"], "data.size": recipe["data.size"]}
    for key, value in values.items():
        assert re.search(rf"--{key} INT[^(]*\(default: {value}\)", re.sub(r"[│\s]+", " ", out))


@pytest.mark.parametrize("command", PLAIN, ids=name_of)
def test_help_of_the_plain_commands(command, monkeypatch, capsys):
    out, options = help_of(command, [], monkeypatch, capsys)
    assert command.__doc__.strip().splitlines()[0] in out
    assert all(len(text.split()) >= 1 for text in options.values())
    for place in {predict: ["FOLDER", "VIDEO"], check_data: ["LIST"]}.get(command, []):
        assert re.search(rf"{place} +\w", out)


@pytest.mark.parametrize("command", PRESETS, ids=name_of)
def test_without_a_preset_all_are_listed(command, capsys):
    for words, status in (([], 2), (["--help"], 0), (["-h"], 0)):
        with pytest.raises(SystemExit) as end:
            command.main(words)
        out = capsys.readouterr().out
        assert end.value.code == status and out.startswith(
            f"usage: python -m bevt_lib.{name_of(command)}"
        )
        for name, preset in PRESETS[command].items():
            assert f"{name} {preset.__doc__.strip().splitlines()[0]}" in " ".join(out.split())


def dry_run(command, words, capsys):
    command.main([*words, "--run.dry-run"])
    return capsys.readouterr().out


CHANGED = {
    pretrain: ["lesson_joint", "--optim.lr", "0.1", "--data.video-list", "own.txt",
               "--data.checked", "a b,c", "--streams", "video"],
    finetune: ["paper_ssv2", "--run.init", "x", "--optim.ema", "0.1", "--num-classes", "3"],
    train_tokenizer: ["lesson_peco", "--perceptual-levels", "1,2", "--run.seed", "7"],
    evaluate: ["paper_k400", "--run.init", "x", "--split", "val", "--allow-missing"],
}  # fmt: skip


@pytest.mark.parametrize("command", PRESETS, ids=name_of)
def test_what_a_dry_run_prints_gives_the_recipe_back(command, tmp_path, capsys):
    words = [*CHANGED[command], "--run.processes", "1"]
    recipe = recipe_of(command, *words)
    out = dry_run(command, words, capsys)
    plan = command.plan(recipe)
    assert out.startswith(f"{plan}\n\n{{\n")
    fields = json.loads(out.removeprefix(plan))
    assert fields == json.loads(json.dumps(
        {k: v for k, v in flatten(recipe).items() if k != "run.dry_run"}))  # fmt: skip
    for text in (out, out.removeprefix(plan)):  # as printed, and the JSON alone
        (tmp_path / "mine.json").write_text(text)
        for preset in ([], [words[0]]):
            again = [*preset, "--config", str(tmp_path / "mine.json")]
            assert recipe_of(command, *again) == recipe
            assert dry_run(command, again, capsys) == out


@pytest.mark.parametrize(("command", "name"), EVERY, ids=lambda x: getattr(x, "__name__", x))
def test_every_preset_survives_its_file(command, name, tmp_path):
    recipe = PRESETS[command][name]()
    (tmp_path / "config.json").write_text(json.dumps(flatten(recipe), indent=1))
    assert recipe_of(command, "--config", str(tmp_path)) == recipe


def test_a_file_comes_after_the_preset_and_before_the_options(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"optim.lr": 0.5, "run.seed": 3, "data.short": [96, 100], "optim.steps": 0}')
    words = ["--run.seed", "4", f"--config={path}", "--optim.epochs", "2"]
    recipe = recipe_of(pretrain, "lesson_joint", *words)
    assert (recipe.optim.lr, recipe.run.seed, recipe.data.short) == (0.5, 4, (96, 100))
    assert (recipe.optim.epochs, recipe.optim.steps, recipe.optim.clips) == (2.0, 0, 8)
    with pytest.raises(ValueError, match="unknown preset ''"):
        recipe_of(pretrain, *words)  # the file has no name


def test_an_older_runs_folder_is_read(tmp_path):
    """A run notes its lists and its tokenizer too, and fields had other names."""
    recipe = recipe_of(finetune, "lesson_how", "--run.seed", "5", "--model.released-quirks")
    held = flatten(recipe) | {"items.clip": "a1", "tokens.sha256": "b2", "optim.images": 3}
    held["model.released"] = held.pop("model.released_quirks")
    del held["data.decoder"], held["run.dry_run"]
    (tmp_path / "config.json").write_text(json.dumps(held))
    assert recipe_of(finetune, "--config", str(tmp_path)) == recipe
    tested = recipe_of(evaluate, "--config", str(tmp_path), "--run.init", str(tmp_path))
    assert tested.model.released_quirks and tested.run.seed == 5 and tested.num_classes == 8


@pytest.mark.parametrize(("text", "message"), [
    ('{"name": "lesson_how", "optim.lrr": 1}', "optim.lrr: did you mean"),
    ('{"name": "lesson_how", "optim": {"lr": 1}}', "optim: did you mean"),
    ('{"name": "lesson_how", "optim.lr": "x"}', "--optim.lr=x: FLOAT expected"),
    ('{"name": "lesson_how", "optim.steps": 1.5}', "--optim.steps=1.5: INT expected"),
    ('{"name": "lesson_how", "data.short": [1]}', "--data.short=[1]: INT,INT expected"),
    ('{"name": "lesson_how", "optim.lr": -1}', "--optim.lr=-1: optim.lr must be positive"),
    ('{"name": "lesson_ho"}', "did you mean lesson_how"),
    ("[1, 2]", "mine.json is not a valid JSON"),
    ("seed: 3", "mine.json is not a valid JSON"),
    ("", "mine.json is not a valid JSON"),
])  # fmt: skip
def test_a_wrong_file_is_refused_in_one_line(text, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.json").write_text(text)
    words = ["--config", tmp_path / "mine.json"]
    assert message in refusal(finetune, words, monkeypatch, capsys)


def test_a_run_is_repeated_from_its_folder(tmp_path):
    """With the same seed in another folder: the same numbers, from a few words."""
    small = ["--optim.images", "4", "--data.workers", "0", "--run.threads", "1"]
    first, second = tmp_path / "first", tmp_path / "second"
    pretrain.main(["lesson_image", *small, "--run.stop-after", "2", "--run.folder", str(first)])
    pretrain.main(["--config", str(first), "--run.folder", str(second)])
    rows = [[json.loads(line)["loss"] for line in (f / "metrics.jsonl").read_text().splitlines()]
            for f in (first, second)]  # fmt: skip
    assert rows[0] == rows[1] and len(rows[0]) == 2


def commands_in(text):
    """Find command lines of ours in a text: (command, words)."""
    text = text.replace("\\\n", " ")
    for name, words in re.findall(r"-m bevt_lib\.(\w+)((?: +[^\s`|()\[&·#]+)*)", text):
        yield name, words.split()
    for name, words in re.findall(r'"bevt_lib\.(\w+)",((?:\s*"[^"]*",?)*)\s*\]', text):
        yield name, re.findall('"([^"]*)"', words)


def texts():
    for path in (ROOT / "README.md", ROOT / "data" / "README.md"):
        yield path.name, path.read_text()
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        shown = [output.get("text", "") for cell in cells for output in cell.get("outputs", [])]
        yield path.name, "\n".join([*(cell.source for cell in cells), *shown])


def test_every_command_shown_to_a_reader_is_understood():
    seen = {}
    for place, text in texts():
        for name, words in commands_in(text):
            if not words or words[0] in ("PRESET", "…", "--run.folder"):
                continue
            command = importlib.import_module(f"bevt_lib.{name}")
            if command in PRESETS:
                recipe_of(command, *words)
            elif command is bench:
                form, _ = bench.SUBJECTS[words[0] if words[0] in bench.SUBJECTS else "loading"]
                parse(form, [word for word in words if word not in bench.SUBJECTS])
            else:
                parse(command.Options, words)
            seen[place] = seen.get(place, 0) + 1
    assert seen["README.md"] >= 10 and seen["08_ledger.ipynb"] >= 5, seen


def test_the_library_does_not_load_the_command_lines_library():
    code = "import sys, bevt_lib.finetune, bevt_lib.predict; print('tyro' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_every_preset_tells_its_hardware_and_status():
    for preset in (PRETRAIN | FINETUNE | TRAIN_TOKENIZER).values():
        text = preset.__doc__
        assert ("CPU core" in text and "ours" in text) or ("GPU" in text and "Not run" in text)
        assert preset().name == preset.__name__


def test_the_data_folder_follows_the_environment(monkeypatch, tmp_path):
    (tmp_path / "photos").mkdir()
    monkeypatch.setenv("BEVT_DATA", str(tmp_path))
    assert files.data_folder() == tmp_path


@pytest.mark.skipif(os.name == "nt", reason="no pipes of the shell's kind")
def test_a_reader_that_has_seen_enough_is_no_error():
    command = f"{sys.executable} -m bevt_lib.pretrain lesson_joint --run.dry-run | head -1"
    told = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert told.stdout.startswith("preset ") and told.stderr == ""
