"""Lists of videos and pictures, in the forms in which the sets are published.

Kinetics (`path label` and the official CSV), Something-Something-V2 and Diving48 (official JSON),
ImageNet (folders and `path label`). Entries that ``check_data`` reported as bad are left out.
"""

import csv
import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
VIDEOS = ("mp4", "webm", "mkv", "avi")  # if a video exists twice, the earlier kind is taken
DEPTH = 3  # levels of folders below the root that are searched for videos: split/class/part


class Entry(NamedTuple):
    """One line of a list."""

    path: Path
    label: int


class Entries(Sequence[Entry]):
    """Entries packed into three arrays: ImageNet's 1.28 M take 72 MB instead of a list's 490 MB.

    Forked loader processes share the arrays. Of a list each would end up with its own copy, since
    reading a Python object writes its reference count.
    """

    def __init__(self, entries: Iterable[Entry]):
        pairs = [(os.fsencode(path), label) for path, label in entries]
        self.names = b"".join(name for name, _ in pairs)
        self.labels = np.array([label for _, label in pairs], dtype=np.int64)
        self.ends = np.cumsum([0, *(len(name) for name, _ in pairs)])

    def __len__(self) -> int:
        return len(self.labels)

    def fingerprint(self) -> str:
        """Sum up what an order depends on: how many entries, and a digest of names and labels.

        Names are taken without their folders, which may move.
        """
        total = hashlib.sha256(self.labels.tobytes())
        for start, end in itertools.pairwise(self.ends.tolist()):
            total.update(self.names[start:end].rpartition(os.sep.encode())[2] + b"/")
        return f"{len(self):,} ({total.hexdigest()[:12]})"

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        start, end = self.ends[index % len(self)], self.ends[index % len(self) + 1]
        return Entry(Path(os.fsdecode(self.names[start:end])), int(self.labels[index]))


class Record(NamedTuple):
    """What ``check_data`` found of one file."""

    path: str  # under the root folder
    ok: bool
    frames: int = 0
    kind: str = ""  # what is wrong: missing, truncated, undecodable, hanging, crashing
    reason: str = ""


def read_entries(
    path: Path, root: Path, num_classes: int | None = None, *, labelled: bool = True,
    class_list: str = "",
) -> list[Entry]:  # fmt: skip
    """Read any list of videos under ``root``; its suffix and content tell its format.

    A missing video gets the path it should have, for ``check_data`` to report. Without
    ``labelled`` labels may be missing (-1). Raises ValueError naming file, entry and fix.
    """
    # Names of videos with the numbers or names of their classes
    text = _text(path)
    if path.suffix.lower() == ".json":
        named, unit = _json_rows(path, text, labelled), "entry"
    elif path.suffix.lower() == ".csv" and "youtube_id" in text.partition("\n")[0]:
        named, unit = _kinetics_rows(path, text, labelled), "row"
    else:
        return read_list(path, root, num_classes, labelled=labelled)
    # Class numbers
    labels = [-1] * len(named)
    if labelled:
        classes = read_classes(Path(class_list)) if class_list else {}
        names = sorted({label for _, label in named if isinstance(label, str)})
        if names and not classes:
            # Kinetics numbers its classes alphabetically: a part of them doesn't give the numbers.
            if unit == "entry" or num_classes not in (None, len(names)):
                raise ValueError(
                    f"{path}: has {len(names)} class names but no numbers: give all "
                    f"{num_classes or ''} names with --data.class-list (labels.json, or one a line)"
                )
            classes = {name: number for number, name in enumerate(names)}
        if classes and num_classes not in (None, len(classes)):
            what = f"{class_list}: {len(classes)} classes, the recipe has {num_classes}"
            raise ValueError(f"{what}: give another --data.class-list or set --num-classes")
        for i, (_, label) in enumerate(named):
            labels[i] = _number(label, classes, num_classes, f"{path}, {unit} {i + 1}")
    # Video files
    found = find_videos(root)
    if not any(stem in found for stem, _ in named):
        what = f"none of its {len(named)} videos (such as {named[0][0]}.mp4) is under {root}"
        raise ValueError(f"{path}: {what}: set the root folder (--data.video-root)")
    paths = (found.get(stem) or root / f"{stem}.{VIDEOS[0]}" for stem, _ in named)
    return [Entry(*pair) for pair in zip(paths, labels, strict=True)]


