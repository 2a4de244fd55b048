"""Decode every file of a list once: ``python -m bevt_lib.check_data LIST --root DIR``.

LIST is any list that training takes, or a folder of pictures. Each file's result is a line of the
report, ``LIST.checked.jsonl``; interrupted or killed, the same command continues where it stopped.
Training leaves out what ``--data.checked REPORT`` calls bad. Exit status: 0 all good, 1 some bad, 2
nothing could be checked.
"""

import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import Pipe, Process
from multiprocessing.connection import Connection, wait
from pathlib import Path

from tqdm import tqdm

from bevt_lib.cli import parse, run_command
from bevt_lib.datasets.lists import PICTURES, Record, read_entries, read_image_folder, read_report
from bevt_lib.datasets.video import BadFile, Video, read_image

SHOWN = 20  # bad files printed; the report holds all


@dataclass
class Options:
    """What the command line says."""

    list: Path  # a list, or a folder of pictures
    root: Path = Path()  # folder of the list's files
    report: str = ""  # where the results go; empty: LIST.checked.jsonl
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)  # processes
    timeout: float = 60.0  # seconds for one file
    again: bool = False  # check the bad ones again


def main(arguments: list[str]) -> None:
    """Read the command line, check what the report doesn't hold yet, and sum up."""
    given = parse(Options, arguments, "python -m bevt_lib.check_data", __doc__ or "")
    if given.workers < 1 or given.timeout <= 0:
        raise ValueError("--workers is 1 or more, --timeout more than 0 seconds")
    if given.list.is_dir():
        root, entries = given.list, read_image_folder(given.list)
    else:
        root, entries = given.root, read_entries(given.list, given.root, labelled=False)
    paths = {name_under(root, entry.path): entry.path for entry in entries}
    report = Path(given.report or given.list.with_name(f"{given.list.name}.checked.jsonl"))
    records = read_report(report) if report.exists() else {}
    left = [n for n in paths if n not in records or (given.again and not records[n].ok)]
    done = len(paths) - len(left)
    try:
        with open_report(report) as file, tqdm(total=len(paths), initial=done, unit="file") as bar:
            for record in check({n: paths[n] for n in left}, given.workers, given.timeout):
                file.write(json.dumps(record._asdict()) + "\n")
                file.flush()
                records[record.path] = record
                bar.update()
    except KeyboardInterrupt:
        print(f"interrupted: the same command goes on; {report}", file=sys.stderr)
        raise SystemExit(130) from None
    found = [records[name] for name in paths]
    print(sum_up(found))
    print(f"report: {report}; training leaves the bad ones out with --data.checked {report}")
    raise SystemExit(int(not all(record.ok for record in found)))


def name_under(root: Path, path: Path) -> str:
    """Give the name a report calls a file by: its path under ``root``, else the whole path."""
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def open_report(path: Path):
    """Open a report to append to; first end a line that a kill cut short."""
    file = path.open("a+b")
    if file.tell():
        file.seek(-1, os.SEEK_END)
        file.write(b"" if file.read() == b"\n" else b"\n")
    file.close()
    return path.open("a", encoding="utf-8")


def sum_up(records: Sequence[Record]) -> str:
    """Describe what was found: how many of each kind, the bad files, how many lack frames."""
    bad = [record for record in records if not record.ok]
    kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(r.kind for r in bad).most_common())
    lines = [f"{len(records)} files: {len(records) - len(bad)} good, {len(bad)} bad ({kinds})"]
    if not bad:
        lines = [f"{len(records)} files, all good"]
    lines += [f"  {record.path}: {record.kind}: {record.reason}" for record in bad[:SHOWN]]
    if len(bad) > SHOWN:
        lines.append(f"  and {len(bad) - SHOWN} more in the report")
    shortened = sum(record.ok and bool(record.reason) for record in records)
    if shortened:
        lines.append(f"{shortened} of the good ones hold fewer frames than they should (see there)")
    return "\n".join(lines)


