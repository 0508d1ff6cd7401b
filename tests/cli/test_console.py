"""stderr that nobody reads: the launcher does not wait for it."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import subprocess
import sys
import textwrap

import pytest

from gradwatch.cli import output
from gradwatch.cli.launcher.console import Console
from tests.cli.command import GRADWATCH, environment, until


@pytest.fixture
def pipe():
    """Both ends of a small pipe."""
    ends = os.pipe()
    fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, 2 * select.PIPE_BUF)
    yield ends
    for end in ends:
        os.close(end)


def fill(writing_end: int) -> int:
    """Write until there is no more room; how much that was."""
    poll = select.poll()
    poll.register(writing_end, select.POLLOUT)
    written = 0
    while poll.poll(0):
        written += os.write(writing_end, b"x" * select.PIPE_BUF)
    return written


def is_readable(reading_end: int) -> bool:
    poll = select.poll()
    poll.register(reading_end, select.POLLIN)
    return bool(poll.poll(0))


@pytest.fixture
def new_console(pipe, monkeypatch):
    """Makes one on the pipe. To be called in the test itself: pytest takes stderr at its beginning."""
    with os.fdopen(os.dup(pipe[1]), "w") as stderr:

        def new() -> Console:
            monkeypatch.setattr(sys, "stderr", stderr)
            return Console(quiet=False)

        yield new


def test_lines_wait_for_a_reader_and_come_whole_and_in_order(pipe, new_console):
    console = new_console()
    filled = fill(pipe[1])
    console.warn("first")
    console.note("second " + "long " * select.PIPE_BUF)
    console.verdict("third")
    read = os.read(pipe[0], filled)
    assert read == b"x" * filled
    text = b""
    while not text.endswith(b"third\n"):
        console.flush()
        assert is_readable(pipe[0])
        text += os.read(pipe[0], 1 << 16)
    lines = text.decode().splitlines()
    assert [line.split()[0] for line in lines] == ["gradwatch:"] * 3
    assert lines[0] == "gradwatch: WARNING: first"
    assert lines[1].endswith("long ")
    assert lines[1].count("long") == select.PIPE_BUF
    assert console.warnings == ["first"]


# A terminal obeys ends of lines, control characters and bidi marks; all else in a name is the user's own.
NAMES = [
    ("a\ngradwatch: incident forged", r"a\ngradwatch: incident forged"),
    ("\x1b[2Jb\r", r"\x1b[2Jb\r"),
    ("c\u202ed\u2028", r"c\u202ed\u2028"),
    ('слой é 🔥 "x"', 'слой é 🔥 "x"'),
]


@pytest.mark.parametrize(("name", "shown"), NAMES)
def test_no_name_begins_a_line_of_its_own(pipe, new_console, name, shown):
    console = new_console()
    console.verdict(f"log in {name}, step 3")
    console.warn(name)
    os.set_blocking(pipe[0], False)
    said = os.read(pipe[0], 1 << 16).decode()
    assert said == f"gradwatch: log in {shown}, step 3\ngradwatch: WARNING: {shown}\n"


@pytest.mark.parametrize(("name", "shown"), NAMES)
def test_no_name_begins_a_line_in_what_is_read(capsys, name, shown):
    output.print_line(f"  log in {name}")
    output.print_table(["parameter"], [[name]])
    lines = capsys.readouterr().out.split("\n")
    assert lines[0] == f"  log in {shown}"
    assert [line.rstrip() for line in lines[1:]] == ["parameter", shown, ""]


def test_what_nobody_will_ever_read_is_given_up(pipe, new_console):
    console = new_console()
    fill(pipe[1])
    console.note("lost")
    console.last_words()
    os.set_blocking(pipe[0], False)
    assert b"lost" not in os.read(pipe[0], 1 << 16)


def test_a_run_whose_stderr_is_not_read_still_passes_signals_on(pipe, tmp_path):
    """As under a supervisor that reads a pipe only at the end, or a terminal that is stopped."""
    fill(pipe[1])
    code = """
        import pathlib, signal, sys, time
        said = pathlib.Path(sys.argv[1])
        signal.signal(signal.SIGTERM, lambda *_: (said.write_text("ended"), sys.exit(7)))
        said.write_text("up")
        time.sleep(600)
    """
    said = tmp_path / "said"
    command = [sys.executable, "-c", textwrap.dedent(code), str(said)]
    process = subprocess.Popen(
        [*GRADWATCH, "run", "--state-dir", str(tmp_path / "state"), "--", *command],
        stderr=pipe[1],
        env=environment(),
    )
    try:
        until(lambda: said.exists() and said.read_text() == "up")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 7
        assert said.read_text() == "ended"
    finally:
        process.kill()
        process.wait()
