"""The published sets in miniature, in exactly their layouts: lists, labels, errors, training."""

import csv
import json
import random
import re
import subprocess
import sys

import av
import numpy as np
import pytest
from PIL import Image
from test_cli import run

from bevt_lib import bench, check_data
from bevt_lib.base import files
from bevt_lib.cli import parse
from bevt_lib.datasets import lists
from bevt_lib.datasets.lists import Entry, find_videos, leave_out_bad, read_classes, read_entries
from bevt_lib.datasets.sources import pretraining_items
from bevt_lib.datasets.video import Video, write_video
from bevt_lib.presets import FINETUNE, PRETRAIN, paper_joint

# Kinetics has names with spaces and apostrophes; its numbers are their alphabetical order.
KINETICS = ["abseiling", "air drumming", "massaging person's head", "zumba"]
TEMPLATES = {
    "Holding [something]": "Holding something",
    "Putting [something] on a surface": "Putting something on a surface",
    "Turning [something] upside down": "Turning something upside down",
}
NUMBERS = {"Holding something": "2", "Putting something on a surface": "0",
           "Turning something upside down": "1"}  # fmt: skip


def write_clip(path, shade):
    """A small moving clip, as H.264 in mp4 or VP9 in webm."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = (np.arange(128) * 2)[None, None, :, None] // 4 + 10 * shade
    frames = np.stack([np.roll(ramp, 3 * i, 2)[0] for i in range(16)])
    frames = np.broadcast_to(frames, (16, 100, 128, 3)).astype(np.uint8)
    if path.suffix == ".mp4":
        write_video(path, frames)
        return
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=12)
        stream.height, stream.width, stream.pix_fmt = 100, 128, "yuv420p"
        stream.options = {"deadline": "realtime", "cpu-used": "8"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def kinetics(root, layout, gone=()):
    """Eight videos of four classes and the official CSV; those in ``gone`` aren't there."""
    rows = [
        (KINETICS[i % 4], f"-_aB{i}dEfGhI", 7 * i, 7 * i + 10, "train", 0) for i in (5, 2, 7, 0)
    ]
    rows += [(KINETICS[i % 4], f"-_aB{i}dEfGhI", 7 * i, 7 * i + 10, "train", 0)
             for i in (1, 3, 4, 6)]  # fmt: skip
    expected = []
    for label, video, start, end, *_ in rows:
        name = f"{video}_{start:06d}_{end:06d}.mp4"
        folder = {"flat": "", "class": label, "under_scores": label.replace(" ", "_"),
                  "split and class": f"train/{label}"}[layout]  # fmt: skip
        expected.append(Entry(root / folder / name, KINETICS.index(label)))
        if video not in gone:
            write_clip(root / folder / name, KINETICS.index(label))
    listed = root / "kinetics400_train.csv"
    with listed.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["label", "youtube_id", "time_start", "time_end", "split", "is_cc"])
        writer.writerows(rows)
    return listed, expected


def something(root, suffix):
    """Six videos, train.json and labels.json as published."""
    rows, expected = [], []
    for number, template in enumerate([*TEMPLATES, *TEMPLATES]):
        name = str(78687 + 11 * number)
        label = template.replace("something", "a red cup").replace("[", "").replace("]", "")
        rows.append({"id": name, "label": label, "template": template,
                     "placeholders": ["a red cup"]})  # fmt: skip
        path = root / "20bn-something-something-v2" / f"{name}{suffix}"
        write_clip(path, int(NUMBERS[TEMPLATES[template]]))
        expected.append(Entry(path, int(NUMBERS[TEMPLATES[template]])))
    (root / "labels.json").write_text(json.dumps(NUMBERS))
    listed = root / "train.json"
    listed.write_text(json.dumps(rows))
    return listed, expected


def diving(root):
    """Six videos and Diving48_V2_train.json as published."""
    rows, expected = [], []
    for number in range(6):
        name = f"_8Vy3dlHg2w_{number:05d}"
        rows.append({"vid_name": name, "label": 47 - number, "start_frame": 0, "end_frame": 16})
        write_clip(root / "rgb" / f"{name}.mp4", number)
        expected.append(Entry(root / "rgb" / f"{name}.mp4", 47 - number))
    listed = root / "Diving48_V2_train.json"
    listed.write_text(json.dumps(rows))
    return listed, expected


