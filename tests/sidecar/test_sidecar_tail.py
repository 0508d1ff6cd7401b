"""Reading journals that others are writing."""

from __future__ import annotations

import pytest

from gradwatch.agent.probe import spool
from gradwatch.agent.sidecar import tail
from gradwatch.agent.sidecar.tail import Position
from tests.sidecar.journals import Writer

NAME = spool.rank_journal_name(3, "ab" * 16)


START = Position(0, 0)


def write(folder, index: int, data: bytes) -> None:
    (folder / spool.Segment(NAME, "", index).filename).write_bytes(data)


def read(folder, start=START, *, ended=False, max_bytes=1 << 20):
    return tail.read_lines(
        folder, NAME, tail.list_journals(folder).get(NAME, []), start, ended=ended, max_bytes=max_bytes
    )


@pytest.mark.parametrize(
    ("segments", "ended", "lines", "position", "malformed"),
    [
        # whole lines are read, and the place behind them is remembered
        ({0: b"a\nb\n"}, False, [b"a", b"b"], (0, 4), 0),
        # a line under way is not read yet
        ({0: b"a\nb"}, False, [b"a"], (0, 2), 0),
        # nor ever, once its writer is gone: it is counted
        ({0: b"a\nb"}, True, [b"a"], (0, 3), 1),
        # a newer segment means that the older one is finished
        ({0: b"a\nb", 1: b"c\n"}, False, [b"a", b"c"], (1, 2), 1),
        # rotation, and an empty newest segment
        ({0: b"a\n", 1: b"b\n", 2: b""}, False, [b"a", b"b"], (2, 0), 0),
        # shipped segments have been deleted
        ({4: b"e\n"}, False, [b"e"], (4, 2), 0),
        # the newline that the writer puts before the line after a torn one leaves no empty record
        ({0: b"a\n\nb\n"}, False, [b"a", b"b"], (0, 5), 0),
        # nothing there yet
        ({0: b""}, False, [], (0, 0), 0),
        # no newline at all, and the writer gone
        ({0: b"torn"}, True, [], (0, 4), 1),
    ],
)
def test_lines_of_segments(tmp_path, segments, ended, lines, position, malformed):
    for index, data in segments.items():
        write(tmp_path, index, data)
    chunk = read(tmp_path, ended=ended)
    assert (chunk.lines, chunk.position, chunk.malformed, chunk.at_end) == (lines, position, malformed, True)


@pytest.mark.parametrize("max_bytes", [1, 2, 3, 7, 1000])
def test_reading_in_pieces_gives_the_same_lines_as_reading_at_once(tmp_path, max_bytes):
    write(tmp_path, 0, b"first\nsecond line\n\nx\n")
    write(tmp_path, 1, b"after the border\nlast\n")
    position, lines, at_end = Position(0, 0), [], False
    for _ in range(50):
        chunk = read(tmp_path, position, max_bytes=max_bytes)
        lines += chunk.lines
        position, at_end = chunk.position, chunk.at_end
        if at_end:
            break
    assert at_end
    assert lines == [b"first", b"second line", b"x", b"after the border", b"last"]


def test_a_line_too_long_for_a_message_is_counted_and_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(tail, "MAX_LINE_BYTES", 100)
    monkeypatch.setattr(tail, "_BLOCK_BYTES", 32)
    write(tmp_path, 0, b"a\n" + b"x" * 500 + b"\nb\n")
    chunk = read(tmp_path, max_bytes=4)
    while not chunk.at_end:
        following = read(tmp_path, chunk.position, max_bytes=4)
        chunk = tail.Chunk(
            chunk.lines + following.lines,
            following.position,
            chunk.malformed + following.malformed,
            following.at_end,
        )
    assert chunk.lines == [b"a", b"b"]
    assert chunk.malformed == 1


def test_a_living_writer_is_told_from_a_killed_one(tmp_path):
    with Writer(tmp_path) as writer:
        writer.progress(7)
        alive = tail.read_liveness(tmp_path, writer.name)
        assert not alive.ended
        assert alive.progress is not None
        writer.kill()
        assert tail.read_liveness(tmp_path, writer.name).ended


def test_a_progress_file_that_is_empty_says_nothing_yet(tmp_path):
    with Writer(tmp_path) as writer:
        assert tail.read_liveness(tmp_path, writer.name).progress is None


def test_a_progress_file_that_never_holds_still_is_not_believed(tmp_path, monkeypatch):
    path = tmp_path / spool.progress_filename(NAME)
    path.write_bytes(b"{}".ljust(1024))
    contents = iter(range(10_000))
    real_open = type(path).open

    def churning(self, *args, **kwargs):
        file = real_open(self, *args, **kwargs)

        class Churn:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

            def seek(self, _):
                return 0

            def read(self, _):
                return b"%d" % next(contents)

        return Churn()

    monkeypatch.setattr(type(path), "open", churning)
    assert tail._read_until_agreed(path) is None


def test_unread_bytes_count_from_the_cursor(tmp_path):
    write(tmp_path, 1, b"12345")
    write(tmp_path, 2, b"123")
    assert tail.unread_bytes(tmp_path, NAME, [0, 1, 2], Position(1, 2)) == 6


def test_only_segments_before_the_cursor_are_deleted(tmp_path):
    for index in range(3):
        write(tmp_path, index, b"x\n")
    tail.delete_shipped(tmp_path, NAME, [0, 1, 2], Position(2, 0))
    assert [path.name for path in tmp_path.iterdir()] == [spool.Segment(NAME, "", 2).filename]
