"""What the sidecar's log tells that waiting does not change: it is not let in, or does not trust."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradwatch.agent.sidecar.access import NOT_VERIFIED, REFUSED

if TYPE_CHECKING:
    from pathlib import Path


class SidecarLog:
    """Reads on where it stopped.

    Args:
        path: the log; need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0

    def refusals(self) -> list[str]:
        """What it newly says of a collector that refuses it, or cannot be trusted. Cheap to ask often."""
        try:
            if self._path.stat().st_size <= self._read:
                return []
            with self._path.open("rb") as file:
                file.seek(self._read)
                # A line that is only half there is read when it is whole.
                whole = file.read().rpartition(b"\n")
        except OSError:
            return []
        self._read += len(whole[0] + whole[1])
        found = []
        for line in whole[0].decode(errors="replace").splitlines():
            at = max(line.find(REFUSED), line.find(NOT_VERIFIED))
            if at >= 0:
                found.append(line[at:])
        return found
