"""A fault that comes and goes: whether this is its time.

Nothing here has heard of gradwatch, apart from the generation in the environment.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

_GATE_SECONDS = 120.0


def hold_sigterm() -> Callable[[], None]:
    """Heed no SIGTERM until what is returned is called, which then lets one through that has come.

    So that a save which is due is made, however soon somebody wants to end the process.
    """
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: came.append(number))

    def let_through() -> None:
        signal.signal(signal.SIGTERM, before)
        if came:
            os.kill(os.getpid(), signal.SIGTERM)

    return let_through


@dataclass(frozen=True)
class Transient:
    """A fault of one rank.

    Attributes:
        rank: where; -1 for nowhere.
        step: when, in update attempts since the very start, or with `after_resume` since this process began.
        when: `once` in the life of the job; `generation0`; `always`; or how often at most, as a number.
        marker: a file outside of the job's reach, one byte for each time it has struck.
        gate: a file that holds the step of the newest checkpoint that is known good, kept up by the
            test; the fault waits for it to reach the newest one saved. None to wait for nothing.
    """

    rank: int
    step: int
    when: str
    marker: Path
    after_resume: bool = False
    gate: Path | None = None

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Its arguments on a command line."""
        parser.add_argument("--bad-rank", type=int, default=-1)
        parser.add_argument("--bad-step", type=int, default=0)
        parser.add_argument("--bad-when", default="once")
        parser.add_argument("--bad-after-resume", action="store_true")
        parser.add_argument("--marker", type=Path, default=Path(os.devnull))
        parser.add_argument("--gate", type=Path)

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> Transient:
        """As the command line says."""
        return cls(
            arguments.bad_rank,
            arguments.bad_step,
            arguments.bad_when,
            arguments.marker,
            arguments.bad_after_resume,
            arguments.gate,
        )

    def strikes(self, *, rank: int, step: int, began_at: int, saved: int) -> bool:
        """Whether it strikes now; it is then told in the marker.

        Args:
            rank: of this process.
            step: the update attempt that is about to begin.
            began_at: the step at which this process began.
            saved: the step of the newest checkpoint that was saved.
        """
        due = self.step + (began_at if self.after_resume else 0)
        if (rank, step) != (self.rank, due):
            return False
        if self.when == "generation0" and os.environ.get("GRADWATCH_GENERATION", "0") != "0":
            return False
        most = 1 if self.when == "once" else int(self.when) if self.when.isdigit() else None
        struck = self.marker.stat().st_size if self.marker.is_file() else 0
        if most is not None and struck >= most:
            return False
        self._wait_for_gate(saved)
        with self.marker.open("a") as file:
            file.write(".")
        return True

    def _wait_for_gate(self, saved: int) -> None:
        until = time.monotonic() + _GATE_SECONDS
        while self.gate is not None and self._known_good() < saved:
            if time.monotonic() >= until:
                raise TimeoutError(f"the checkpoint of step {saved} did not become known as good")
            time.sleep(0.02)

    def _known_good(self) -> int:
        try:
            return int(self.gate.read_text() or 0) if self.gate is not None else 0
        except FileNotFoundError:
            return 0
