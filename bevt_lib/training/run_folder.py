"""What a run writes to its folder and to the screen, and how it is asked to stop.

A kill neither loses nor duplicates records: metrics.jsonl holds a line per step and is cut back to
the step that is resumed.
"""

import contextlib
import dataclasses
import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from bevt_lib.base import config, distributed
from bevt_lib.base.files import replace_file

try:
    import fcntl
except ImportError:  # Windows: no locks there
    fcntl = None  # type: ignore[assignment]

Entry = dict[str, float]
LOCK_TIMEOUT = 60.0  # seconds that a new run waits for another one to leave the folder
ITEMS = "items."  # and a stream's name: the fingerprint of its list in config.json
LINE_EVERY = 30.0  # seconds between two lines in a log file
# Fields that a resumed run may change: where files are, what is tolerated, when it is scored.
MAY_DIFFER = {
    "data.video_list", "data.video_root", "data.image_root", "data.image_list", "data.val_list",
    "data.class_list", "data.checked", "data.bad_share", "data.timeout", "data.workers",
    "data.expected_items", "data.decoder", "data.decoded", "data.embedded", "tokens.weights",
    "perceptual_weights", "default_init",
    "val_epochs", "views_at_once", "test_clips", "test_crops", "watch_every",
}  # fmt: skip
RENAMED = {"model.released": "model.released_quirks"}  # fields of older runs


def check_config(folder: Path, recipe: Mapping[str, Any]) -> None:
    """Make the run's folder, or check that the run in it has this recipe.

    ``recipe`` holds {"section.field": value}. A field that the older run didn't know counts as its
    default, or as unchanged if it has none. Raises ValueError that names the fields that differ.
    """
    written = folder / "config.json"
    mine = json.loads(json.dumps(dict(recipe)))
    try:
        if not written.exists():
            with replace_file(written) as part:
                part.write_text(json.dumps(mine, indent=1))
        found = {RENAMED.get(k, k): v for k, v in json.loads(written.read_text()).items()}
        there = {k: default_value(k, v) for k, v in mine.items()} | found
    except OSError as error:
        raise ValueError(
            f"can't write to the run folder {folder} ({error.strerror}): choose another with "
            "--run.folder"
        ) from None
    other = [k for k in there if matters(k) and mine.get(k) != there[k]]
    if other:
        detail = "; ".join(f"{k}: {there[k]} there, {mine.get(k)} here" for k in other)
        fix = "give that run's lists and --data.checked, or "
        fix *= any(key.startswith(ITEMS) for key in other)
        raise ValueError(
            f"{folder} holds a run of another configuration ({detail}): {fix}choose another "
            "--run.folder or remove it"
        )


def matters(key: str) -> bool:
    """Whether a field changes what is computed; paths, workers and the run's own don't."""
    return key == "run.seed" or not (key.startswith("run.") or key in MAY_DIFFER)


def default_value(key: str, otherwise: Any) -> Any:
    """Give the default of a recipe's field, as in JSON; ``otherwise`` if it has none."""
    section, _, name = key.rpartition(".")
    kind = getattr(config, section.capitalize(), None)
    kinds = [kind] if kind else config.RECIPES
    defaults = {f.name: f.default for kind in kinds for f in dataclasses.fields(kind)}
    value = defaults.get(name, dataclasses.MISSING)
    return otherwise if value is dataclasses.MISSING else json.loads(json.dumps(value))


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder, by a lock on its config.json that ends with the process.

    Raises ValueError if another run is still there after LOCK_TIMEOUT. Without locks (Windows, some
    file systems) nothing is kept out.
    """
    with (folder / "config.json").open("r+") as file:
        deadline = time.monotonic() + LOCK_TIMEOUT
        while fcntl:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    break  # this file system has no locks
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"another run is active in {folder}: wait, or choose another --run.folder"
                    ) from None
            time.sleep(0.1)
        yield


def read_metrics(folder: Path) -> list[Entry]:
    """Read metrics.jsonl up to the first line that isn't whole: a kill may cut the last one."""
    history: list[Entry] = []
    path = folder / "metrics.jsonl"
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            history.append(json.loads(line))
        except ValueError:
            break
    return history