def imagenet(root):
    """Three classes of pictures in folders, and the list of them."""
    lines = []
    for label, wnid in enumerate(("n01440764", "n01443537", "n02119789")):
        (root / "train" / wnid).mkdir(parents=True)
        for number in (10026, 293):
            name = f"{wnid}/{wnid}_{number}.JPEG"
            Image.new("RGB", (150, 120), (80 * label, number % 256, 90)).save(root / "train" / name)
            lines.append(f"{name} {label}")
    (root / "train.txt").write_text("\n".join(lines))
    return root / "train.txt"


@pytest.mark.parametrize("layout", ["flat", "class", "under_scores", "split and class"])
def test_kinetics_csv_finds_videos_and_numbers_classes(tmp_path, layout):
    listed, expected = kinetics(tmp_path, layout)
    assert read_entries(listed, tmp_path, num_classes=4) == expected
    assert read_entries(listed, tmp_path) == expected
    unlabelled = read_entries(listed, tmp_path, labelled=False)
    assert unlabelled == [entry._replace(label=-1) for entry in expected]


def test_a_kinetics_csv_of_a_part_of_the_classes_needs_their_names(tmp_path):
    listed, expected = kinetics(tmp_path, "class")
    with pytest.raises(ValueError, match=r"train\.csv: has 4 class names.*all 400 names with"):
        read_entries(listed, tmp_path, num_classes=400)
    names = tmp_path / "classes.txt"
    names.write_text("\n".join(["aardvark taming", *KINETICS]))
    given = {"num_classes": 5, "class_list": str(names)}
    assert read_entries(listed, tmp_path, **given) == [
        entry._replace(label=entry.label + 1) for entry in expected
    ]
    names.write_text("\n".join(KINETICS[:3]))
    with pytest.raises(ValueError, match=r"row 3: unknown class 'zumba'"):
        read_entries(listed, tmp_path, num_classes=3, class_list=str(names))
    with pytest.raises(ValueError, match=r"classes\.txt: 3 classes, the recipe has 4"):
        read_entries(listed, tmp_path, num_classes=4, class_list=str(names))


def test_a_video_that_is_not_there_is_listed_where_it_should_be(tmp_path):
    listed, expected = kinetics(tmp_path, "flat", gone=["-_aB7dEfGhI"])
    entries = read_entries(listed, tmp_path, num_classes=4)
    assert entries == expected and not expected[2].path.exists()


@pytest.mark.parametrize("suffix", [".webm", ".mp4"])
def test_something_something_json_is_read_with_its_labels(tmp_path, suffix):
    listed, expected = something(tmp_path, suffix)
    classes = str(tmp_path / "labels.json")
    assert read_entries(listed, tmp_path, num_classes=3, class_list=classes) == expected
    assert [e.label for e in read_entries(listed, tmp_path, labelled=False)] == [-1] * 6
    assert len(Video(expected[0].path)) == 16
    with pytest.raises(ValueError, match=r"train\.json: has 3 class names.*labels\.json"):
        read_entries(listed, tmp_path, num_classes=3)


def test_re_encoded_videos_go_before_the_published_ones(tmp_path):
    something(tmp_path, ".webm")
    listed, expected = something(tmp_path / "small", ".mp4")
    classes = str(tmp_path / "labels.json")
    assert read_entries(listed, tmp_path, num_classes=3, class_list=classes) == expected


def test_diving48_json_holds_numbers(tmp_path):
    listed, expected = diving(tmp_path)
    assert read_entries(listed, tmp_path, num_classes=48) == expected
    with pytest.raises(ValueError, match=r"V2_train\.json, entry 1: label 47 is out of range"):
        read_entries(listed, tmp_path, num_classes=47)


def test_plain_lists_stay_plain_whatever_their_suffix(tmp_path):
    for name in ("list.txt", "train.csv", "list"):
        (tmp_path / name).write_text("a b/c.mp4 3\nd.webm 0\n")
        assert read_entries(tmp_path / name, tmp_path, num_classes=4) == [
            Entry(tmp_path / "a b/c.mp4", 3), Entry(tmp_path / "d.webm", 0)
        ]  # fmt: skip


