"""Switch a part of the probe off when it fails, instead of failing the training."""

from __future__ import annotations

import sys
import traceback
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


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
