"""The journal: nothing that was written is lost, and what could not be written is counted."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys

import pytest
from google.protobuf import json_format

from gradwatch.agent.probe import spool
from gradwatch.agent.probe.journal import PROGRESS_BYTES, Journal, json_safe
from gradwatch.protos.v1 import gradwatch_pb2 as pb

INCARNATION = "0" * 32


def open_journal(folder, **limits):
    return Journal(folder, spool.rank_journal_name(3, INCARNATION), **limits)


def lines(folder):
    return [line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


def test_every_line_is_the_protobuf_json_mapping_of_a_record(tmp_path):
    journal = open_journal(tmp_path)
    journal.append("hello", {"incarnation": INCARNATION, "rank": 3, "world_size": 8, "job": "j"})
    journal.append(
        "nonfinite", {"round": 5, "gradients": [{"parameter": "w", "value": "VALUE_NAN", "count": 2}]}
    )
    first, second = (json_format.Parse(line, pb.Record()) for line in lines(tmp_path))
    assert (first.seq, second.seq) == (0, 1)
    assert first.hello.rank == 3
    assert second.nonfinite.gradients[0].value == pb.VALUE_NAN
    assert not second.nonfinite.gradients[0].HasField("backward_position")


def test_non_finite_numbers_are_written_as_the_mapping_has_them():
    assert json_safe({"a": [float("inf"), -float("inf"), 1.5]}) == {"a": ["Infinity", "-Infinity", 1.5]}
    assert json_safe(float("nan")) == "NaN"


def test_segments_rotate_and_are_read_in_order(tmp_path):
    journal = open_journal(tmp_path, segment_bytes=300)
    for number in range(20):
        journal.append("fault", {"part": "p", "error": str(number)})
    names = [spool.parse_segment(path.name) for path in sorted(tmp_path.glob("*.jsonl"))]
    assert [name.index for name in names] == list(range(len(names)))
    assert len(names) > 3
    assert [json.loads(line)["seq"] for line in lines(tmp_path)] == list(range(20))


def test_a_journal_that_nobody_collects_stays_bounded_and_goes_on_once_collected(tmp_path):
    journal = open_journal(tmp_path, segment_bytes=300, total_bytes=1500)
    for _ in range(100):
        journal.append("fault", {"part": "p", "error": "e"})
    size = sum(path.stat().st_size for path in tmp_path.glob("*.jsonl"))
    assert size <= 1500 + 300
    assert journal.dropped["journal_full"] == 100 - journal.records
    written = journal.records
    (tmp_path / spool.Segment(journal.name, INCARNATION, 0).filename).unlink()
    assert journal.append("fault", {"part": "p", "error": "e"})
    assert journal.records == written + 1


def test_a_forked_child_never_writes(tmp_path):
    journal = open_journal(tmp_path)
    child = os.fork()
    if child == 0:
        journal.append("fault", {"part": "child", "error": ""})
        journal.progress({"round": 99})
        journal.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert lines(tmp_path) == []
    assert spool_is_held(tmp_path, journal.name)


def spool_is_held(folder, name):
    """Ask from another process: this one would let go of its own lock."""
    code = (
        "import sys, pathlib; from gradwatch.agent.probe import spool;"
        "sys.exit(0 if spool.is_locked(pathlib.Path(sys.argv[1])) else 1)"
    )
    path = str(folder / spool.progress_filename(name))
    return subprocess.run([sys.executable, "-c", code, path], check=False).returncode == 0


def test_the_lock_tells_whether_the_process_lives(tmp_path):
    journal = open_journal(tmp_path)
    assert spool_is_held(tmp_path, journal.name)
    journal.close()
    assert not spool_is_held(tmp_path, journal.name)


def test_the_progress_file_has_a_fixed_size_and_the_newest_content(tmp_path):
    journal = open_journal(tmp_path)
    journal.progress({"round": 10**15, "probe_seconds": float("inf")})
    journal.progress({"round": 2})
    content = (tmp_path / spool.progress_filename(journal.name)).read_bytes()
    assert len(content) == PROGRESS_BYTES
    assert json.loads(content) == {"round": 2}


@pytest.fixture
def file_size_limit():
    """A real limit of the kernel: writes beyond it are cut short, then fail."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def whole(line):
    """The record of a line; None if it was cut short."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def test_a_write_cut_short_loses_one_line_and_no_other(tmp_path, file_size_limit):
    journal = open_journal(tmp_path)
    assert journal.append("fault", {"part": "before", "error": ""})
    file_size_limit(PROGRESS_BYTES)
    assert not journal.append("fault", {"part": "torn", "error": "x" * 3000})
    assert not journal.append("fault", {"part": "lost", "error": ""})
    assert sum(journal.dropped.values()) == 2
    file_size_limit(resource.RLIM_INFINITY)
    assert journal.append("fault", {"part": "after", "error": ""})
    good = [record for line in lines(tmp_path) if (record := whole(line)) is not None]
    assert [(record["seq"], record["fault"]["part"]) for record in good] == [(0, "before"), (1, "after")]


def test_a_write_that_lacks_only_its_newline_is_a_record(tmp_path, file_size_limit, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1.5)
    journal = open_journal(tmp_path)
    body = {"part": "cut", "error": "x" * PROGRESS_BYTES}
    whole_line = json.dumps({"seq": 0, "at": 1.5, "fault": body}, separators=(",", ":"))
    file_size_limit(len(whole_line))
    assert journal.append("fault", body)
    file_size_limit(resource.RLIM_INFINITY)
    assert journal.append("fault", {"part": "after", "error": ""})
    assert [json.loads(line)["seq"] for line in lines(tmp_path)] == [0, 1]
    assert journal.dropped == {}


def test_a_spool_that_cannot_be_written_is_an_error_at_opening(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        open_journal(tmp_path / "absent")
