"""Evaluation: every video once, numbers as scikit-learn counts them, on any number of processes."""

import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score
from test_cli import run

from bevt_lib import evaluate, finetune, parts
from bevt_lib.base import distributed, files
from bevt_lib.cli import parse
from bevt_lib.datasets import sources, synthetic
from bevt_lib.model.classifier import Classifier
from bevt_lib.model.normalisation import normalise
from bevt_lib.presets import FINETUNE
from bevt_lib.scoring import classes
from bevt_lib.scoring.classes import Scores, score_videos
from bevt_lib.weights.load import load_model, load_strict, read_weights

# scikit-learn on classes that have no clip: it leaves them out, as we do.
pytestmark = pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
WHAT = files.data_folder() / "weights" / "lesson_what.safetensors"
CLIPS = 23  # of classes 0 to 5 in uneven numbers; 6 and 7 have none


def write_list(folder, extra=()):
    """List rendered test clips, and whatever ``extra`` names."""
    root = synthetic.render()
    lines = (root / "what_test.txt").read_text().splitlines()
    some = [line for line in lines if int(line.split()[-1]) < 6][: CLIPS - 5]
    some += [line for line in lines if line.endswith(" 2")][-5:]
    path = folder / "list.txt"
    path.write_text("\n".join([*some[:3], *extra, *some[3:]]))
    return [f"--data.val-list={path}", f"--data.video-root={root}"]


@pytest.fixture
def own(tmp_path):
    return write_list(tmp_path)


@pytest.fixture
def broken(tmp_path):
    """The list with a missing and a damaged video."""
    page = tmp_path / "page.mp4"
    page.write_text("<html>")
    return write_list(tmp_path, ("nowhere.mp4 1", f"{page} 0"))


def lesson(*options):
    recipe = parse(FINETUNE["lesson_what"](), options)
    model = parts.build_classifier(recipe).eval()
    load_strict(model, read_weights(WHAT), "lesson_what")
    return recipe, model


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def sklearn_says(labels, probabilities):
    """Top-1, top-5 and mean class accuracy of the classes with a clip."""
    every = np.arange(probabilities.shape[1])
    top = [top_k_accuracy_score(labels, probabilities, k=k, labels=every) for k in (1, 5)]
    return [*top, balanced_accuracy_score(labels, probabilities.argmax(1))]


@torch.no_grad()
def test_the_numbers_are_those_of_a_slow_loop_and_of_sklearn(own):
    recipe, model = lesson(*own)
    items = sources.labelled_items(recipe, "test")
    slow = []
    for index in range(len(items)):
        views = [torch.from_numpy(view)[None] for view in items.test_views(index, 3, 1)]
        shares = [torch.softmax(model.logits(normalise(view)), dim=-1)[0] for view in views]
        slow.append(sum(shares) / 3)
    slow = torch.stack(slow).numpy()
    labels = np.array([entry.label for entry in items.entries])
    found = score_videos(model, items, 8, clips=3, at_once=7)
    assert found.labels.tolist() == labels.tolist() and len(labels) == CLIPS
    assert np.allclose(found.probabilities.numpy(), slow, atol=1e-6)
    double = score_videos(parts.build_classifier(recipe).double(), items, 8, count=3)
    assert double.probabilities.dtype == torch.float32  # of a run in fp64
    result = classes.score_split(recipe, model)
    assert np.allclose([result.top1, result.top5, result.mean_class], sklearn_says(labels, slow))
    assert 0 < result.top1 < result.top5 and result.clips == CLIPS
    assert [np.isnan(share) for share in result.per_class] == [False] * 6 + [True] * 2
    assert "(of the 6 classes with a clip)" in str(result)


