"""Switch a part of the probe off when it fails, instead of failing the training."""

from __future__ import annotations

import sys
import traceback
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

_P = ParamSpec("_P")
_R = TypeVar("_R")


class Fuses:
    """One fuse per part of the probe: its first failure is logged and blows it.

    Args:
        report: told (part, error) once per part, to journal it; its own failure is ignored.
    """

    def __init__(self, report: Callable[[str, str], object] | None = None) -> None:
        self.counts: dict[str, int] = {}
        self._report = report

    def intact(self, part: str) -> bool:
        """Whether the part still works."""
        return part not in self.counts

    def call(self, part: str, call: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R | None:
        """Call something of `part` while that works. Never raises.

        Returns:
            What it gives; None when it fails, and while the part is off.
        """
        if self.intact(part):
            try:
                return call(*args, **kwargs)
            except Exception as error:
                self.blow(part, error)
        return None

    def clean_up(self, part: str, call: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R | None:
        """The same for what has to be done also when the part is off: it lets go of what the part holds."""
        try:
            return call(*args, **kwargs)
        except Exception as error:
            self.blow(part, error)
            return None

    def blow(self, part: str, error: Exception) -> None:
        """Count a failure of `part`; the first also says so on stderr.

        Call it from the `except` block. Never raises.
        """
        first = self.intact(part)
        self.counts[part] = self.counts.get(part, 0) + 1
        if not first:
            return
        try:
            where = traceback.extract_tb(error.__traceback__)[-1:]
            place = f" at {where[0].name}:{where[0].lineno}" if where else ""
            sys.stderr.write(
                f"gradwatch: the part '{part}' failed with {error!r}{place} and is off from now on; "
                "the training goes on.\n"
            )
            if self._report is not None:
                self._report(part, f"{error!r}{place}")
        except Exception:  # noqa: S110 - the last line of defence has nobody to tell
            pass
