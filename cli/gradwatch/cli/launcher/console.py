"""The launcher's lines on stderr."""

from __future__ import annotations

import os
import sys

from gradwatch.cli.launcher.watch import Line, Weight


class Console:
    """Says lines, and remembers the warnings for the report.

    Args:
        quiet: leave out the notes.

    Attributes:
        warnings: said so far.
    """

    def __init__(self, *, quiet: bool) -> None:
        self.warnings: list[str] = []
        self._quiet = quiet

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
        """Say a line."""
        if line.weight is Weight.WARNING:
            self.warnings.append(line.text)
        if line.weight is Weight.NOTE and self._quiet:
            return
        mark = "WARNING: " if line.weight is Weight.WARNING else ""
        try:
            # One write, so that the command's own lines do not cut it in two.
            os.write(sys.stderr.fileno(), f"gradwatch: {mark}{line.text}\n".encode())
        except OSError:
            return