def test_ranks_are_those_of_a_stable_sort():
    """Of classes equally likely the first counts as named before the others."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        shares = rng.integers(0, 4, (40, 9)).astype(np.float32)
        labels = rng.integers(0, 7, 40)
        result = Scores(torch.from_numpy(labels), torch.from_numpy(shares), {}).summary()
        order = np.argsort(-shares, axis=1, kind="stable")
        for k, share in ((1, result.top1), (5, result.top5)):
            assert share == np.mean([x in row[:k] for x, row in zip(labels, order, strict=True)])
        by_class = [np.mean(order[labels == c, 0] == c) for c in sorted(set(labels))]
        assert result.mean_class == pytest.approx(np.mean(by_class))


@pytest.mark.parametrize("count, size", [(1, 1), (23, 2), (10, 4), (3, 32), (240, 7)])
def test_every_video_falls_to_one_process_in_the_same_company(monkeypatch, count, size):
    alone = distributed.blocks(count, size)
    for world in range(1, 6):
        monkeypatch.setattr(distributed, "world_size", lambda world=world: world)
        dealt = []
        for rank in range(world):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            dealt += distributed.blocks(count, size)
        assert sorted(dealt) == alone
        assert sorted(i for block in dealt for i in block) == list(range(count))


def spread(options, processes, folder):
    command = distributed.torchrun("evaluate", [*options, "--run.folder", str(folder)], processes)
    result = subprocess.run(command, capture_output=True, text=True, timeout=300,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.replace(str(folder), ""), (folder / "scores_test.jsonl").read_bytes()


@pytest.mark.slow
def test_one_two_and_three_processes_give_the_same_bytes(broken, tmp_path):
    options = ["lesson_what", "--run.init", str(WHAT), "--views-at-once", "6", "--allow-missing"]
    one, two, three = (spread([*options, *broken], n, tmp_path / str(n)) for n in (1, 2, 3))
    assert one == two == three
    assert f"on {CLIPS} clips" in one[0] and "LEFT OUT 2 clips" in one[0]
    few = spread([*options, *broken, "--run.test-clips", "2"], 3, tmp_path / "few")  # one block
    assert few[1] == b"".join(one[1].splitlines(keepends=True)[:2])


def test_a_video_that_cannot_be_read_forbids_a_figure(broken, tmp_path, capsys):
    arguments = ["lesson_what", "--run.init", str(WHAT), "--run.folder", str(tmp_path), *broken]
    with pytest.raises(ValueError, match=rf"2 of {CLIPS + 2} videos can't be read.*allow-missing"):
        evaluate.main(arguments)
    told = capsys.readouterr()
    assert "top-1" not in told.out and "nowhere.mp4" in told.err and "page.mp4" in told.err
    evaluate.main([*arguments, "--allow-missing"])
    told = capsys.readouterr().out
    rows = lines_of(tmp_path / "scores_test.jsonl")
    listed = [line.rsplit(" ", 1) for line in (tmp_path / "list.txt").read_text().splitlines()]
    assert [[row["path"], str(row["label"])] for row in rows] == listed
    assert [number for number, row in enumerate(rows) if "error" in row] == [3, 4]
    read = [row for row in rows if "error" not in row]
    shares = np.array([row["probabilities"] for row in read], dtype=np.float32)
    assert np.allclose(shares.sum(1), 1, atol=1e-5)
    assert shares.argmax(1).tolist() == [row["predicted"] for row in read]
    expected = sklearn_says([row["label"] for row in read], shares)
    pattern = r"top-1 (\S+) .* on 23 clips, .* top-5 (\S+), mean class (\S+) .*; LEFT OUT 2 clips"
    printed = re.search(pattern, told).groups()
    assert list(printed) == [f"{number:.3f}" for number in expected]


def test_what_check_data_calls_bad_counts_as_unread(broken, tmp_path, capsys):
    """It is not opened, which might hang, but a figure without it is no figure of the list."""
    rows = [line.rsplit(" ", 1)[0] for line in (tmp_path / "list.txt").read_text().splitlines()]
    report = tmp_path / "report.jsonl"
    report.write_text(json.dumps({"path": rows[6], "ok": False, "kind": "hanging"}))
    arguments = ["lesson_what", "--run.init", str(WHAT), "--run.folder", str(tmp_path), *broken]
    with pytest.raises(ValueError, match=rf"3 of {CLIPS + 2} videos can't be read"):
        evaluate.main([*arguments, "--data.checked", str(report)])
    assert f"{rows[6]}: is bad by --data.checked" in capsys.readouterr().err
    told = [row["path"] for row in lines_of(tmp_path / "scores_test.jsonl") if "error" in row]
    assert told == [rows[3], rows[4], rows[6]]


def test_nothing_readable_and_a_broken_model_are_errors(tmp_path):
    (tmp_path / "list.txt").write_text("nowhere.mp4 0\n")
    _, model = lesson()
    recipe, _ = lesson(f"--data.val-list={tmp_path / 'list.txt'}")
    with pytest.raises(ValueError, match=r"none of 1 videos can be read: nowhere\.mp4"):
        classes.score_split(recipe, model)
    model.head.bias.data[3] = float("nan")
    with pytest.raises(ValueError, match="it is broken"):
        classes.score_split(lesson()[0], model, count=2)


VIEWS = {"paper_k400": [4, 4, 4], "paper_ssv2": [2, 1], "paper_diving48": [2, 1]}


@pytest.mark.parametrize("name", VIEWS)
def test_the_papers_views_go_through_a_few_at_a_time(name, own, tmp_path, monkeypatch, capsys):
    """K400: 4 clips x 3 crops, four views at once; SSv2 and Diving48: 1 x 3, two at once."""
    small = ["--model.embed-dim", "8", "--model.depths", "1,1,1,1", "--model.num-heads", "1,1,1,1",
             "--model.window", "2,2,2", "--data.size", "64", "--data.short", "64,64",
             "--num-classes", "8", "--data.workers", "1", "--run.test-clips", "3"]  # fmt: skip
    recipe = parse(FINETUNE[name](), small)
    parts.build_classifier(recipe).save_pretrained(tmp_path / "model")
    sizes, logits = [], Classifier.logits

    def watch(self, pixels, noise=None):
        sizes.append(tuple(pixels.shape))
        return logits(self, pixels, noise)

    monkeypatch.setattr(Classifier, "logits", watch)
    places = ["--run.init", str(tmp_path / "model"), "--run.folder", str(tmp_path / "run")]
    evaluate.main([name, *small, *own, *places])
    assert sizes == 3 * [(views, 3, 32, 64, 64) for views in VIEWS[name]]
    assert "on 3 clips" in capsys.readouterr().out


def test_a_split_of_the_embedded_clips(tmp_path, capsys):
    options = ["--run.init", str(WHAT), "--run.folder", str(tmp_path), "--run.test-clips", "6"]
    for split in ("val", "test_unseen"):
        evaluate.main(["lesson_what", "--split", split, *options])
        rows = lines_of(tmp_path / f"scores_{split}.jsonl")
        assert [row["path"] for row in rows] == [f"clips/{split}/{n:05d}.mp4" for n in range(6)]
        assert f"what {split}: top-1" in capsys.readouterr().out


VALIDATED = [
    "lesson_what", "--optim.clips", "2", "--optim.steps", "6", "--optim.warmup", "0",
    "--optim.lr", "0.01", "--optim.ema", "0.5", "--run.save-every", "2", "--run.keep", "9",
    "--val-epochs", "0.17", "--data.workers", "1",  # of 23 clips: every second step
]  # fmt: skip


@pytest.fixture(scope="module")
def validated(tmp_path_factory):
    """A run of six steps, validated after each second one: its folder, options and output."""
    folder = tmp_path_factory.mktemp("validated")
    own = write_list(folder)
    own += [own[0].replace("val-list", "video-list"), "--run.folder", str(folder / "run")]
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(words)))
        finetune.main([*VALIDATED, *own])
    return folder / "run", [*VALIDATED, *own], printed


def checkpoint_of(folder, step):
    return folder / "checkpoints" / f"step_{step:08d}"


def test_validation_scores_the_weights_of_its_step(validated):
    """The numbers in the record are those of the saved averages, read back and scored alone."""
    folder, options, _ = validated
    recipe = parse(FINETUNE["lesson_what"](), options[1:])
    record = {row["step"]: row for row in lines_of(folder / "metrics.jsonl")}
    marks = [row for row in record.values() if "val/top1" in row]
    assert len(record) == 6 and len(marks) == 3
    for step, row in zip((2, 4, 6), marks, strict=True):
        model = parts.build_classifier(recipe)
        load_strict(model, read_weights(checkpoint_of(folder, step)), "checkpoint")
        score = classes.score_split(recipe, model, "val", clips=1, crops=1)
        assert [row[f"val/{k}"] for k in ("top1", "top5", "mean_class")] == [
            score.top1, score.top5, score.mean_class,
        ]  # fmt: skip
        assert row["step"] == step - 1


def test_the_best_is_kept_and_both_are_tested_with_all_views(validated, tmp_path):
    folder, options, printed = validated
    marks = [row["val/top1"] for row in lines_of(folder / "metrics.jsonl") if "val/top1" in row]
    best = 2 * (marks.index(max(marks)) + 1)
    last_line, best_line = (line for line in printed if "; model in" in line)
    assert f"best in validation (step {best})" in best_line
    for name, step, line in (("", 6, last_line), ("best_", best, best_line)):
        weights = load_model(folder / f"{name}model").state_dict()
        saved = read_weights(checkpoint_of(folder, step))
        assert all(torch.equal(weights[key], value) for key, value in saved.items())
        again = tmp_path / f"{name}again"
        init = ["--run.init", str(folder / f"{name}model"), "--run.folder", str(again)]
        result, _ = evaluate.evaluate(parse(evaluate.PRESETS["lesson_what"](),
                                               [*options[1:-2], *init]))  # fmt: skip
        assert str(result) in line and result.clips == CLIPS
        scores = (folder / f"scores_{name}test.jsonl").read_bytes()
        assert (again / "scores_test.jsonl").read_bytes() == scores


@pytest.mark.slow
def test_two_processes_validate_and_test_together(validated, tmp_path):
    """Each line is printed once; the files of scores are those of the two model folders."""
    _, options, _ = validated
    command = distributed.torchrun("finetune", [*options[:-1], str(tmp_path)], 2)
    told = subprocess.run(command, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert told.returncode == 0, told.stderr[-2000:]
    assert told.stdout.count("; model in") == 2 and told.stdout.count("best in validation") == 1
    marks = [row for row in lines_of(tmp_path / "metrics.jsonl") if "val/top1" in row]
    assert [row["step"] for row in marks] == [1, 3, 5]
    init = ["--run.init", str(tmp_path / "best_model"), "--run.folder", str(tmp_path / "again")]
    evaluate.main(["lesson_what", *options[-5:-3], *init])  # but for the training list
    again = (tmp_path / "again" / "scores_test.jsonl").read_bytes()
    assert again == (tmp_path / "scores_best_test.jsonl").read_bytes()


def test_a_run_that_was_stopped_is_not_tested(validated, tmp_path, capsys, monkeypatch):
    """Stopped as asked: tested on so many clips as --run.test-clips says. By SIGTERM: not."""
    _, options, _ = validated
    seen = []
    monkeypatch.setattr(classes, "score_split", lambda recipe, model, **_: seen.append(1))
    for stop, clips, done, tested in (
        (0, 0, 6, True), (0, 0, 5, False), (0, 8, 5, False),
        (3, 0, 3, False), (3, 8, 3, True), (3, 8, 2, False),
    ):  # fmt: skip
        more = ["--run.stop-after", str(stop), "--run.test-clips", str(clips)]
        more += ["--run.folder", str(tmp_path)]
        recipe = parse(FINETUNE["lesson_what"](), [*options[1:], *more])
        seen.clear()
        finetune.finish(recipe, parts.build_classifier(recipe), done, steps=6)
        assert bool(seen) == tested
        assert (f"not tested at step {done} of 6" in capsys.readouterr().out) != tested
    assert load_model(tmp_path / "model").classes == synthetic.KINDS


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps with a weight average, tested on eight clips."""
    folder = tmp_path_factory.mktemp("run")
    options = "--optim.clips 2 --optim.ema .5 --run.stop-after 2 --run.test-clips 8 --run.folder"
    finetune.main(["lesson_what", *options.split(), str(folder)])
    return folder