def _number(label: Any, classes: Mapping[str, int], num_classes: int | None, where: str) -> int:
    """Give a class's number; ``label`` is the number itself or a name."""
    number = classes.get(label) if isinstance(label, str) else label
    if number is None:
        raise ValueError(f"{where}: unknown class {label!r}: correct --data.class-list")
    if not 0 <= number < (num_classes or math.inf):
        known = f"0..{num_classes - 1}" if num_classes else "0, 1, 2, ..."
        what = f"label {number} is out of range {known}"
        raise ValueError(f"{where}: {what}: correct the list or set --num-classes")
    return number


def _kinetics_rows(path: Path, text: str, labelled: bool) -> list[tuple[str, Any]]:
    """Read the official CSV: names of files, ``<id>_<start>_<end>``, and names of classes."""
    reader = csv.DictReader(text.splitlines())
    columns = ["label"] * labelled + ["youtube_id", "time_start", "time_end"]
    missing = [c for c in columns if c not in (reader.fieldnames or ())]
    if missing:
        official = "Kinetics' own list has label,youtube_id,time_start,time_end,split"
        raise ValueError(f"{path}: no column {', '.join(missing)}: {official}")
    named = []
    for number, row in enumerate(reader, 1):
        try:
            start, end = (int(float(row[time])) for time in columns[-2:])
            if not all(row[c] for c in columns):
                raise ValueError
        except (TypeError, ValueError):
            shown = ",".join(str(v) for v in row.values())[:60]
            lacks = f"{shown!r} lacks one of {', '.join(columns)}"
            raise ValueError(f"{path}, row {number}: {lacks}: download the list again") from None
        named.append((f"{row['youtube_id']}_{start:06d}_{end:06d}", row.get("label")))
    if not named:
        raise ValueError(f"{path}: the list is empty: download it again")
    return named


def _json_rows(path: Path, text: str, labelled: bool) -> list[tuple[str, Any]]:
    """Read official JSON: Diving48's (class numbers) or Something-Something's (templates)."""
    rows = _json(path, text)
    if not isinstance(rows, list) or not rows or not isinstance(rows[0], dict):
        raise ValueError(f"{path}: is not a list of videos: give the official JSON of a split")
    diving = "vid_name" in rows[0]
    name, label, kind = ("vid_name", "label", int) if diving else ("id", "template", str)
    for number, row in enumerate(rows, 1):
        for key, wanted in ((name, str), (label, kind))[: 1 + labelled]:
            if not isinstance(row, dict) or not isinstance(row.get(key), wanted):
                raise ValueError(
                    f"{path}, entry {number}: no {key!r} that is a {wanted.__name__}: Diving48 has "
                    "vid_name and label, Something-Something id and template (not in test.json)"
                )
    brackets = str.maketrans("", "", "[]")  # around the objects in a template
    if diving:
        return [(row[name], row.get(label)) for row in rows]
    return [(row[name], str(row.get(label)).translate(brackets)) for row in rows]


def read_classes(path: Path) -> dict[str, int]:
    """Read class numbers by name: Something-Something's labels.json, or names in order.

    Names are a JSON list or one a line. Raises ValueError where the numbers aren't 0, 1, 2, ...
    """
    text = _text(path)
    names = _json(path, text) if path.suffix.lower() == ".json" else text.splitlines()
    if not isinstance(names, dict):
        names = {str(name).strip(): i for i, name in enumerate(n for n in names if str(n).strip())}
    try:
        classes = {name: int(number) for name, number in names.items()}
    except (TypeError, ValueError):
        classes = {}
    if not classes or sorted(classes.values()) != list(range(len(classes))):
        what = "is not a list of different classes numbered 0, 1, 2, ..."
        raise ValueError(f"{path}: {what}: give labels.json, or one name a line")
    return classes


