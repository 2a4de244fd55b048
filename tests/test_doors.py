"""Commands as users type them: wrong words end in one clear line, plans read nothing."""

import os
import subprocess
import sys

import pytest

from bevt_lib.base import files
from bevt_lib.base.config import flatten
from bevt_lib.cli import override
from bevt_lib.presets import FINETUNE, PRETRAIN, TRAIN_TOKENIZER, lesson_image


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
    told = " ".join(result.stdout.split())
    assert message in told and "8 process(es)" in told


def test_help_lists_every_field():
    result = run("bevt_lib.pretrain", "paper_joint", "--help")
    assert result.returncode == 0
    for key in flatten(PRETRAIN["paper_joint"]()):
        assert f"--{key.replace('_', '-')} " in result.stdout
    assert "32 GPUs" in result.stdout


def test_every_preset_tells_its_hardware_and_status():
    for preset in (PRETRAIN | FINETUNE | TRAIN_TOKENIZER).values():
        text = preset.__doc__
        assert ("CPU core" in text and "ours" in text) or ("GPU" in text and "Not run" in text)
        assert preset().name == preset.__name__


def test_overrides_are_typed_and_leave_the_preset_alone():
    recipe = lesson_image()
    changed = override(recipe, ["--model.depths", "1,1,1,1", "--run.dry-run", "--optim.lr=0.1",
                                "--data.short", "96,100"])  # fmt: skip
    assert changed.model.depths == (1, 1, 1, 1) and changed.run.dry_run is True
    assert changed.optim.lr == 0.1 and changed.data.short == (96, 100)
    assert recipe == lesson_image()


def test_the_data_folder_follows_the_environment(monkeypatch, tmp_path):
    (tmp_path / "photos").mkdir()
    monkeypatch.setenv("BEVT_DATA", str(tmp_path))
    assert files.data_folder() == tmp_path