def test_a_runs_folder_its_model_and_its_checkpoint_are_the_same_model(trained, tmp_path):
    mine = (trained / "scores_test.jsonl").read_bytes()
    assert len(mine.splitlines()) == 8
    for number, place in enumerate((".", "model", "checkpoints/step_00000002")):
        folder = tmp_path / str(number)
        evaluate.main(["lesson_what", "--run.init", str(trained / place), "--run.test-clips", "8",
                       "--run.folder", str(folder)])  # fmt: skip
        assert (folder / "scores_test.jsonl").read_bytes() == mine
    alone = tmp_path / "alone"
    shutil.copytree(trained / "model", alone / "model")
    assert evaluate.weights_of(alone) == alone / "model"  # its checkpoints were deleted


REFUSALS = {
    "no model": ([], "--run.init MODEL"),
    "another kind of model": (["--run.init", str(WHAT.with_name("lesson_joint.safetensors"))],
                              "missing 6 (head.bias, head.weight"),
    "another split": (["--run.init", str(WHAT), "--split", "train"], "choose val, test"),
    "a list and a split": (["--run.init", str(WHAT), "--split", "val", "--data.val-list", "x"],
                           "--split val is one of the embedded"),
    "nothing there": (["--run.init", "nowhere"], "no weights at nowhere"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_mistake_is_told(kind):
    arguments, message = REFUSALS[kind]
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate.main(["lesson_what", *arguments])


@pytest.mark.slow
def test_a_plan_reads_nothing():
    told = run("bevt_lib.evaluate", "paper_k400", "--run.dry-run", BEVT_DATA="/nowhere")
    assert told.returncode == 0, told.stderr
    assert "4 clips x 3 crops, 4 at a time" in told.stdout and "12 x 281.33 G" in told.stdout
