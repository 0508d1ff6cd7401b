"""Reading journals that others are still writing.

Nothing here keeps state: a position goes in, lines and the next position come out.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

from gradwatch.agent.probe import journal, spool

if TYPE_CHECKING:
    import io
    from collections.abc import Sequence
    from pathlib import Path

# A line longer than this would not fit a gRPC message (4 MiB) either.
MAX_LINE_BYTES = 8 << 20
_AGREEMENT_TRIES = 8
_BLOCK_BYTES = 1 << 20


class Position(NamedTuple):
    """Where in a journal reading goes on."""

    segment: int
    offset: int


@dataclasses.dataclass(frozen=True)
class Chunk:
    """What was read of a journal.

    Attributes:
        lines: whole lines without their newline, empty ones left out.
        position: where to go on.
        malformed: lines that no one can read: cut off by a full disk or a crash, or too long.
        at_end: nothing more was there to read.
    """

    lines: list[bytes]
    position: Position
    malformed: int
    at_end: bool


@dataclasses.dataclass(frozen=True)
class Liveness:
    """What a journal's progress file says.

    Attributes:
        ended: the writing process is gone.
        progress: the file's content; None when there is none yet, or none that holds still.
    """

    ended: bool
    progress: bytes | None


def list_journals(folder: Path) -> dict[str, list[int]]:
    """Find the journals of a spool: name -> indices of its segments, rising.

    Raises:
        OSError: the folder cannot be read, or is gone.
    """
    journals: dict[str, list[int]] = {}
    for path in folder.iterdir():
        segment = spool.parse_segment(path.name)
        if segment is not None:
            journals.setdefault(segment.name, []).append(segment.index)
    return {name: sorted(indices) for name, indices in sorted(journals.items())}


def incarnation_of(name: str) -> str:
    """The incarnation in a journal's name."""
    return name.rpartition("-")[2]


def list_launches(folder: Path) -> list[str]:
    """The launches that have begun a journal in a spool.

    Raises:
        OSError: the folder cannot be read, or is gone.
    """
    prefix = spool.launch_journal_name("")
    return [incarnation_of(name) for name in list_journals(folder) if name.startswith(prefix)]


def read_liveness(folder: Path, name: str) -> Liveness:
    """Read the progress file, and whether its process lives.

    The order matters: what a process wrote before it was found dead is all it will ever
    write, so `ended` is looked at first, and the journal (by the caller) last.

    Raises:
        OSError: the progress file cannot be opened.
    """
    path = folder / spool.progress_filename(name)
    ended = not spool.is_locked(path)
    return Liveness(ended, _read_until_agreed(path))


def read_lines(
    folder: Path, name: str, segments: Sequence[int], start: Position, *, ended: bool, max_bytes: int
) -> Chunk:
    """Read whole lines from `start`, over segment borders.

    Args:
        folder: the spool.
        name: the journal.
        segments: indices of its segments, listed after `ended` was found out.
        start: from an earlier chunk.
        ended: the writer is gone, so a last line without newline will never get one.
        max_bytes: stop after about this many; one longer line is still read whole.

    Raises:
        OSError: a segment is there and cannot be read.
    """
    lines: list[bytes] = []
    malformed = 0
    position = start
    budget = max_bytes
    while True:
        following = next((index for index in segments if index > position.segment), None)
        if position.segment in segments:
            if budget <= 0:
                return Chunk(lines, position, malformed, at_end=False)
            piece = _read_piece(folder, name, position, budget)
            lines += piece.lines
            malformed += piece.too_long
            budget -= max(piece.whole, 1)
            position = Position(position.segment, position.offset + piece.whole)
            if not piece.at_eof:
                continue
            if piece.rest and (ended or following is not None):
                malformed += 1
                position = Position(position.segment, position.offset + piece.rest)
        if following is None:
            return Chunk(lines, position, malformed, at_end=True)
        position = Position(following, 0)


def unread_bytes(folder: Path, name: str, segments: Sequence[int], start: Position) -> int:
    """How many bytes of a journal lie behind `start`; files that are gone count as nothing."""
    total = 0
    for index in segments:
        if index < start.segment:
            continue
        try:
            size = (folder / spool.Segment(name, "", index).filename).stat().st_size
        except OSError:
            continue
        total += max(0, size - (start.offset if index == start.segment else 0))
    return total


def delete_shipped(folder: Path, name: str, segments: Sequence[int], position: Position) -> None:
    """Delete the segments that lie wholly before `position`.

    Raises:
        OSError: one cannot be deleted.
    """
    for index in segments:
        if index < position.segment:
            (folder / spool.Segment(name, "", index).filename).unlink(missing_ok=True)


class _Piece(NamedTuple):
    lines: list[bytes]
    whole: int  # bytes up to the last newline
    rest: int  # bytes behind it
    at_eof: bool
    too_long: int


def _read_piece(folder: Path, name: str, position: Position, size: int) -> _Piece:
    """About `size` bytes of one segment, and at least one whole line if there is one."""
    path = folder / spool.Segment(name, "", position.segment).filename
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(position.offset)
            data = file.read(size) or b""
            at_eof = len(data) < size
            while not at_eof and b"\n" not in data and len(data) < MAX_LINE_BYTES:
                more = file.read(_BLOCK_BYTES) or b""
                data += more
                at_eof = len(more) < _BLOCK_BYTES
            if not at_eof and b"\n" not in data:
                skipped = _skip_line(file)
                if skipped is None:
                    return _Piece([], 0, len(data), at_eof=True, too_long=0)
                return _Piece([], len(data) + skipped, 0, at_eof=False, too_long=1)
    except FileNotFoundError:
        return _Piece([], 0, 0, at_eof=True, too_long=0)
    whole = data.rfind(b"\n") + 1
    lines = [line for line in data[:whole].split(b"\n") if line.strip()]
    return _Piece(lines, whole, len(data) - whole, at_eof, too_long=0)


def _skip_line(file: io.FileIO) -> int | None:
    """How many bytes further the line under way ends; None while it does not."""
    skipped = 0
    while block := file.read(_BLOCK_BYTES):
        found = block.find(b"\n")
        if found >= 0:
            return skipped + found + 1
        skipped += len(block)
    return None


def _read_until_agreed(path: Path) -> bytes | None:
    try:
        with path.open("rb", buffering=0) as file:
            previous = file.read(journal.PROGRESS_BYTES)
            for _ in range(_AGREEMENT_TRIES):
                file.seek(0)
                current = file.read(journal.PROGRESS_BYTES)
                if current == previous:
                    return current or None
                previous = current
    except FileNotFoundError:
        return None
    return None
