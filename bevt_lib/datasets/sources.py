"""Where a stream's items come from: lists and folders of one's own, or the embedded clips."""

import math
from functools import partial
from pathlib import Path
from random import Random

import numpy as np

from bevt_lib.base.config import Finetune, Pretrain
from bevt_lib.datasets import synthetic
from bevt_lib.datasets.items import LabelledClips, PretrainClips, PretrainImages
from bevt_lib.datasets.lists import leave_out_bad, read_entries, read_image_folder, read_list
from bevt_lib.model.bevt import STRIDE
from bevt_lib.model.masking import block_mask, tube_mask


def hide_blocks(rng: Random, grid: tuple[int, int], target: int) -> np.ndarray:
    """Draw an image's mask: bool (1, h, w)."""
    return block_mask(grid, rng, target=target)[None]


def hide_tubes(
    rng: Random, grid: tuple[int, int, int], target: int, length: tuple[float, float]
) -> np.ndarray:
    """Draw a clip's mask: bool (D, h, w)."""
    return tube_mask(grid, rng, target=target, length=length)


def pretraining_items(recipe: Pretrain, stream: str, split: str = "train"):
    """Build one stream's data set: the embedded one, or the paths of the recipe.

    ``split`` is "train", "val" or "test" of the embedded data; the recipe's own paths are for
    training.
    """
    d = recipe.data
    side = d.size // STRIDE
    if d.size % (2 * STRIDE):
        raise ValueError(
            f"data.size {d.size}: the decoder needs a multiple of 32 px, such as "
            f"{max(64, 32 * round(d.size / 32))}"
        )
    target = recipe.masking.target((side, side))
    view = side * recipe.tokens.factor
    given = d.video_list if stream == "video" else d.image_list or d.image_root
    own = given and split == "train"
    folder = Path() if own else synthetic.render()
    if stream == "image":
        root = Path(d.image_root or ".") if own else folder / "images" / split
        if own and d.image_list:
            entries = read_list(Path(d.image_list), root, labelled=False)
        else:
            entries = read_image_folder(root)
        hide = partial(hide_blocks, grid=(side, side), target=target)
        return PretrainImages(
            leave_out_bad(entries, d.checked if own else (), root), size=d.size, short=d.short,
            input_size=view, mask=hide, jitter=d.jitter, seed=recipe.run.seed, timeout=d.timeout,
        )  # fmt: skip
    if own:
        root = Path(d.video_root or ".")
        entries = read_entries(Path(d.video_list), root, labelled=False)
        entries = leave_out_bad(entries, d.checked, root)
    else:
        entries = read_list(folder / f"how_{split}.txt", folder)
    steps = math.ceil(d.frames / recipe.model.patch[0])
    hide = partial(hide_tubes, grid=(steps, side, side), target=target, length=recipe.masking.tube)
    return PretrainClips(
        entries, frames=d.frames, interval=d.interval, size=d.size, short=d.short,
        input_size=view, mask=hide, seed=recipe.run.seed, timeout=d.timeout,
    )  # fmt: skip


def labelled_items(recipe: Finetune, split: str = "train") -> LabelledClips:
    """Build a split's clips: embedded ("train", "val", "test", "test_unseen") or the paths'."""
    d = recipe.data
    train = split == "train"
    if recipe.sampling == "uniform" and recipe.test_clips != 1:  # say so before training
        raise ValueError(
            f"uniform sampling has 1 test clip, not {recipe.test_clips}: --test-clips 1"
        )
    own = {"train": d.video_list}.get(split, d.val_list)
    if own:
        root = Path(d.video_root or ".")
        entries = read_entries(
            Path(own), root, num_classes=recipe.num_classes, class_list=d.class_list
        )
        entries = leave_out_bad(entries, d.checked, root)
    else:
        if recipe.task not in ("what", "how"):
            raise ValueError(
                f"{recipe.name} needs {'--data.video-list' if train else '--data.val-list'} FILE "
                "with one `path label` a line, or the set's official list"
            )
        folder = synthetic.render()
        entries = read_list(
            folder / f"{recipe.task}_{split}.txt", folder, num_classes=recipe.num_classes
        )
    return LabelledClips(
        entries, frames=d.frames, interval=d.interval, size=d.size, short=d.short,
        seed=recipe.run.seed, train=train, flip=recipe.flip, crop=recipe.crop,
        sampling=recipe.sampling, rand_augment=recipe.rand_augment, erasing=recipe.erasing,
        timeout=d.timeout,
    )  # fmt: skip