def find_videos(root: Path) -> dict[str, Path]:
    """Find the videos under ``root`` by name without suffix, from directory listings alone.

    The same on every machine: of two with one name, the earlier suffix, then path, is taken.
    """
    best: dict[str, tuple[int, str]] = {}
    top = str(root).count(os.sep)
    for folder, subfolders, names in os.walk(root, followlinks=True):
        deep = folder != str(root) and folder.count(os.sep) - top >= DEPTH
        subfolders[:] = [] if deep else [s for s in subfolders if not s.startswith(".")]
        for name in names:
            stem, _, suffix = name.rpartition(".")
            if stem and suffix.lower() in VIDEOS:
                mine = VIDEOS.index(suffix.lower()), os.path.join(folder, name)
                best[stem] = min(best.get(stem, mine), mine)
    return {stem: Path(path) for stem, (_, path) in best.items()}


def read_list(
    path: Path, root: Path, num_classes: int | None = None, *, labelled: bool = True
) -> list[Entry]:
    """Read a Kinetics-style list: one ``path label`` a line, paths relative to ``root``.

    A path may hold spaces: the label is the last word. With ``labelled=False`` a line may be a bare
    path (label -1). Raises ValueError naming file, line and fix for a missing or empty list, a
    malformed line, or a label outside 0 .. num_classes - 1.
    """
    entries = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        name, label, where = line.strip(), -1, f"{path}, line {number}"
        words = name.rsplit(maxsplit=1)
        if len(words) == 2 and words[1].removeprefix("-").isdecimal():
            name, label = words[0], int(words[1])
        elif labelled and name:
            what = f"{name[:60]!r} is not `path label`"
            raise ValueError(f"{where}: {what}: write the path, a space and the class number")
        if name:
            label = _number(label, {}, num_classes, where) if labelled else label
            entries.append(Entry(root / name, label))
    if not entries:
        raise ValueError(f"{path}: the list is empty: write one `path label` a line")
    return entries


def read_image_folder(root: Path) -> list[Entry]:
    """List pictures in the ImageNet layout root/<class>/<picture>, sorted.

    Raises ValueError for a folder that is missing or has no pictures.
    """
    root = Path(root)
    found: Iterable[os.DirEntry[str]] = os.scandir(root) if root.is_dir() else ()
    classes = sorted(f.name for f in found if f.is_dir() and not f.name.startswith("."))
    entries = [
        Entry(root / name / picture, label)
        for label, name in enumerate(classes)
        for picture in sorted(os.listdir(root / name))
        if picture.lower().endswith(PICTURES)
    ]
    if not entries:
        raise ValueError(f"{root}: no pictures found: lay them out as {root}/<class>/<name>.jpg")
    return entries


def read_report(path: Path) -> dict[str, Record]:
    """Read a report of ``check_data``: the last record of each path.

    A line cut short by a kill is skipped. Raises ValueError where no line is a record.
    """
    records = {}
    lines = _text(path).splitlines()
    for line in lines:
        with suppress(ValueError, TypeError):
            record = Record(**json.loads(line))
            records[record.path] = record
    if lines and not records:
        raise ValueError(f"{path}: is not a report of check_data: give the file it wrote")
    return records


def leave_out_bad(
    entries: Sequence[Entry], reports: Iterable[str], root: Path
) -> tuple[list[Entry], list[str]]:
    """Leave out the entries that reports of ``check_data`` call bad.

    Also gives a line per report that knows any of the entries: how many are bad or not checked.
    """
    kept, lines = list(entries), []
    for report in reports:
        records = {Path(root) / name: r.ok for name, r in read_report(Path(report)).items()}
        known = [records.get(entry.path) for entry in kept]
        kept = [entry for entry, ok in zip(kept, known, strict=True) if ok is not False]
        if any(ok is not None for ok in known):
            bad = f"{known.count(False)} of {len(known)} entries are bad and left out"
            lines.append(f"{report}: {bad}, {known.count(None)} were not checked")
    if not kept:
        raise ValueError(f"all {len(entries)} entries are bad by --data.checked: check them again")
    return kept, lines


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise ValueError(f"{path}: can't read this list ({reason}); give another") from None


def _json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        what = f"line {error.lineno}: is not valid JSON ({error.msg})"
        raise ValueError(f"{path}, {what}: download it again") from None
