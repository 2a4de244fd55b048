"""Commands as users type them: wrong words end in one clear line, plans read nothing."""

import os
import subprocess
import sys

import pytest
import torch

from bevt_lib import finetune, pretrain, synthetic
from bevt_lib.config import flatten, override
from bevt_lib.presets import FINETUNE, PRETRAIN, TRAIN_TOKENIZER, lesson_image, lesson_joint
from bevt_lib.weights import (
    from_released,
    load_strict,
    read_weights,
    save_weights,
    start_classifier,
    start_pretraining,
    to_released,
)


def run(*arguments, **environment):
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120,
                          env=os.environ | environment)  # fmt: skip


REFUSALS = {
    "unknown preset": (["bevt_lib.pretrain", "lesson_imge"], "did you mean lesson_image"),
    "misspelt override": (
        ["bevt_lib.pretrain", "lesson_image", "--run.sed", "1"], "did you mean --run.seed"),
    "wrong type": (["bevt_lib.pretrain", "lesson_image", "--run.seed", "x"], "--run.seed x"),
    "no value": (["bevt_lib.pretrain", "lesson_image", "--run.seed"], "needs a value"),
    "impossible value": (["bevt_lib.finetune", "lesson_how", "--optim.lr", "-1"], "positive"),
    "wrong image size": (
        ["bevt_lib.pretrain", "lesson_image", "--data.size", "100"], "multiple of 32"),
    "missing start": (["bevt_lib.pretrain", "paper_joint"], "--run.init"),
    "missing weights": (
        ["bevt_lib.pretrain", "lesson_joint", "--run.init", "nowhere.safetensors"], "no weights"),
    "missing list": (["bevt_lib.finetune", "paper_k400"], "--data.video-list"),
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
    result = run("bevt_lib.finetune", "lesson_how", "--data.video-list", str(listed), *places)
    assert result.returncode == 2
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and "broken.mp4" in last and "Traceback" not in result.stderr


PLANS = {
    "paper_image": ("bevt_lib.pretrain", "2048 images"),
    "paper_joint": ("bevt_lib.pretrain", "109,679,048"),
    "paper_k400": ("bevt_lib.finetune", "88,048,984"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_a_plan_reads_no_data(name):
    module, message = PLANS[name]
    result = run(module, name, "--run.dry-run", "--run.processes", "8", BEVT_DATA="/nowhere")
    assert result.returncode == 0, result.stderr
    assert message in result.stdout and "8 process(es)" in result.stdout


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


def test_weights_that_do_not_fit_name_their_keys(tmp_path):
    image = pretrain.build_model(lesson_image())
    joint = pretrain.build_model(lesson_joint())
    with pytest.raises(ValueError, match=r"a file: .*missing .*decoder\.video"):
        load_strict(joint, image.state_dict(), "a file")
    state = image.state_dict()
    state["norm.weight"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"norm\.weight has shape \(3,\), expected \(192,\)"):
        load_strict(image, state, "a file")
    (tmp_path / "w.safetensors").write_text("<html>")
    with pytest.raises(ValueError, match="not a readable safetensors"):
        read_weights(tmp_path / "w.safetensors")


def test_weights_survive_a_file(tmp_path):
    model = pretrain.build_model(lesson_image())
    save_weights(model.state_dict(), tmp_path / "w.safetensors")
    again = read_weights(tmp_path / "w.safetensors")
    assert all(torch.equal(v, again[k]) for k, v in model.state_dict().items())
    save_weights(model.state_dict(), tmp_path / "small.safetensors", torch.float8_e4m3fn)
    small = read_weights(tmp_path / "small.safetensors")
    for name, value in model.state_dict().items():
        assert torch.allclose(small[name].float(), value, rtol=0.07, atol=2e-3), name


def test_released_names_there_and_back():
    model = pretrain.build_model(lesson_joint())
    state = to_released(model)
    assert state["backbone.patch_embed_2d.proj.weight"].dim() == 4
    assert state["backbone.mask_token"].shape == (1, 1, 24)
    back = from_released(model, state)
    assert all(torch.equal(v, back[k]) for k, v in model.state_dict().items())
    del state["backbone.norm.weight"]
    with pytest.raises(ValueError, match=r"missing 1 \(backbone\.norm\.weight\)"):
        from_released(model, state)


def test_inflation_keeps_what_a_still_clip_gives():
    image = pretrain.build_model(lesson_image())
    joint = pretrain.build_model(lesson_joint())
    fresh = joint.token_head.weight.clone()
    report = start_pretraining(joint, image.state_dict())
    assert torch.equal(joint.token_head.weight, fresh)
    assert {n.split(".")[0] for n in report.fresh} == {"decoder", "token_head"}
    assert all(n.startswith("patch_embed.video") for n in report.inflated)
    still = torch.randn(1, 3, 1, 96, 96)
    one = joint.patch_embed["image"](still)
    two = joint.patch_embed["video"](still.expand(-1, -1, 2, -1, -1))
    assert torch.allclose(one, two, atol=1e-5)


def test_a_classifier_takes_the_encoder_and_leaves_the_rest():
    joint = pretrain.build_model(lesson_joint())
    recipe = FINETUNE["lesson_how"]()
    model = finetune.build_model(recipe)
    report = start_classifier(model, joint.state_dict())
    assert report.fresh == ["head.bias", "head.weight"]
    assert torch.equal(model.patch_embed.proj.weight, joint.patch_embed["video"].proj.weight)
    finetune.see_change(model, 1.0)
    kernel = model.patch_embed.proj.weight
    assert torch.equal(kernel[:, :, 1], -kernel[:, :, 0])
    still = torch.randn(1, 3, 1, 96, 96).expand(-1, -1, 8, -1, -1)
    embedded = model.patch_embed.proj(still)
    assert torch.allclose(embedded, model.patch_embed.proj.bias.view(1, -1, 1, 1, 1).expand_as(
        embedded), atol=1e-4)  # fmt: skip


def test_the_data_folder_follows_the_environment(monkeypatch, tmp_path):
    (tmp_path / "photos").mkdir()
    monkeypatch.setenv("BEVT_DATA", str(tmp_path))
    assert synthetic.data_folder() == tmp_path
