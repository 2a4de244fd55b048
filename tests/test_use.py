"""A trained model in use: predict, model folders of runs, convert_weights, timm's registry."""

from bevt_lib import parts
from bevt_lib.base import files
from bevt_lib.scoring import classes

import bevt_lib.weights.timm_models  # isort: skip  # noqa: F401  # before timm: bevt_lib's guard, its names

import json

import numpy as np
import pytest
import timm
import torch
from test_cli import run

from bevt_lib.datasets import synthetic
from bevt_lib.model.bevt import BEVT
from bevt_lib.model.classifier import Classifier
from bevt_lib.predict import classify, name_hidden
from bevt_lib.presets import FINETUNE, lesson_joint
from bevt_lib.tokenizers.load import load_tokenizer
from bevt_lib.weights.load import load_model, load_strict, read_weights, start_classifier

WEIGHTS = files.data_folder() / "weights"


@pytest.fixture(scope="module")
def clips():
    return synthetic.render()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Model folders of the shipped weights."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("lesson_how", "lesson_what"):
        model = parts.build_classifier(FINETUNE[name]())
        load_strict(model, read_weights(WEIGHTS / f"{name}.safetensors"), name)
        model.save_pretrained(folder / name)
    joint = parts.build_bevt(lesson_joint())
    load_strict(joint, read_weights(WEIGHTS / "lesson_joint.safetensors"), "lesson_joint")
    joint.save_pretrained(folder / "lesson_joint")
    return folder


def test_a_folder_classifies_clips_as_the_training_door_scores_them(models, clips):
    """One call loads, one call recognises; together they are the door's own test."""
    model = load_model(models / "lesson_how")
    assert isinstance(model, Classifier) and model.classes == synthetic.MOTIONS
    rows = [line.rsplit(" ", 1) for line in (clips / "how_test.txt").read_text().splitlines()[:48]]
    answers = [classify(model, clips / path) for path, _ in rows]
    for answer in answers:
        shares = [share for _, share in answer]
        assert shares == sorted(shares, reverse=True) and np.isclose(sum(shares), 1, atol=1e-5)
    right = [
        a[0][0] == synthetic.MOTIONS[int(label)]
        for a, (_, label) in zip(answers, rows, strict=True)
    ]
    score = classes.score_split(FINETUNE["lesson_how"](), model, count=48)
    assert np.mean(right) == score.top1 > 0.8


def test_a_pretraining_folder_names_a_hidden_tube(models, clips):
    model = load_model(models / "lesson_joint")
    tokenizer = load_tokenizer(WEIGHTS / "lesson_dvae.safetensors")
    shares = []
    for number in range(24):
        guess = name_hidden(model, tokenizer, clips / f"clips/test/{number:05d}.mp4")
        assert guess.hidden.shape == guess.ids.shape == guess.named.shape == (8, 6, 6)
        assert 0 < guess.hidden.sum() < guess.hidden.size
        shares.append((guess.named == guess.ids)[guess.hidden].mean())
    again = name_hidden(model, tokenizer, clips / "clips/test/00023.mp4")
    assert np.array_equal(again.named, guess.named)
    assert np.mean(shares) > 0.1  # 0.26 in the notebook; the commonest id is right in 0.012
    small = BEVT(vocab_size=7, embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1),
                 window=(2, 2, 2), views=model.views)  # fmt: skip
    with pytest.raises(ValueError, match=r"names 7 tokens, the tokenizer has 256.*--tokens"):
        name_hidden(small, tokenizer, clips / "clips/test/00000.mp4")


@pytest.mark.slow
def test_predict_on_the_command_line(models, clips, tmp_path):
    clip = str(clips / "clips/test/00000.mp4")
    told = run("bevt_lib.predict", str(models / "lesson_what"), clip, "--top", "3")
    assert told.returncode == 0 and len(told.stdout.splitlines()) == 3
    assert told.stdout.split()[1] in synthetic.KINDS
    told = run("bevt_lib.predict", str(models / "lesson_joint"), clip)
    assert told.returncode == 0 and "named right" in told.stdout
    page = tmp_path / "clip.mp4"
    page.write_text("<html>")
    for arguments, message in {
        (str(tmp_path), clip): "not a model folder",
        (str(models / "lesson_what"), str(page)): "clip.mp4",
        (str(models / "lesson_what"), "nowhere.mp4"): "no such video",
        (str(models / "lesson_what"), clip, "--top", "many"): "--top",
    }.items():
        told = run("bevt_lib.predict", *arguments)
        lines = told.stderr.strip().splitlines()
        assert told.returncode == 2 and len(lines) == 1 and message in lines[0], lines


