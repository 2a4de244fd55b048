"""Where a stream's items come from: your own lists and folders, or the embedded data.

The one place that decides, for every command and each stream. A list or folder that is given makes
the stream your own. Without one, presets with ``data.embedded`` (lesson_*, small_*) read the
embedded clips and pictures, and the others (paper_*) refuse to start.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from bevt_lib.base import distributed, files
from bevt_lib.base.config import Finetune, Pretrain, Recipe
from bevt_lib.datasets import lists, synthetic
from bevt_lib.datasets.decoded import Decoded
from bevt_lib.datasets.items import Clips, LabelledClips, PretrainClips, PretrainImages
from bevt_lib.datasets.lists import Entry
from bevt_lib.datasets.video import Video, import_decord
from bevt_lib.model.bevt import STRIDE
from bevt_lib.model.masking import tube_mask

AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)
UNITS = {"video": "clips", "clip": "clips", "image": "pictures"}
FIELDS = {  # of the data section that a stream of your own data reads
    "video": ("video_list", "video_root"),
    "image": ("image_list", "image_root"),
    "clip": ("video_list", "val_list", "video_root", "class_list"),
}
FILM_STEP = 8  # every eighth film frame is a training picture of a tokenizer
PHOTO_REPEATS = 6  # photos are few beside the stills


class Place(NamedTuple):
    """Where a split of a stream is read from."""

    own: bool  # False: from the embedded data
    path: str  # your own list or folder; "": not given
    root: str
    flag: str  # what gives the path


def place_of(recipe: Recipe, stream: str, split: str = "train") -> Place:
    """Decide where a split of a stream is read from.

    Both splits of fine-tuning are your own, or neither is. Held-out data of the other recipes is
    always embedded.
    """
    d = recipe.data
    if isinstance(recipe, Finetune):
        embedded = d.embedded and recipe.task in synthetic.CLASSES
        own = bool(d.video_list or d.val_list or d.video_root) or not embedded
        if split != "train":
            return Place(own, d.val_list, d.video_root, "--data.val-list FILE")
    elif stream == "image":
        own = split == "train" and bool(d.image_list or d.image_root or not d.embedded)
        return Place(own, d.image_list or d.image_root, d.image_root, "--data.image-root DIR")
    else:
        own = split == "train" and bool(d.video_list or d.video_root or not d.embedded)
    return Place(own, d.video_list, d.video_root, "--data.video-list FILE")


def parts_of(recipe: Recipe, splits: Sequence[str] = ()) -> list[tuple[str, str]]:
    """List the (stream, split) that a run reads; of fine-tuning's ``splits`` by default all."""
    if isinstance(recipe, Finetune):
        return [("clip", split) for split in splits or ("train", "test")]
    return [(s, "train") for s in (recipe.streams if isinstance(recipe, Pretrain) else ("image",))]


def render_embedded(recipe: Recipe) -> None:
    """Render the embedded data, once per node, if a run reads any."""
    needed = not all(place_of(recipe, *part).own for part in parts_of(recipe))
    distributed.once_per_node(synthetic.render, needed=needed)


def check_sources(recipe: Recipe, splits: Sequence[str] = (), *, plan: bool = False) -> None:
    """Refuse data that is missing, half given, or given and not used; and decord without decord.

    Called before anything is rendered or loaded. A ``plan`` may lack lists. Raises ValueError.
    """
    d = recipe.data
    own = [(part[0], place_of(recipe, *part)) for part in parts_of(recipe, splits)]
    own = [(stream, place) for stream, place in own if place.own]
    used = {field for stream, _ in own for field in (*FIELDS[stream], "checked")}
    fields = (*FIELDS["clip"], *FIELDS["image"], "checked")
    unused = ["--data." + f.replace("_", "-") for f in fields if getattr(d, f) and f not in used]
    unused += ["--data.decoded"] * (d.decoded and len(own) == len(parts_of(recipe, splits)))
    if unused:
        reads = f"{recipe.name} reads {'data of your own' if own else 'the embedded data'}"
        raise ValueError(f"{reads} and doesn't use {', '.join(unused)}: leave it out")
    missing = [place.flag + f" ({stream} stream)" * isinstance(recipe, Pretrain)
               for stream, place in own if not place.path]  # fmt: skip
    if missing and (not plan or (d.video_root and not d.video_list + d.val_list)):
        does = "is tested on" if splits else "trains on"
        raise ValueError(f"{recipe.name} {does} data of your own: give {' and '.join(missing)}")
    if d.decoder == "decord":
        import_decord()


def embedded_size(recipe: Recipe, stream: str, split: str) -> tuple[int, str]:
    """Give how much the embedded data hold of a split of a stream, as a number and in words."""
    count = (synthetic.STILLS if stream == "image" else synthetic.CLIPS)[split]
    count += len(photos_and_film_frames(recipe, split))
    return count, f"{count:,} {UNITS[stream]}, embedded ({split} split)"


