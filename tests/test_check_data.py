"""The check of a data set: what it says of bad files, and that nothing stops it for good."""

import ctypes
import faulthandler
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from test_cli import run

from bevt_lib import check_data
from bevt_lib.datasets.lists import Record, read_report
from bevt_lib.datasets.video import write_video

FRAMES = 40


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """A small film with its index at the front, so that a cut one still opens."""
    folder = tmp_path_factory.mktemp("film")
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (FRAMES, 8, 12, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    write_video(folder / "plain.mp4", frames)
    with (
        av.open(str(folder / "plain.mp4")) as source,
        av.open(str(folder / "fast.mp4"), "w", options={"movflags": "faststart"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    return folder


def end_of_packet(path, number):
    """How many bytes of a file hold its first packets."""
    with av.open(str(path)) as container:
        return sorted(p.pos + p.size for p in container.demux(video=0) if p.size)[number - 1]


def write_list(folder, names):
    (folder / "list.txt").write_text("".join(f"{name} 0\n" for name in names))
    return folder / "list.txt"


def check(listed, *options):
    """Check in this process; return the exit status."""
    with pytest.raises(SystemExit) as end:
        check_data.main([str(listed), "--root", str(listed.parent), "--workers", "1", *options])
    return end.value.code


def test_every_kind_of_bad_file_is_told_with_its_reason(tmp_path, film):
    plain, fast = ((film / name).read_bytes() for name in ("plain.mp4", "fast.mp4"))
    (tmp_path / "sub").mkdir()
    files = {
        "sub/good one.mp4": plain, "fast.mp4": fast, "half.mp4": fast[: len(fast) // 2],
        "most.mp4": fast[: end_of_packet(film / "fast.mp4", 36)],
        "no index.mp4": plain[: len(plain) // 2],
        "empty.mp4": b"", "page.mp4": b"<html>not found</html>",
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    Image.new("RGB", (64, 48)).save(tmp_path / "a.jpg")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "b.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:3000])
    listed = write_list(tmp_path, [*files, "gone.mp4", "a.jpg", "b.png"])
    result = run("bevt_lib.check_data", str(listed), "--root", str(tmp_path), "--workers", "2")
    assert result.returncode == 1
    report = Path(f"{listed}.checked.jsonl")
    records = read_report(report)
    kinds = {name: record.kind for name, record in records.items() if not record.ok}
    assert kinds == {
        "half.mp4": "truncated", "no index.mp4": "truncated", "empty.mp4": "truncated",
        "page.mp4": "undecodable", "gone.mp4": "missing", "b.png": "truncated",
    }  # fmt: skip
    assert records["sub/good one.mp4"] == Record("sub/good one.mp4", True, FRAMES)
    assert records["a.jpg"] == Record("a.jpg", True, 1)
    most = records["most.mp4"]
    assert (
        most.ok and most.frames < FRAMES and most.reason == f"lacks {FRAMES - most.frames} frames"
    )
    assert "10 files: 4 good, 6 bad (4 truncated, 1" in result.stdout
    assert "gone.mp4: missing: no such video file" in result.stdout
    assert "1 of the good ones hold fewer frames" in result.stdout
    assert "10/10" in result.stderr and "Traceback" not in result.stderr
    assert len(report.read_text().splitlines()) == 10


def test_status_is_0_where_all_are_good_and_2_where_nothing_can_be_checked(tmp_path, film, capsys):
    (tmp_path / "a.mp4").write_bytes((film / "plain.mp4").read_bytes())
    listed = write_list(tmp_path, ["a.mp4"])
    for _ in range(2):  # the second time nothing is left to do
        assert check(listed) == 0
        assert "1 files, all good" in capsys.readouterr().out
    for words, message in (
        ([str(tmp_path / "no.txt")], r"no\.txt: can't read this list"),
        ([str(listed), "--workers", "0"], "--workers is 1 or more"),
        ([str(listed), "--timeout", "soon"], "timeout.*soon"),
        ([str(listed), "--report", str(listed)], "is not a report of check_data"),
        ([str(listed), "--report", str(tmp_path / "no" / "r.jsonl")], "No such file"),
    ):
        with pytest.raises((ValueError, OSError), match=message):  # the command's status 2
            check_data.main(words)
    assert run("bevt_lib.check_data", str(tmp_path / "no.txt")).returncode == 2


def test_bad_files_are_looked_at_again_where_asked(tmp_path, film):
    (tmp_path / "a.mp4").write_bytes(b"")
    listed = write_list(tmp_path, ["a.mp4"])
    assert check(listed) == 1
    (tmp_path / "a.mp4").write_bytes((film / "plain.mp4").read_bytes())
    assert check(listed) == 1  # as the report has it
    assert check(listed, "--again") == 0
    assert check(listed) == 0


forked = pytest.mark.skipif(
    multiprocessing.get_start_method() != "fork", reason="the stand-in must reach the processes"
)


@forked
@pytest.mark.parametrize("workers", [1, 3])
def test_crashing_and_hanging_decoders_cost_their_file_alone(tmp_path, monkeypatch, workers):
    def pretend(name, path):
        if "segfault" in name:
            faulthandler.disable()  # pytest's would write a traceback
            ctypes.string_at(0)
        if "exit" in name:
            os._exit(3)
        if "hang" in name:
            time.sleep(60)
        return Record(name, True, 7)

    monkeypatch.setattr(check_data, "check_file", pretend)
    names = ["a", "segfault 1", "b", "hang 1", "c", "exit", "d", "hang 2", "segfault 2", "e"]
    began = time.monotonic()
    found = list(check_data.check({n: tmp_path / n for n in names}, workers, 1.0))
    assert time.monotonic() - began < 20
    assert sorted(record.path for record in found) == sorted(names)
    for record in found:
        kind = {"s": "crashing", "h": "hanging"}.get(record.path[0], "")
        kind = "crashing" if record.path == "exit" else kind
        assert (record.kind, record.ok) == (kind, not kind)
    reasons = {record.path: record.reason for record in found}
    assert "SIGSEGV" in reasons["segfault 1"] and "exit status 3" in reasons["exit"]
    assert "1 s" in reasons["hang 2"]
    assert not multiprocessing.active_children()


@pytest.fixture
def many(tmp_path, film):
    """A list of 400 films: hard links."""
    (tmp_path / "0.mp4").write_bytes((film / "plain.mp4").read_bytes())
    for number in range(1, 400):
        os.link(tmp_path / "0.mp4", tmp_path / f"{number}.mp4")
    return write_list(tmp_path, [f"{n}.mp4" for n in range(400)])


def heed_ctrl_c():
    """Tests that a shell started in the background ignore it, and so would their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT], ids=lambda s: s.name)
def test_a_check_goes_on_where_it_was_stopped(many, end):
    report = Path(f"{many}.checked.jsonl")
    command = [sys.executable, "-m", "bevt_lib.check_data", str(many), "--root",
               str(many.parent), "--workers", "2"]  # fmt: skip
    stops = 0
    for target in (20, 120):  # lines in the report at which it is stopped
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True, preexec_fn=heed_ctrl_c,
        ) as process:  # fmt: skip
            while process.poll() is None:
                if report.exists() and report.read_bytes().count(b"\n") >= target:
                    process.send_signal(end)
                    break
                time.sleep(0.002)
            process.wait(30)
            if end == signal.SIGINT and process.returncode == 130:
                assert "interrupted: the same command goes on" in process.stderr.read()
            stops += process.returncode in (-signal.SIGKILL, 130)
            for _ in range(100):  # its processes end, too
                try:
                    os.killpg(process.pid, 0)
                except ProcessLookupError:
                    break
                time.sleep(0.1)
            else:
                pytest.fail("a process is left behind")
        before = report.read_bytes()
        if target == 20 and end == signal.SIGKILL:  # a record cut in its middle
            report.write_bytes(before[:-7])
    assert stops == 2
    assert check(many) == 0
    assert report.read_bytes().startswith(before)  # only appended to
    whole = []
    for line in report.read_text().splitlines():
        try:
            whole.append(json.loads(line)["path"])
        except ValueError:
            continue
    assert len(whole) == len(set(whole)) == 400  # each was decoded once
