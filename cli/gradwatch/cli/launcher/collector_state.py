"""Whether a collector runs on a state folder, and where it listens."""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING

from gradwatch.collector import statedir

if TYPE_CHECKING:
    from pathlib import Path

    from gradwatch.collector.statedir import CollectorInfo


def is_held(state_dir: Path) -> bool:
    """Whether a live collector holds the folder, be it ready or only just starting."""
    try:
        fd = os.open(state_dir / statedir.LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        # Shared: two that look at the same time do not take each other for a collector.
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    else:
        return False
    finally:
        os.close(fd)


def ready(state_dir: Path) -> CollectorInfo | None:
    """The addresses of the collector that holds the folder; None while they are not known."""
    info = statedir.holder(state_dir)
    # One that was killed leaves its addresses behind for the one that is just starting.
    return info if info is not None and _lives(info.pid) else None


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
