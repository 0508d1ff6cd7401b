"""`gradwatch top`: what its screen says, and the live one on a real terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import sys
import time

import pytest
from rich.console import Console

from gradwatch.cli.top.screen import screen
from tests.cli.command import gradwatch, start, until
from tests.cli.test_reading import state_dir, write_job  # noqa: F401 - a fixture

JOB = {
    "job": "llm-7b",
    "status": "running",
    "halted": None,
    "generation": 1,
    "step": 1841,
    "slowest_step": 1839,
    "world_size": 3,
    "ranks_watched": 3,
    "overhead": {"ratio": 0.011},
    "last_good_checkpoint": {"path": "/c/1800", "step": 1800},
    "warnings": ["one", "two", "three"],
    "incidents": [
        {
            "id": f"id{number}",
            "status": "closed",
            "cause": "input",
            "step": number,
            "verdict": [f"told {number}"],
        }
        for number in range(5)
    ]
    + [{"id": "open", "status": "confirmed", "cause": None, "step": 1840, "verdict": ["Rank 2 was first."]}],
    "incidents_left_out": 10,
}


def row(rank, states, magnitudes=(), last_rank=None):
    return {
        "rank": rank,
        "last_rank": rank if last_rank is None else last_rank,
        "node": f"gpu-{rank}",
        "states": states,
        "magnitudes": list(magnitudes),
    }


PICTURE = {
    "segments": [{"first_step": 0, "last_step": 1500}, {"first_step": 1200, "last_step": 1841}],
    "ranks": [
        row(0, "cccc", [None, 0.0]),
        row(1, "cccb", [1.0]),
        row(2, "ccbs", [-300.0, -2.0]),
        row(3, "cc.."),
    ],
}


def shown(job=JOB, picture=PICTURE, width=120, height=60):
    console = Console(file=io.StringIO(), width=width, height=height)
    console.print(screen(job, picture, width, height))
    return console.file.getvalue()


def test_the_screen_says_how_the_job_is_and_what_went_wrong():
    text = shown()
    assert "llm-7b   running   step 1,841, slowest 1,839   3 of 3 ranks watched" in text
    assert "good checkpoint at step 1,800" in text
    assert "! two" in text
    assert "! one" not in text, "the newest are enough"
    newest, older = text.index("Rank 2 was first."), text.index("told 4")
    assert newest < older
    assert "and 13 older" in text


def test_the_rank_that_was_bad_first_comes_first():
    lines = [line.split() for line in shown().splitlines() if "gpu-" in line]
    assert [line[0] for line in lines] == ["2", "1", "0", "3"]
    assert lines[0][1:] == ["gpu-2", "1.0e-02", "--#s"]
    assert lines[1][1:] == ["gpu-1", "not", "finite", "---#"]
    assert lines[2][1:] == ["gpu-0", "1.0e+00", "----"]


def test_a_narrow_screen_shows_the_worst_of_what_shares_a_column():
    states = "c" * 500 + "b" + "c" * 500
    text = shown(picture={**PICTURE, "ranks": [row(0, states, last_rank=7)]}, width=80)
    (line,) = [line for line in text.splitlines() if "gpu-0" in line]
    assert line.count("#") == 1
    assert line.startswith("0-7")
    assert len(line.rstrip()) <= 80


def test_more_ranks_than_lines():
    ranks = [row(rank, "cccc") for rank in range(1024)]
    text = shown(picture={**PICTURE, "ranks": ranks}, height=30)
    assert len(text.splitlines()) <= 30
    assert "more" in text


def test_nothing_is_known_yet():
    job = JOB | {
        "step": None,
        "slowest_step": None,
        "world_size": None,
        "overhead": {"ratio": None},
        "incidents": [],
        "incidents_left_out": 0,
        "last_good_checkpoint": None,
    }
    text = shown(job, {"segments": [], "ranks": []})
    assert "3 of ? ranks watched" in text
    assert "no incident" in text
    assert "no step yet" in text


def test_a_folder_is_looked_at_once(state_dir):  # noqa: F811 - the fixture
    told = gradwatch("top", "job", "--state-dir", state_dir)
    assert told.returncode == 0
    assert "Rank 1 on node n1 was first" in told.stdout
    assert "not finite" in told.stdout or "#" in told.stdout
    document = json.loads(gradwatch("top", "job", "--json", "--state-dir", state_dir).stdout)
    assert document["job"]["job"] == document["picture"]["job"] == "job"
    unknown = gradwatch("top", "nope", "--state-dir", state_dir)
    assert unknown.returncode != 0
    assert "gradwatch jobs" in unknown.stderr


@pytest.fixture
def live(tmp_path):
    """A collector that knows a job; gives its process and its state folder."""
    own = tmp_path / "spool" / "mine"
    own.mkdir(parents=True)
    write_job(own)
    collector = start("collector", "--state-dir", tmp_path, "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0")
    try:
        until((tmp_path / "collector.json").exists)
        assert gradwatch("sidecar", "--spool", own, "--state-dir", tmp_path, "--drain").returncode == 0
        url = json.loads((tmp_path / "collector.json").read_text())["http"]
        yield collector, url
    finally:
        if collector.poll() is None:
            collector.terminate()
        collector.communicate(timeout=30)


def test_a_terminal_is_kept_up_to_date_says_when_nobody_answers_and_ends_with_ctrl_c(live):
    collector, url = live
    pid, terminal = pty.fork()
    if pid == 0:
        command = [sys.executable, "-m", "gradwatch.cli", "top", "job", "--url", url, "--interval", "0.2"]
        os.execve(sys.executable, command, os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "40"})
    told = b""

    def read_until(word: bytes) -> None:
        nonlocal told
        deadline = time.monotonic() + 60
        while word not in told:
            assert time.monotonic() < deadline, told[-2000:]
            told += os.read(terminal, 65536)

    read_until(b"was first")
    collector.terminate()
    told = b""
    read_until(b"trying again")
    os.kill(pid, signal.SIGINT)
    while True:
        try:
            if not os.read(terminal, 65536):
                break
        except OSError:
            break
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