def test_imagenet_is_read_from_folders_and_from_a_list(tmp_path):
    listed = imagenet(tmp_path)
    common = ["--data.image-root", str(tmp_path / "train")]
    by_folder = pretraining_items(parse(paper_joint(), common), "image")
    with_list = [*common, "--data.image-list", str(listed)]
    by_list = pretraining_items(parse(paper_joint(), with_list), "image")
    assert sorted(by_list.entries) == list(by_folder.entries) and len(by_list) == 6
    assert [e.label for e in by_folder.entries] == [0, 0, 1, 1, 2, 2]


HEAD = "label,youtube_id,time_start,time_end,split\n"
GOOD = {"id": "1", "template": "Holding [something]"}
DIVE = {"vid_name": "a", "label": 0}
BROKEN = {
    "no.csv": (None, "can't read this list"),
    "a.csv": ("label,youtube_id,time_start,split\n", "no column time_end"),
    "b.csv": (HEAD, "the list is empty"),
    "c.csv": (HEAD + "zumba,abc,1,2,train\nzumba,def,x,2,train\n", "row 2: 'zumba,def,x,2,train'"),
    "d.csv": (HEAD + "zumba,abc\n", "row 1: .* lacks one of label, youtube_id"),
    "e.csv": ("youtube_id,time_start,time_end,split\nabc,1,2,test\n", "no column label"),
    "f.csv": ("label,id,start\nzumba,abc,1\n", "line 1: 'label,id,start' is not `path label`"),
    "a.json": ('[{"id": "1",]', "line 1: is not valid JSON"),
    "b.json": ("[]", "is not a list of videos"),
    "c.json": ('{"id": "1"}', "is not a list of videos"),
    "d.json": (json.dumps([GOOD, {"id": "2"}]), "entry 2: no 'template' that is a str"),
    "e.json": (json.dumps([GOOD, {"template": ""}]), "entry 2: no 'id' that is a str"),
    "f.json": (json.dumps([GOOD, {"id": "2", "template": "Eating [something]"}]),
               "entry 2: unknown class 'Eating something': correct --data.class-list"),
    "g.json": (json.dumps([DIVE, {"vid_name": "b", "label": "1"}]), "entry 2: no 'label' that is"),
    "h.json": (json.dumps([DIVE, {"vid_name": "b", "label": 3}]), "entry 2: label 3 is out of"),
    "i.json": (json.dumps([DIVE, 7]), "entry 2: no 'vid_name'"),
    "j.json": (json.dumps([DIVE]), r"none of its 1 videos \(such as a.mp4\) is under .*root"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_lists_end_in_one_line_with_file_and_fix(tmp_path, name):
    content, message = BROKEN[name]
    if content is not None:
        (tmp_path / name).write_text(content)
    (tmp_path / "labels.json").write_text(json.dumps(NUMBERS))
    classes = "" if name > "g" or name.endswith("csv") else str(tmp_path / "labels.json")
    with pytest.raises(ValueError, match=message) as error:
        read_entries(tmp_path / name, tmp_path, num_classes=3, class_list=classes)
    assert str(error.value).startswith(str(tmp_path / name)) and "\n" not in str(error.value)
    assert ": " in str(error.value).removeprefix(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.json", '{"a": "0", "b": "2"}'), ("a.json", '{"a": "x"}'), ("a.json", '{"a": [0]}'),
     ("a.json", '["a", "a"]'), ("a.txt", "a\nb\na\n"), ("a.txt", "\n")],
)  # fmt: skip
def test_wrong_class_lists_are_refused(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name}: is not a list of different classes numbered 0"):
        read_classes(tmp_path / name)


def test_class_lists_may_be_numbered_or_in_order(tmp_path):
    for name, content in (
        ("a.json", '["x y", "z"]'), ("b.json", '{"z": "1", "x y": 0}'),
        ("c.txt", "x y\r\n\r\nz\r\n"),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content.encode())
        assert read_classes(tmp_path / name) == {"x y": 0, "z": 1}


def test_videos_are_found_without_asking_for_each(tmp_path, monkeypatch):
    for name in ("a.mp4", "x/b.webm", "x/b.mkv", "x/y/c.AVI", "x/y/z/d.mp4", "x/y/z/w/e.mp4",
                 ".trash/f.mp4", "g.txt", "x/.h.mp4.part", "b.x/a.mp4"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(lists.os, "stat", None)
    monkeypatch.setattr(lists.Path, "stat", None)
    found = {stem: str(path.relative_to(tmp_path)) for stem, path in find_videos(tmp_path).items()}
    assert found == {"a": "a.mp4", "b": "x/b.webm", "c": "x/y/c.AVI", "d": "x/y/z/d.mp4"}


def test_bad_entries_are_left_out_and_counted(tmp_path):
    entries = [Entry(tmp_path / f"{name}.mp4", i) for i, name in enumerate("abcde")]
    report = tmp_path / "report.jsonl"
    report.write_text(
        '{"path": "a.mp4", "ok": false}\n{"path": "b.mp4", "ok": false}\n'
        '{"path": "c.mp4", "ok": true}\n{"path": "b.mp4", "ok": true}\n{"path": "d.m'
    )
    line = f"{report}: 1 of 5 entries are bad and left out, 2 were not checked"
    assert leave_out_bad(entries, [str(report)], tmp_path) == (entries[1:], [line])
    assert leave_out_bad(entries, [], tmp_path) == (entries, [])
    other = tmp_path / "other"  # another set's report says nothing of this one
    others = [Entry(other / "a.mp4", 0)]
    assert leave_out_bad(others, [str(report)], other / "sub") == (others, [])
    with pytest.raises(ValueError, match="all 1 entries are bad"):
        leave_out_bad(entries[:1], [str(report)], tmp_path)
    report.write_text("a.mp4 0\n")
    with pytest.raises(ValueError, match=r"report\.jsonl: is not a report of check_data"):
        leave_out_bad(entries, [str(report)], tmp_path)


def few_steps(command, preset, tmp_path, *options):
    """Train a lesson preset for three steps through its command; return the record."""
    folder = tmp_path / f"run{random.random()}"
    result = run(f"bevt_lib.{command}", preset, "--run.folder", str(folder), "--run.stop-after",
                 "3", "--run.threads", "1", *options)  # fmt: skip
    assert result.returncode == 0, result.stderr
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3
    return result, [json.loads(line) for line in lines]


def labelled_set(name, root):
    """Build a set; return the options that name it, its number of classes and its entries."""
    classes = ()
    if name == "kinetics":
        (listed, expected), number = kinetics(root, "class"), 4
    elif name == "diving48":
        (listed, expected), number = diving(root), 48
    else:
        listed, expected = something(root, ".webm" if name == "something, webm" else ".mp4")
        number, classes = 3, ("--data.class-list", str(root / "labels.json"))
    places = ("--data.video-list", str(listed), "--data.val-list", str(listed),
              "--data.video-root", str(root), *classes)  # fmt: skip
    return places, number, expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kinetics", "something, webm", "something, mp4", "diving48"])
def test_each_set_is_fine_tuned_on_and_tested_through_the_door(tmp_path, name):
    places, number, expected = labelled_set(name, tmp_path)
    result, record = few_steps(
        "finetune", "lesson_what", tmp_path, "--task", "mini", "--num-classes", str(number),
        "--optim.clips", "4", "--run.test-clips", str(len(expected)), *places,
    )  # fmt: skip
    assert all(np.isfinite(entry["loss"]) for entry in record)
    assert f"on {len(expected)} clips" in result.stdout
    assert "bad file" not in result.stderr


@pytest.mark.slow
def test_joint_pretraining_reads_kinetics_and_imagenet_without_what_is_bad(tmp_path):
    """A missing video and a damaged picture: replaced before the check, left out after it."""
    listed, _ = kinetics(tmp_path / "k400", "class", gone=["-_aB3dEfGhI"])
    images = imagenet(tmp_path / "in1k")
    root = tmp_path / "in1k" / "train"
    (root / "n01443537" / "n01443537_293.JPEG").write_bytes(b"\xff\xd8 no picture")
    places = ["--data.video-list", str(listed), "--data.video-root", str(tmp_path / "k400")]
    places += ["--data.image-root", str(root), "--optim.clips", "8", "--optim.images", "8"]
    result, record = few_steps("pretrain", "lesson_joint", tmp_path, *places)
    bad = [line for line in result.stderr.splitlines() if "bad file: " in line]
    assert sum("-_aB3dEfGhI_000021_000031.mp4: no such video" in line for line in bad) == 3
    assert sum("n01443537_293.JPEG: is not a readable picture" in line for line in bad) == 4
    assert [sum(entry[f"{s}/replaced"] for entry in record) for s in ("video", "image")] == [3, 4]
    report = tmp_path / "checked.jsonl"
    for words in ([str(listed), "--root", str(tmp_path / "k400")], [str(root)]):
        checked = run("bevt_lib.check_data", *words, "--report", str(report), "--workers", "1")
        assert checked.returncode == 1 and " 1 bad (1 " in checked.stdout, checked.stderr
    result, record = few_steps("pretrain", "lesson_joint", tmp_path, *places, "--data.checked",
                               str(report), "--data.image-list", str(images))  # fmt: skip
    assert "1 of 8 entries are bad and left out, 0 were not checked" in result.stdout
    assert "1 of 6 entries are bad and left out, 0 were not checked" in result.stdout
    assert "bad file" not in result.stderr
    assert not any(entry["video/replaced"] or entry["image/replaced"] for entry in record)
    folder = next(
        f for f in tmp_path.glob("run*") if str(report) in (f / "config.json").read_text()
    )
    resumed = run("bevt_lib.pretrain", "lesson_joint", "--run.folder", str(folder), *places)
    assert resumed.returncode == 2
    assert re.search(
        r"^error: .*items\.video: 7 \(\w{12}\) there, 8 \(\w{12}\) here; items\.image:"
        r" 5 .*: give that run's lists and --data\.checked",
        resumed.stderr,
        re.M,
    )


@pytest.mark.slow
def test_a_wrong_list_ends_training_in_one_line(tmp_path):
    listed, _ = something(tmp_path, ".mp4")
    result = run("bevt_lib.finetune", "lesson_what", "--task", "mini", "--num-classes", "3",
                 "--data.video-list", str(listed), "--data.video-root", str(tmp_path),
                 "--data.val-list", str(listed), "--run.folder", str(tmp_path / "run"))  # fmt: skip
    assert result.returncode == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and "train.json" in lines[0] and "--data.class-list" in lines[0]


def test_the_commands_of_the_data_page_are_real(tmp_path, monkeypatch):
    """Every option that data/README.md shows is known to the command it stands with."""
    monkeypatch.chdir(tmp_path)
    text = (files.data_folder() / "README.md").read_text().replace("\\\n", " ")
    seen = set()
    for line in text.splitlines():
        before, command_there, command = line.partition("-m bevt_lib.")
        if not command_there or not before.startswith(("python ", "torchrun ")):
            continue
        command, *words = command.split()
        seen.add(command)
        if command in ("pretrain", "finetune"):
            recipe = parse((PRETRAIN | FINETUNE)[words[0]](), words[1:])
            if not recipe.name.startswith("lesson"):  # these read the embedded clips
                assert recipe.data.video_list and recipe.data.video_root and recipe.run.init
        else:
            with pytest.raises(ValueError, match=r"(train|val)\w*(\.\w+)?: can't read this list"):
                {"check_data": check_data, "bench": bench}[command].main(words)
    assert seen == {"pretrain", "finetune", "check_data", "bench"}


def test_the_list_made_by_the_data_pages_script_is_read(tmp_path):
    text = (files.data_folder() / "README.md").read_text()
    script = text.partition("<<'EOF'\n")[2].partition("EOF\n")[0]
    _, expected = kinetics(tmp_path, "split and class")
    made = subprocess.run([sys.executable, "-c", script, str(tmp_path / "train")], text=True,
                          capture_output=True, check=True).stdout  # fmt: skip
    (tmp_path / "train.txt").write_text(made)
    entries = read_entries(tmp_path / "train.txt", tmp_path, num_classes=4)
    assert entries == sorted(expected) and len(entries) == 8