def check_file(name: str, path: Path) -> Record:
    """Decode a video or picture once and report on it."""
    try:
        if path.suffix.lower() in PICTURES:
            return Record(name, True, len(read_image(path)))
        video = Video(path)
        frames = video.count()
        video.frames([0])  # to RGB
    except BadFile as error:
        reason, kind = str(error).removeprefix(f"{path}: "), error.kind
        if kind == "undecodable" and ends_early(path):
            reason, kind = f"the file ends early; {reason}", "truncated"
        return Record(name, False, 0, kind, reason)
    except Exception as error:  # whatever a strange file causes, the check continues
        return Record(name, False, 0, "undecodable", repr(error))
    lacking = video.promised - frames
    return Record(name, True, frames, "", f"lacks {lacking} frames" if lacking > 0 else "")


def ends_early(path: Path) -> bool:
    """Say whether a file is empty, or an mp4 that ends within one of its boxes."""
    at, size = 0, path.stat().st_size
    with path.open("rb") as file:
        while at < size:
            file.seek(at)
            head = file.read(16)
            if not at and head[4:8] != b"ftyp":
                return False
            length = int.from_bytes(head[:4], "big")
            if length == 1:  # the length follows in 64 bits
                length = int.from_bytes(head[8:], "big")
            at = at + length if length >= 8 else size  # 0: up to the end
    return at > size or size == 0


def check(paths: dict[str, Path], workers: int, timeout: float) -> Iterator[Record]:
    """Check files in ``workers`` processes; give each record as it comes.

    A process that crashes, or takes longer than ``timeout`` seconds for a file, costs only that
    file: it is reported, and a new process continues.
    """
    left = iter(paths.items())
    crew = [Worker(timeout) for _ in range(min(workers, len(paths)))]
    try:
        for worker, (name, path) in zip(crew, left, strict=False):
            worker.give(name, path)
        while any(worker.name for worker in crew):
            busy = [worker for worker in crew if worker.name]
            until = min(worker.deadline for worker in busy) - time.monotonic()
            wait([worker.pipe for worker in busy], timeout=max(until, 0))
            for worker in busy:
                record = worker.take()
                if record is None:
                    continue
                if record.kind in ("hanging", "crashing"):
                    worker.end()
                    crew[crew.index(worker)] = worker = Worker(timeout)
                yield record
                worker.give(*next(left, ("", Path())))
    finally:
        for worker in crew:
            worker.end()


class Worker:
    """A process that checks one file after another. ``name`` is the file's, "" when idle."""

    def __init__(self, timeout: float):
        self.timeout, self.name, self.deadline = timeout, "", 0.0
        self.pipe, other = Pipe()
        self.process = Process(target=serve, args=(other, self.pipe, timeout), daemon=True)
        self.process.start()
        other.close()  # and self.pipe there, so that each end notices when the other process ends

    def give(self, name: str, path: Path) -> None:
        """Hand over a file; "": none."""
        self.name, self.deadline = name, time.monotonic() + self.timeout
        if name:
            self.pipe.send((name, path))

    def take(self) -> Record | None:
        """Give the record of the current file, or None while it still has time."""
        try:
            if self.pipe.poll():
                return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode or 0
            name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            return Record(self.name, False, 0, "crashing", f"the decoder crashes ({name})")
        if time.monotonic() < self.deadline:
            return None
        return Record(self.name, False, 0, "hanging", f"not decoded after {self.timeout:g} s")

    def end(self) -> None:
        """Kill the process, whatever it is doing."""
        self.process.kill()
        self.process.join(1)  # unless even the kernel waits for a file
        self.pipe.close()


def serve(pipe: Connection, parents: Connection, timeout: float) -> None:
    """Check the files that come through a pipe until it closes."""
    parents.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    while True:
        if hasattr(signal, "alarm"):  # ends a hanging decoder whose parent was killed
            signal.alarm(0)
        try:
            name, path = pipe.recv()
        except (EOFError, OSError):
            return
        if hasattr(signal, "alarm"):
            signal.alarm(int(2 * timeout) + 1)
        pipe.send(check_file(name, path))


if __name__ == "__main__":
    run_command(main)
