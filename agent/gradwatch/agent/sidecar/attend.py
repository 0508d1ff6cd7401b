"""A sidecar that no launcher starts: in a container beside the job's, it ships one run after another.

Which run: the newest of the state folder whose launch lives, or whose launcher waits for the rest to be
shipped; else one that its launcher has left.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from typing import TYPE_CHECKING

from gradwatch.agent.probe import spool
from gradwatch.agent.sidecar import app, cleanup, tail
from gradwatch.agent.sidecar.sidecar import is_abandoned

if TYPE_CHECKING:
    from pathlib import Path

_log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.1
# What is left is tried again so often.
_AGAIN_SECONDS = 5.0


async def attend(config: app.SidecarConfig) -> bool:
    """Ship the runs of a state folder, one at a time, until told to end by SIGTERM or SIGINT.

    Args:
        config: its `spool` is the folder of all spools; made if absent. Its `job` is not used: each run says
            what it is called.

    Returns:
        Whether everything of the last run was shipped.

    Raises:
        OSError: the folder cannot be made.
    """
    runs, told = config.spool, app.told_to_end()
    runs.mkdir(parents=True, exist_ok=True)
    _log.info("waiting for a run in %s", runs)
    complete = True
    while True:
        last = told.is_set()
        run = next_run(runs)
        this = None if run is None else _config_of(config, run)
        if this is not None:
            complete = await _ship(this, told)
            last = last or told.is_set()
        if last:
            return complete
        await _wait(told, _LOOK_SECONDS if complete else _AGAIN_SECONDS)


def next_run(runs: Path) -> Path | None:
    """The spool to ship now; None when there is none."""
    with contextlib.suppress(OSError):
        found = sorted(runs.iterdir(), reverse=True)
        wanted = next(filter(_is_wanted, found), None)
        return wanted or next(filter(is_abandoned, found), None)
    return None


def _config_of(config: app.SidecarConfig, run: Path) -> app.SidecarConfig | None:
    """What is to be done for a run; None while that is not known."""
    config = dataclasses.replace(config, spool=run, job=None)
    about = app.about(config)
    if about is None:
        # The first line of a launch that has only just begun.
        return None if _launch_lives(run) else config
    return dataclasses.replace(config, job=about.job)


async def _ship(config: app.SidecarConfig, told: asyncio.Event) -> bool:
    _log.info("shipping %s of job %s", config.spool, config.job or "unknown")
    ending = asyncio.Event()
    watching = asyncio.create_task(_until_over(config.spool, told, ending))
    try:
        complete = await app.ship(config, ending)
    except (app.SpoolTakenError, OSError) as error:
        _log.warning("%s", error)
        return False
    finally:
        watching.cancel()
    if complete and is_abandoned(config.spool):
        cleanup.remove_spool(config.spool)
    return complete


async def _until_over(run: Path, told: asyncio.Event, ending: asyncio.Event) -> None:
    while not told.is_set() and _launch_lives(run):
        await _wait(told, _LOOK_SECONDS)
    ending.set()


def _is_wanted(run: Path) -> bool:
    waited_for = spool.is_locked(run / cleanup.LAUNCHER_LOCK) and not (run / cleanup.DRAINED).exists()
    return waited_for or _launch_lives(run)


def _launch_lives(run: Path) -> bool:
    """Whether a launch writes its journal in a spool."""
    try:
        names = [spool.launch_journal_name(launch) for launch in tail.list_launches(run)]
        return any(spool.is_locked(run / spool.progress_filename(name)) for name in names)
    except OSError:
        return False


async def _wait(told: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(told.wait(), seconds)