class Metrics:
    """The record of a run: a list on every process, and metrics.jsonl on rank 0 of a folder."""

    def __init__(self, folder: Path | None, history: list[Entry]):
        self.folder, self.history = folder, history
        self.error: OSError | None = None  # met in writing, raised by :meth:`flush`
        self.file: int | None = None

    def open(self) -> None:
        """Write the history, and open the file for more; call on rank 0 only."""
        if self.folder is None:
            return
        path = self.folder / "metrics.jsonl"
        with replace_file(path) as part:
            part.write_text("".join(json.dumps(entry) + "\n" for entry in self.history))
        self.file = os.open(path, os.O_WRONLY | os.O_APPEND)

    def write(self, entry: Entry) -> None:
        """Append a step's line."""
        self.history.append(entry)
        if self.file is None or self.error:
            return
        line = (json.dumps(entry) + "\n").encode()
        try:
            if os.write(self.file, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self.error = error

    def flush(self) -> None:
        """Sync the lines to disk. Raises ValueError if one could not be written."""
        if self.error:
            raise ValueError(
                f"can't write metrics.jsonl ({self.error.strerror}): make room, then run it again"
            )
        if self.file is not None:
            os.fsync(self.file)

    def close(self) -> None:
        """Close the file."""
        if self.file is not None:
            os.close(self.file)


@contextlib.contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Give a function that says whether this process was asked to stop.

    By SIGTERM, or because the torchrun that started it has died: otherwise it would train on beside
    the run that is started in its place.
    """
    seen: list[int] = []
    parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def note(number: int, frame: Any) -> None:
        seen.append(number)
        print("asked to stop: saving after this step", file=sys.stderr)

    def asked() -> bool:
        return bool(seen) or parent not in (None, os.getppid())

    try:
        before = signal.signal(signal.SIGTERM, note)
    except ValueError:  # not in the main thread, which alone gets signals
        yield asked
        return
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def progress(title: str, start: int, stop: int) -> Iterator[Callable[[Entry], None]]:
    """Give a function that shows a step's entry on rank 0, beside speed and remaining time.

    A bar on a terminal or in a notebook; elsewhere, as in a cluster's log file, ``title`` and then
    a line at most every LINE_EVERY seconds.
    """
    notebook = any(kind.__module__ == "tqdm.notebook" for kind in tqdm.__mro__)
    first = distributed.rank() == 0
    live = first and (notebook or sys.stderr.isatty())
    if first and not notebook and start < stop:
        print(title, file=sys.stderr)
    began = last_line = time.monotonic()
    mean: Entry = {}

    def show(entry: Entry) -> None:
        nonlocal last_line
        done = int(entry["step"]) + 1
        share = max(0.05, 1 / (done - start))  # a mean that forgets after some 20 steps
        for key in ("items_per_s", "data_wait"):
            mean[key] = mean.get(key, 0.0) + share * (entry[key] - mean.get(key, 0.0))
        text = (f"loss {entry['loss']:.3f}, lr {entry['lr']:.1e}, {mean['items_per_s']:.1f} "
                f"items/s, {mean['data_wait']:.0%} of it waiting for data")  # fmt: skip
        bar.set_postfix_str(text, refresh=False)
        bar.update()
        now = time.monotonic()
        if first and not live and now - last_line >= LINE_EVERY:
            left = tqdm.format_interval((now - began) / (done - start) * (stop - done))
            print(f"step {done} of {stop}: {text}, {left} left", file=sys.stderr, flush=True)
            last_line = now

    with tqdm(total=stop, initial=start, unit="step", disable=not live, mininterval=1) as bar:
        yield show
