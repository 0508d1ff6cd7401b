"""The launcher's lines on stderr. Whoever does not read them holds up nothing but the lines."""

from __future__ import annotations

import os
import select
import sys
import time
from collections import deque

from gradwatch.cli.launcher.watch import Line, Weight
from gradwatch.cli.printable import printable

# A pipe that is ready takes so much at once, and in one piece: PIPE_BUF of pipe(7).
_PIECE_BYTES = 4096
# Beyond it the lines that nobody reads are lost; the report has the warnings.
_MAX_UNSAID = 1000
_LAST_WORDS_SECONDS = 2.0


class Console:
    """Says lines, and remembers the warnings for the report.

    stderr is the command's too: it may be a pipe that is full because nobody reads it, or a terminal that
    is stopped. It is written only when it takes something, and is never made non-blocking, which the
    command would notice.

    Args:
        quiet: leave out the notes.

    Attributes:
        warnings: said so far.
    """

    def __init__(self, *, quiet: bool) -> None:
        self.warnings: list[str] = []
        self._quiet = quiet
        self._unsaid: deque[bytes] = deque()

    def warn(self, text: str) -> None:
        """Say a warning, once."""
        if text not in self.warnings:
            self.say(Line(Weight.WARNING, text))

    def verdict(self, text: str) -> None:
        """Say what is done with the job."""
        self.say(Line(Weight.VERDICT, text))

    def note(self, text: str) -> None:
        """Say something that `--quiet` leaves out."""
        self.say(Line(Weight.NOTE, text))

    def say(self, line: Line) -> None:
        """Say a line, as soon as stderr takes it."""
        if line.weight is Weight.WARNING:
            self.warnings.append(line.text)
        if line.weight is Weight.NOTE and self._quiet:
            return
        mark = "WARNING: " if line.weight is Weight.WARNING else ""
        if len(self._unsaid) < _MAX_UNSAID:
            self._unsaid.append(f"gradwatch: {mark}{printable(line.text)}\n".encode())
        self.flush()

    def flush(self) -> None:
        """Write what stderr takes now. To be called often."""
        try:
            stderr = sys.stderr.fileno()
            while self._unsaid and _is_ready(stderr, 0.0):
                # One write, so that the command's own lines do not cut it in two.
                line = self._unsaid.popleft()
                written = os.write(stderr, line[:_PIECE_BYTES])
                if written < len(line):
                    self._unsaid.appendleft(line[written:])
        except OSError:
            self._unsaid.clear()

    def last_words(self) -> None:
        """Write what is left; waits for a reader, but not for long."""
        until = time.monotonic() + _LAST_WORDS_SECONDS
        self.flush()
        while self._unsaid and (left := until - time.monotonic()) > 0:
            _is_ready(sys.stderr.fileno(), left)
            self.flush()


def _is_ready(descriptor: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return bool(poll.poll(seconds * 1000))
