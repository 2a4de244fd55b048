"""Where data come from: nothing embedded in place of your own, nothing given and not used."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from bevt_lib import evaluate, finetune, parts, pretrain, train_tokenizer
from bevt_lib.base.config import Data
from bevt_lib.cli import parse
from bevt_lib.datasets import sources, synthetic
from bevt_lib.datasets.video import write_video
from bevt_lib.presets import FINETUNE, PRETRAIN, TRAIN_TOKENIZER

COMMANDS = {
    "pretrain": (pretrain, PRETRAIN), "finetune": (finetune, FINETUNE),
    "evaluate": (evaluate, evaluate.PRESETS),
    "train_tokenizer": (train_tokenizer, TRAIN_TOKENIZER),
}  # fmt: skip
VIDEO, IMAGE, VAL = "--data.video-list FILE", "--data.image-root DIR", "--data.val-list FILE"
L = ["--data.video-list", "list.txt"]
REFUSED = {  # words: what the line says; the files needn't be there
    "pretrain paper_joint": ["paper_joint trains on data of your own",
                             f"{VIDEO} (video stream) and {IMAGE} (image stream)"],
    "pretrain paper_joint --data.video-list l --run.init F --tokens.weights D": [
        f"trains on data of your own: give {IMAGE} (image stream)"],
    "pretrain paper_joint --data.image-root d": [f"give {VIDEO} (video stream)"],
    "pretrain paper_image": [f"give {IMAGE} (image stream)"],
    "pretrain lesson_joint --data.embedded false --data.image-root d": [VIDEO],
    "pretrain lesson_joint --data.video-root d": [f"give {VIDEO}"],
    "pretrain paper_joint --run.dry-run --data.video-root d": [f"give {VIDEO}"],
    "pretrain lesson_image --data.video-list l": ["doesn't use --data.video-list: leave it out"],
    "pretrain small_joint --data.checked r": ["the embedded data and doesn't use --data.checked"],
    "pretrain lesson_joint --data.video-list l --data.val-list l": ["--data.val-list"],
    "finetune paper_k400 --run.init scratch": [f"give {VIDEO} and {VAL}"],
    "finetune paper_ssv2 --data.video-list l": ["paper_ssv2 trains on", f"give {VAL}"],
    "finetune lesson_what --data.video-list l": [f"data of your own: give {VAL}"],
    "finetune lesson_what --data.val-list l": [f"data of your own: give {VIDEO}"],
    "finetune lesson_what --data.video-root d": [f"give {VIDEO} and {VAL}"],
    "finetune lesson_what --task own --num-classes 2": [f"give {VIDEO} and {VAL}"],
    "finetune small_how --data.class-list l": ["doesn't use --data.class-list"],
    "finetune lesson_how --data.image-root d": ["--data.image-root", "leave it out"],
    "evaluate paper_k400 --run.init x": [f"paper_k400 is tested on data of your own: give {VAL}"],
    "evaluate lesson_what --run.init x --data.video-root d": [f"give {VAL}"],
    "train_tokenizer paper_dvae": [f"paper_dvae trains on data of your own: give {IMAGE}"],
    "train_tokenizer lesson_peco --data.video-list l": ["--data.video-list", "leave it out"],
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_missing_half_and_unused_data_are_refused_before_anything_is_done(words, monkeypatch):
    def fail(*arguments, **settings):
        raise AssertionError("something was rendered, read or built")

    for module, name in ((synthetic, "render"), (parts, "build_tokenizer"), (parts, "build_bevt"),
                         (parts, "build_classifier"), (sources, "list_entries")):  # fmt: skip
        monkeypatch.setattr(module, name, fail)
    for module in (pretrain, finetune, evaluate):
        for name in ("build_tokenizer", "build_bevt", "build_classifier"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, fail)
    command, *arguments = words.split()
    with pytest.raises(ValueError) as error:
        COMMANDS[command][0].main(arguments)
    assert "\n" not in str(error.value)
    assert all(part in str(error.value) for part in REFUSED[words]), error.value


def test_a_wrong_decoder_and_a_missing_one_are_told_in_one_line(monkeypatch):
    with pytest.raises(ValueError, match="auto, pyav, decord, got 'opencv'"):
        Data(decoder="opencv")
    monkeypatch.setitem(sys.modules, "decord", None)
    for command, (module, presets) in COMMANDS.items():
        name = next(iter(presets))
        extra = ["--run.init", "x"] if command == "evaluate" else []
        with pytest.raises(ValueError, match=r"--data.decoder decord: decord isn't installed"):
            module.main([name, "--data.decoder", "decord", *extra])


@pytest.fixture
def own(tmp_path):
    """Three clips with a list, four pictures in two classes with a list."""
    ramp = np.broadcast_to(np.arange(128, dtype=np.uint8)[None, None, :, None], (12, 100, 128, 3))
    for number in range(3):
        write_video(tmp_path / f"{number}.mp4", np.roll(ramp, number, 2))
    (tmp_path / "list.txt").write_text("".join(f"{n}.mp4 {n % 2}\n" for n in range(3)))
    names = [f"{kind}/{n}.png" for kind in "ab" for n in range(2)]
    for name in names:
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (120, 110), (50, 100, 150)).save(tmp_path / "images" / name)
    (tmp_path / "images.txt").write_text("\n".join(names[:3]))
    return tmp_path


def lines_of(text):
    return dict(line.split(maxsplit=1) for line in text.splitlines() if line[0] != " ")


def test_a_plan_counts_own_lists_and_tells_what_is_missing(own, monkeypatch):
    monkeypatch.setenv("BEVT_DATA", "/nowhere")
    monkeypatch.chdir(own)  # short names, which are not wrapped

    def plan(command, preset, *words):
        module, presets = COMMANDS[command]
        text = module.plan(parse(presets[preset](), words))
        return " ".join(text.split())

    told = plan("pretrain", "paper_joint")
    assert "video data --data.video-list FILE not given yet; EXPECTED: 240,000 clips" in told
    assert "image data --data.image-root DIR not given yet" in told and "140,625" in told
    told = plan("pretrain", "paper_joint", *L, "--data.video-root", ".", "--optim.clips", "4")
    assert "steps 113 (3 videos, 1 steps an epoch)" in told
    assert "video data 3 clips from list.txt" in told
    told = plan("pretrain", "paper_joint", *L, "--data.video-root", "gone")
    assert "video data gone isn't there yet; EXPECTED: 240,000 clips" in told
    told = plan("pretrain", "paper_image", "--data.image-root", "images")
    assert "image data 4 pictures from images" in told and "(4 images," in told
    told = plan("finetune", "lesson_what", *L, "--data.val-list", "later.txt")
    assert "clip data 3 clips from list.txt test data later.txt isn't there yet" in told
    told = plan("finetune", "small_what")
    assert "clip data 5,120 clips, embedded (train split)" in told
    assert "test data 1,024 clips, embedded (test split)" in told
    told = plan("evaluate", "paper_k400")
    assert "videos --data.val-list FILE not given yet test views" in told
    assert "videos 512 clips, embedded (test_unseen split)" in plan(
        "evaluate", "lesson_how", "--split", "test_unseen")  # fmt: skip


def test_the_embedded_data_hold_what_a_plan_says():
    for split, clips in synthetic.CLIPS.items():
        items = sources.labelled_items(FINETUNE["lesson_what"](), split)
        assert len(items) == clips and items.origin == f"{clips:,} clips, embedded ({split} split)"
    for split, stills in synthetic.STILLS.items():
        items = sources.pretraining_items(PRETRAIN["lesson_image"](), "image", split)
        assert items.origin == f"{stills:,} pictures, embedded ({split} split)"
        assert len(items) == stills
    recipe = TRAIN_TOKENIZER["lesson_dvae"]()
    entries, origin = sources.list_entries(recipe, "image")
    assert origin == f"{len(entries):,} pictures, embedded (train split)"
    assert sources.plan_sources(recipe)[1] == {"image data": origin}


def test_every_stream_is_told_at_the_start(own, monkeypatch, capsys):
    monkeypatch.chdir(own)
    (own / "report.jsonl").write_text('{"path": "1.mp4", "ok": false}\n')
    run = ["--run.stop-after", "1", "--run.threads", "1", "--data.workers", "0"]
    clips = [*L, "--data.video-root", "."]
    small = ["--optim.clips", "1", "--optim.images", "1"]
    checked = ["--data.checked", "report.jsonl"]
    pretrain.main(["lesson_joint", *run, *clips, *checked, *small])
    told = capsys.readouterr().out.splitlines()
    assert "report.jsonl: 1 of 3 entries are bad and left out, 2 were not checked" in told[1]
    assert told[1].startswith("video: 2 clips from list.txt; report.jsonl")
    assert told[2] == "image: 3,072 pictures, embedded (train split)"
    val = ["--data.val-list", "list.txt", "--task", "own", "--num-classes", "2"]
    finetune.main(["lesson_how", *run, *clips, *val, "--optim.clips", "1"])
    told = capsys.readouterr().out.splitlines()
    assert told[1:3] == ["clip: 3 clips from list.txt", "test: 3 clips from list.txt"]
    where = ["--run.init", "runs/lesson_how/model"]
    evaluate.main(["lesson_how", *where, *clips[2:], *val, "--data.workers", "0"])
    assert "test: 3 clips from list.txt" in capsys.readouterr().out


def test_pictures_of_a_tokenizer_may_be_listed(own):
    words = ["--data.image-root", str(own / "images"), "--data.image-list", str(own / "images.txt")]
    recipe = parse(TRAIN_TOKENIZER["lesson_peco"](), words)
    train, held, origin = train_tokenizer.split_entries(recipe)
    assert len(train) == 1 and len(held) == 2
    assert origin == f"3 pictures from {own / 'images.txt'}; 2 of them held out"


def test_embedded_data_stand_in_stream_by_stream():
    """Pretraining on your own videos leaves the embedded images; fine-tuning mixes nothing."""
    joint = parse(PRETRAIN["lesson_joint"](), L)
    assert [sources.place_of(joint, stream).own for stream in joint.streams] == [True, False]
    assert not sources.place_of(joint, "video", "test").own
    what = parse(FINETUNE["lesson_what"](), L)
    assert sources.place_of(what, "clip").own and sources.place_of(what, "clip", "val").own
    other = replace(FINETUNE["lesson_what"](), task="own")
    with pytest.raises(ValueError, match=r"lesson_what needs --data.val-list FILE: one"):
        sources.labelled_items(other, "val")


def test_a_plan_counts_the_embedded_clips_too():
    """5,120 clips in batches of 16, twice: not the one step of a data set of unknown size."""
    words = ["--optim.steps", "0", "--optim.epochs", "2"]
    plan = finetune.plan(parse(FINETUNE["lesson_how"](), words))
    assert "steps             640 (5,120 clips, 320 steps an epoch)" in plan
