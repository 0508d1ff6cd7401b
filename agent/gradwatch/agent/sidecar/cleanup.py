"""Removing a spool that is wholly shipped: what we know to be ours, and nothing else."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from gradwatch.agent.probe import spool
from gradwatch.agent.sidecar import cursor

if TYPE_CHECKING:
    from pathlib import Path

DRAINED = "drained.json"
# Held by the launcher until it has read what the sidecar left for it.
LAUNCHER_LOCK = "launcher.lock"
LOGS = ("sidecar.log", "collector.log")
_NAMED = (
    spool.AUTOLOADED,
    spool.STATUS,
    spool.ORDER,
    spool.COMMANDED,
    cursor.FILENAME,
    DRAINED,
    LAUNCHER_LOCK,
    *LOGS,
)


def remove_spool(folder: Path) -> None:
    """Delete a spool's files, then the folder if that leaves it empty. Never raises."""
    with contextlib.suppress(OSError):
        for path in sorted(folder.iterdir()):
            ours = (
                path.name in _NAMED
                or spool.parse_segment(path.name) is not None
                or path.suffix in {".progress", ".claim"}
                or (path.name.startswith(".") and path.name.endswith(".new"))
            )
            if ours:
                path.unlink(missing_ok=True)
        _remove_capsules(folder / spool.CAPSULES)
        # The lock goes last: while it is there, no other sidecar takes the folder on.
        (folder / spool.SIDECAR_LOCK).unlink(missing_ok=True)
        folder.rmdir()


def _remove_capsules(folder: Path) -> None:
    """What killed ranks have left there: whole capsules, and parts that are named after a process."""
    if folder.is_dir():
        for path in folder.iterdir():
            if path.suffix == spool.CAPSULE_SUFFIX or path.suffix[1:].isdigit():
                path.unlink(missing_ok=True)
        folder.rmdir()