def list_entries(recipe: Recipe, stream: str, split: str = "train") -> tuple[list[Entry], str]:
    """Read the entries of a split of a stream, less those that check_data's reports call bad.

    Also says how many there are and where they come from. Raises ValueError for a list that is
    missing or malformed.
    """
    d, place = recipe.data, place_of(recipe, stream, split)
    labels: dict[str, Any] = {"labelled": False}
    if isinstance(recipe, Finetune):
        labels = {"num_classes": recipe.num_classes}
    if not place.own:
        folder = synthetic.render()
        if stream == "image":
            entries = lists.read_image_folder(folder / "images" / split)
            entries += photos_and_film_frames(recipe, split)
        else:
            task = recipe.task if isinstance(recipe, Finetune) else "how"
            entries = lists.read_list(folder / f"{task}_{split}.txt", folder, **labels)
        return entries, embedded_size(recipe, stream, split)[1]
    if not place.path:
        forms = "one `path label` a line, or the official list; of pictures, class folders"
        raise ValueError(f"{recipe.name} needs {place.flag}: {forms}")
    path, root = Path(place.path), Path(place.root or ".")
    if stream != "image":
        entries = lists.read_entries(path, root, class_list=d.class_list, **labels)
    elif d.image_list:
        entries = lists.read_list(path, root, **labels)
    else:
        entries = lists.read_image_folder(root)
    entries, left_out = lists.leave_out_bad(entries, d.checked, root)
    return entries, "; ".join([f"{len(entries):,} {UNITS[stream]} from {path}", *left_out])


def photos_and_film_frames(recipe: Recipe, split: str) -> list[Entry]:
    """List what a tokenizer is trained on beside stills: photos, film frames (label = frame)."""
    if split != "train" or isinstance(recipe, Pretrain | Finetune):
        return []
    photos = [Entry(path, 0) for path in synthetic.photo_splits()["train"]] * PHOTO_REPEATS
    return photos + [
        Entry(path, frame)
        for path in sorted((files.data_folder() / "film").glob("*.mp4"))
        for frame in range(0, len(Video(path)), FILM_STEP)
    ]


def print_origins(items: Mapping[str, Clips]) -> None:
    """Print, on rank 0, a line per data set: how many items, from where; and where decoded."""
    distributed.say(*(f"{name}: {one.origin}" for name, one in items.items()),
                    *{str(one.decoded) for one in items.values() if one.decoded})  # fmt: skip


def plan_sources(recipe: AnyRecipe, splits: Sequence[str] = ()) -> tuple[AnyRecipe, dict[str, str]]:
    """Describe what a run would read, a line per part; give the recipe with its data's real size.

    Nothing is rendered or decoded; of the paths only lists and folders are read. Raises ValueError
    as :func:`check_sources` does.
    """
    check_sources(recipe, splits, plan=True)
    lines: dict[str, str] = {}
    first = recipe
    for stream, split in parts_of(recipe, splits):
        place, size = place_of(recipe, stream, split), recipe.data.expected_items
        paths = dict.fromkeys(path for path in (place.path, place.root) if path)
        absent = " and ".join(path for path in paths if not Path(path).exists())
        if not place.own:
            size, text = embedded_size(recipe, stream, split)
        elif place.path and not absent:
            entries, text = list_entries(recipe, stream, split)
            size = len(entries)
        else:
            text = f"{absent} isn't there yet" if place.path else f"{place.flag} not given yet"
            if not lines and split == "train" and size:
                text += f"; EXPECTED: {size:,} {UNITS[stream]}"
        if not lines and split == "train":
            first = replace(recipe, data=replace(recipe.data, expected_items=size))
        lines[f"{stream if split == 'train' else split} data"] = text
    return first, lines


def reading(recipe: Recipe, origin: str = "") -> dict[str, Any]:
    """Give what every data set takes from a recipe beside how clips are cut."""
    d = recipe.data
    return {"seed": recipe.run.seed, "timeout": d.timeout, "decoder": d.decoder, "origin": origin,
            "decoded": Decoded(synthetic.render()) if d.decoded else None}  # fmt: skip


def pretraining_items(recipe: Pretrain, stream: str, split: str = "train") -> PretrainClips:
    """Build one stream's data set: the recipe's own paths in training, else the embedded data.

    ``split`` is "train", "val" or "test".
    """
    d, side = recipe.data, recipe.data.size // STRIDE
    if d.size % (2 * STRIDE):
        near = max(64, 32 * round(d.size / 32))
        raise ValueError(f"data.size {d.size}: the decoder needs a multiple of 32 px, like {near}")
    entries, origin = list_entries(recipe, stream, split)
    images = stream == "image"  # of one time step: a tube's block is then the whole mask
    steps = 1 if images else math.ceil(d.frames / recipe.model.patch[0])
    target, length = recipe.masking.target((side, side)), recipe.masking.tube
    return (PretrainImages if images else PretrainClips)(
        entries, d.clip_spec(), input_size=side * recipe.tokens.factor,
        mask=partial(tube_mask, (steps, side, side), target=target, length=length),
        jitter=d.jitter if images else 0.0, **reading(recipe, origin),
    )  # fmt: skip


def labelled_items(recipe: Finetune, split: str = "train") -> LabelledClips:
    """Build a split's clips: embedded ("train", "val", "test", "test_unseen") or the paths'."""
    spec = recipe.clip_spec()  # first: it checks how clips are cut
    entries, origin = list_entries(recipe, "clip", split)
    return LabelledClips(
        entries, spec, train=split == "train", flip=recipe.flip, crop=recipe.crop,
        rand_augment=recipe.rand_augment, erasing=recipe.erasing, **reading(recipe, origin),
    )  # fmt: skip
