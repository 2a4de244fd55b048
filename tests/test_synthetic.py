"""The embedded data: licences, splits, labels, and motion that no single frame tells."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bevt_lib.base import files
from bevt_lib.datasets import synthetic
from bevt_lib.datasets.lists import read_list
from bevt_lib.datasets.synthetic import (
    CLIPS,
    KINDS,
    MOTIONS,
    draw_scene,
    labels,
    render,
    render_clip,
)
from bevt_lib.datasets.video import Video

DATA = files.data_folder()


def test_every_item_has_its_licence():
    table = (DATA / "LICENSES.md").read_text()
    items = [p for name in ("photos", "cutouts", "film") for p in (DATA / name).rglob("*.*")]
    assert len(items) > 350
    rows = {
        line.split(" | ")[0].strip("| ") for line in table.splitlines() if line.startswith("| ")
    }
    assert {p.relative_to(DATA).as_posix() for p in items} == rows - {"item", "---"}
    assert all(word in table for word in ("Blender Foundation", "CC-BY 3.0", "public domain"))


def test_no_photo_is_in_two_splits_and_unseen_cutouts_are_unseen():
    splits = synthetic.photo_splits()
    main = [set(splits[s]) for s in ("train", "val", "test")]
    assert sum(len(s) for s in main) == len(set.union(*main)) == 198
    cutouts = synthetic.cutout_splits()
    for seen, unseen in zip(cutouts["seen"], cutouts["unseen"], strict=True):
        assert 2 <= len(unseen) <= 4
        # By content: the source holds some pictures under two names.
        assert not {p.read_bytes() for p in seen} & {p.read_bytes() for p in unseen}


def test_scenes_keep_to_their_split():
    splits, cutouts = synthetic.photo_splits(), synthetic.cutout_splits()
    for split in CLIPS:
        photos = {p.name for p in splits[split]}
        which = "unseen" if split == "test_unseen" else "seen"
        for index in range(0, CLIPS[split], 37):
            what, how = labels(split, index)
            scene = draw_scene(split, index, what, how)
            assert scene.photo in photos
            assert scene.cutout in {p.name for p in cutouts[which][what]}


@pytest.mark.parametrize("split", CLIPS)
def test_labels_are_balanced_and_independent(split):
    folder = render()
    what, how = (
        np.array([e.label for e in read_list(folder / f"{task}_{split}.txt", folder)])
        for task in ("what", "how")
    )
    table = np.zeros((len(KINDS), len(MOTIONS)), int)
    np.add.at(table, (what, how), 1)
    assert len(what) == CLIPS[split] and len(set(table.ravel().tolist())) == 1


def test_a_clip_is_a_function_of_its_seed():
    scene = draw_scene("val", 5, *labels("val", 5))
    again = draw_scene("val", 5, *labels("val", 5))
    assert np.array_equal(render_clip(scene), render_clip(again))
    stored = Video(render() / "clips" / "val" / "00005.mp4").frames(range(16)).astype(int)
    assert np.abs(stored - render_clip(scene)).mean() < 8  # lossy, but the same


@pytest.mark.parametrize("motion", range(8))
def test_pictures_move_as_the_label_says(motion):
    """Slow check by optical flow: fit translation, scale and turn to OpenCV's dense flow."""
    import cv2

    votes = []
    for index in range(6):
        scene = draw_scene("train", index, index % 8, motion)
        frames = [cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in render_clip(scene, 6)]
        for a, b in itertools.pairwise(frames):
            flow = cv2.calcOpticalFlowFarneback(a, b, None, 0.5, 3, 15, 3, 5, 1.2, 0)
            y, x = np.mgrid[: a.shape[0], : a.shape[1]] - (a.shape[0] - 1) / 2
            u, v = flow[..., 0], flow[..., 1]
            votes.append([
                -np.median(u), np.median(u), -np.median(v), np.median(v),
                np.median(u * x + v * y), -np.median(u * x + v * y),
                np.median(v * x - u * y), -np.median(v * x - u * y),
            ])  # fmt: skip
    assert np.median(np.array(votes), axis=0)[motion] > 0


def test_rendering_needs_a_data_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("BEVT_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="BEVT_DATA"):
        files.data_folder()


def test_an_interrupted_rendering_leaves_nothing_half(tmp_path, monkeypatch):
    """Whole splits only: the folder of a split appears when all of its clips are written."""
    monkeypatch.setattr(synthetic, "CLIPS", {"train": 64, "val": 64})
    monkeypatch.setattr(synthetic, "STILLS", {"train": 16})
    real, calls = synthetic._all, []

    def fail_at_the_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(synthetic, "_all", fail_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        render(tmp_path)
    target = next(Path(tmp_path).iterdir())
    assert [p.name for p in (target / "clips").iterdir() if not p.name.startswith(".")] == ["train"]
    assert not (target / "finished").exists()
    monkeypatch.setattr(synthetic, "_all", real)
    assert render(tmp_path) == target and len(list((target / "clips/val").iterdir())) == 64


class SmallCnn(nn.Module):
    """The same network for one frame and for four: frames are stacked as channels.

    Each frame is shown as it is and minus the clip's mean, so that motion is easy to see where
    there is any; with one frame the second half is zero.
    """

    def __init__(self, frames: int, classes: int):
        super().__init__()
        widths = (6 * frames, 32, 64, 96, 128)
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            layers += [nn.Conv2d(a, b, 3, stride=2, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, clips):  # (B, T, H, W, 3), uint8
        x = clips.permute(0, 1, 4, 2, 3).float() / 128 - 1
        x = torch.cat([x, 4 * (x - x.mean(1, keepdim=True))], dim=2)
        return self.head(self.body(x.flatten(1, 2)))


def clips_and_labels(split, task, frames, step=1):
    folder = render()
    entries = read_list(folder / f"{task}_{split}.txt", folder)[::step]
    pixels = np.stack([Video(e.path).frames(frames)[:, ::2, ::2] for e in entries])
    return torch.from_numpy(pixels), torch.tensor([e.label for e in entries])


def accuracy_of_small_cnn(task, frames, epochs=4):
    torch.manual_seed(0)
    clips, truth = clips_and_labels("train", task, frames)
    model = SmallCnn(len(frames), 8)
    steps = epochs * len(clips) // 64
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        pick = torch.randint(len(clips), (64,))
        loss = nn.functional.cross_entropy(model(clips[pick]), truth[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    clips, truth = clips_and_labels("test", task, frames)
    model.eval()
    with torch.no_grad():
        return float((model(clips).argmax(1) == truth).float().mean()), len(truth)


@pytest.mark.slow
def test_motion_is_read_from_four_frames_and_from_no_single_one():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    four, clips = accuracy_of_small_cnn("how", [4, 5, 6, 7])
    bound = 1 / 8 + 2.576 * math.sqrt(1 / 8 * 7 / 8 / clips)
    singles = {t: accuracy_of_small_cnn("how", [t])[0] for t in (0, 8, 15)}
    torch.set_num_threads(threads)
    assert clips >= 1000 and four >= 0.6, four
    assert max(singles.values()) <= bound, (singles, bound)
