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
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe, Process, active_children
from multiprocessing.connection import Connection
from multiprocessing.pool import ThreadPool
from pathlib import Path
from threading import Lock

from tqdm import tqdm

from bevt_lib.cli import parse, run_command
from bevt_lib.datasets import lists
from bevt_lib.datasets.lists import Record
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
    # What is there to check, and what the report already holds of it
    if given.list.is_dir():
        root, entries = given.list, lists.read_image_folder(given.list)
    else:
        root, entries = given.root, lists.read_entries(given.list, given.root, labelled=False)
    # A report calls a file by its path under the root, else by the whole path.
    paths = {(p.relative_to(root) if p.is_relative_to(root) else p).as_posix(): p
             for p, _ in entries}  # fmt: skip
    report = Path(given.report or f"{given.list}.checked.jsonl")
    text = report.read_bytes() if report.exists() else b""
    records = lists.read_report(report) if text else {}
    kept = {name for name, record in records.items() if record.ok or not given.again}
    left = {name: path for name, path in paths.items() if name not in kept}
    # Check the rest; each result is in the file before the next one comes
    try:
        with (
            report.open("a", buffering=1, encoding="utf-8") as file,
            tqdm(total=len(paths), initial=len(paths) - len(left), unit="file") as bar,
        ):
            if text and not text.endswith(b"\n"):
                file.write("\n")  # after a line that a kill cut short
            for record in check(left, given.workers, given.timeout):
                file.write(json.dumps(record._asdict()) + "\n")
                records[record.path] = record
                bar.update()
    except KeyboardInterrupt:
        print(f"interrupted: the same command goes on; {report}", file=sys.stderr)
        raise SystemExit(130) from None
    found = [records[name] for name in paths]
    print(sum_up(found))
    print(f"report: {report}; training leaves the bad ones out with --data.checked {report}")
    raise SystemExit(int(not all(record.ok for record in found)))


def sum_up(records: Sequence[Record]) -> str:
    """Describe what was found: how many of each kind, the bad files, how many lack frames."""
    bad = [record for record in records if not record.ok]
    kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(r.kind for r in bad).most_common())
    counts = f": {len(records) - len(bad)} good, {len(bad)} bad ({kinds})" if bad else ", all good"
    lines = [f"{len(records)} files{counts}"]
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
        if path.suffix.lower() in lists.PICTURES:
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
    idle: list[tuple[Process, Connection]] = []
    lock = Lock()  # a process forked between two lines of another's start would keep its pipe open

    def check_apart(file: tuple[str, Path]) -> Record:
        """Check a file in an idle process, or in a new one; end one that crashes or hangs."""
        with lock:
            process, pipe = idle.pop() if idle else start_process(timeout)
        try:
            pipe.send(file)
            if pipe.poll(timeout):
                record = pipe.recv()
                idle.append((process, pipe))
                return record
            kind, reason = "hanging", f"not decoded after {timeout:g} s"
        except (EOFError, OSError):
            with lock:
                process.join()
            code = process.exitcode or 0
            name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            kind, reason = "crashing", f"the decoder crashes ({name})"
        process.kill()
        process.join(1)  # unless even the kernel waits for a file
        return Record(file[0], False, 0, kind, reason)

    try:
        with ThreadPool(workers) as pool:  # a thread waits for each process
            yield from pool.imap_unordered(check_apart, paths.items())
    finally:
        for process in active_children():
            process.kill()
            process.join(1)


def start_process(timeout: float) -> tuple[Process, Connection]:
    """Start a process that checks the files sent through a pipe."""
    pipe, other = Pipe()
    process = Process(target=serve, args=(other, pipe, timeout), daemon=True)
    process.start()
    other.close()  # and pipe there, so that each end notices when the other process ends
    return process, pipe


def serve(pipe: Connection, parents: Connection, timeout: float) -> None:
    """Check the files that come through a pipe until it closes."""
    parents.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    alarm = getattr(signal, "alarm", int)  # Windows has none
    with suppress(EOFError, OSError):  # the pipe's
        while True:
            name, path = pipe.recv()
            alarm(int(2 * timeout) + 1)  # ends a hanging decoder whose parent was killed
            record = check_file(name, path)
            alarm(0)
            pipe.send(record)


if __name__ == "__main__":
    run_command(main)