@pytest.mark.slow
def test_a_run_leaves_a_model_folder(tmp_path, clips):
    folder = tmp_path / "run"
    told = run("bevt_lib.finetune", "lesson_what", "--run.stop-after", "2", "--run.test-clips", "8",
               "--run.folder", str(folder))  # fmt: skip
    assert told.returncode == 0, told.stderr
    model = load_model(folder / "model")
    saved = read_weights(folder / "checkpoints" / "step_00000002")
    assert all(torch.equal(v, saved[k]) for k, v in model.state_dict().items())
    assert model.classes == synthetic.KINDS and model.views.clips == 3
    assert classify(model, clips / "clips/test/00000.mp4")[0][0] in synthetic.KINDS


@pytest.mark.slow
def test_convert_weights_on_the_command_line(models, tmp_path):
    joint = str(models / "lesson_joint")
    told = run("bevt_lib.convert_weights", joint, str(tmp_path / "official.pth"), "--to", "bevt")
    assert told.returncode == 0 and "written: bevt weights" in told.stdout, told.stderr
    back = run("bevt_lib.convert_weights", str(tmp_path / "official.pth"), str(tmp_path / "model"))
    assert back.returncode == 0 and "rebuilt from the window" in back.stdout
    again = load_model(tmp_path / "model")
    assert all(
        torch.equal(v, again.state_dict()[k]) for k, v in load_model(joint).state_dict().items()
    )
    (tmp_path / "log").write_text("--2026-- https://cdn.example.com/ 200 OK\n")
    for arguments, message in {
        (joint, str(tmp_path / "x.pth"), "--to", "torchvision"): "a classifier's",
        (joint, str(tmp_path / "x"), "--to", "bevt"): "give .pth or .safetensors",
        (joint, str(tmp_path / "x.pth"), "--to", "bevit"): "--to",
        (str(tmp_path / "log"), str(tmp_path / "x")): "web page or a log",
    }.items():
        told = run("bevt_lib.convert_weights", *arguments)
        lines = told.stderr.strip().splitlines()
        assert told.returncode == 2 and len(lines) == 1 and message in lines[0], lines
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.pth").exists()


def test_timm_creates_our_encoders(models):
    names = timm.list_models("bevt_*")
    assert {"bevt_swin_base", "bevt_swin_base_window16", "bevt_swin_base_image"} <= set(names)
    with torch.device("meta"):
        counts = {
            name: sum(p.numel() for p in timm.create_model(name, num_classes=classes).parameters())
            for name, classes in (("bevt_swin_base", 400), ("bevt_swin_base_window16", 174))
        }
    assert counts == {"bevt_swin_base": 88_048_984, "bevt_swin_base_window16": 88_834_038}
    trained = load_model(models / "lesson_how")
    path = str(models / "lesson_how" / "model.safetensors")
    encoder = timm.create_model("bevt_lesson", num_classes=8, checkpoint_path=path).eval()
    clip = torch.randn(2, 3, 8, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(encoder(clip), trained.logits(clip))
        pooled = timm.create_model("bevt_lesson", num_classes=0).eval()
        start_classifier(pooled, trained.state_dict())
        assert torch.allclose(pooled(clip), trained.features(clip).mean((1, 2, 3)), atol=1e-6)
    encoder.reset_classifier(3)
    assert encoder(clip).shape == (2, 3)


def test_an_image_encoder_gives_the_image_streams_stages():
    joint = parts.build_bevt(lesson_joint()).eval()
    load_strict(joint, read_weights(WEIGHTS / "lesson_joint.safetensors"), "lesson_joint")
    state = joint.state_dict()
    image = {k: v for k, v in state.items() if not k.startswith("patch_embed.video")}
    getter = timm.create_model("bevt_lesson_image", features_only=True, out_indices=(1, 3)).eval()
    start_classifier(getter.model, image)
    assert getter.feature_info.channels() == [48, 192]
    assert getter.feature_info.reduction() == [8, 32]
    picture = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        stages = joint.swin(joint.patch_embed["image"](picture[:, :, None]))
        for mine, stage in zip(getter(picture), (stages[1], stages[3]), strict=True):
            assert torch.allclose(mine, stage[:, 0].permute(0, 3, 1, 2), atol=1e-6)


def test_an_encoder_drops_paths_in_training_only():
    encoder = timm.create_model("bevt_lesson", num_classes=3, drop_path_rate=0.9)
    clip = torch.randn(2, 3, 8, 96, 96)
    assert torch.equal(encoder.eval()(clip), encoder(clip))
    assert not torch.equal(encoder.train()(clip), encoder(clip))
    with pytest.raises(ValueError, match="3 channels"):
        timm.create_model("bevt_lesson", in_chans=1)


def test_a_model_card_tells_how_to_use_it(models):
    config = json.loads((models / "lesson_how" / "config.json").read_text())
    assert config["views"]["frames"] == 8 and config["num_classes"] == len(config["classes"])
    assert "bevt_lib.predict" in (models / "lesson_how" / "README.md").read_text()
