"""What a launcher that was killed has left running on this node: ended before the job starts again."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from gradwatch.agent.probe import spool
from gradwatch.agent.sidecar import cleanup
from gradwatch.cli.launcher import processes

if TYPE_CHECKING:
    from collections.abc import Callable

_LOOK_SECONDS = 0.05


def end_orphans(state_dir: Path, job: str, grace_seconds: float, say: Callable[[str], None]) -> None:
    """End the processes of a job whose launcher is dead: SIGTERM, and SIGKILL after the grace.

    Only processes of this user, of this job and of a spool of this state folder, whose launcher's lock
    nobody holds.

    Args:
        state_dir: the state folder.
        job: the job's name.
        grace_seconds: from SIGTERM to SIGKILL.
        say: is told when there are any.
    """
    found = orphans(state_dir, job)
    if not found:
        return
    names = ", ".join(sorted(processes.name_of(one) for one in found))
    say(f"an earlier launcher of job {job} was killed and left {len(found)} processes ({names}); ending them")
    until = time.monotonic() + grace_seconds
    told: set[psutil.Process] = set()
    while found:
        if time.monotonic() >= until:
            processes.signal_all(found, signal.SIGKILL)
        else:
            processes.signal_all([one for one in found if one not in told], signal.SIGTERM)
            told.update(found)
        psutil.wait_procs(found, timeout=_LOOK_SECONDS)
        found = orphans(state_dir, job)


def orphans(state_dir: Path, job: str) -> list[psutil.Process]:
    """The living processes of a job whose launcher is dead, our own ancestors aside."""
    me = psutil.Process()
    spared = {me.pid, *(parent.pid for parent in me.parents())}
    held: dict[Path, bool] = {}
    found = []
    for process in psutil.process_iter():
        if process.pid in spared:
            continue
        folder = _spool_of(process, state_dir, job)
        if folder is None:
            continue
        if folder not in held:
            held[folder] = spool.is_locked(folder / cleanup.LAUNCHER_LOCK)
        if not held[folder]:
            found.append(process)
    return found


def _spool_of(process: psutil.Process, state_dir: Path, job: str) -> Path | None:
    """The spool of this state folder that a process of ours and of the job writes to."""
    try:
        if process.uids().real != os.getuid() or process.status() == psutil.STATUS_ZOMBIE:
            return None
        environ = process.environ()
    except (psutil.Error, OSError):
        return None
    folder = environ.get("GRADWATCH_SPOOL")
    if not folder or environ.get("GRADWATCH_JOB") != job:
        return None
    path = Path(folder)
    return path if path.parent.resolve() == (state_dir / "spool").resolve() else None
