"""Processes of a run: starting, reaping, and leaving none behind.

The launcher is a child subreaper: whatever the command starts and abandons, in whatever
session, becomes our child. So all that is left of a run are our descendants.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    from gradwatch.cli.launcher.signals import Signals

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def become_subreaper() -> bool:
    """Adopt orphaned descendants from now on; returns whether the kernel does that."""
    return _prctl(_PR_SET_CHILD_SUBREAPER, 1)


class Processes:
    """Starts processes and keeps their exit statuses.

    Args:
        signals: blocked in this process, and unblocked again in what it starts.
    """

    def __init__(self, signals: Signals) -> None:
        self._signals = signals
        self._started: dict[int, subprocess.Popen[bytes]] = {}
        self._ended: dict[int, int] = {}

    def start_command(self, command: Sequence[str], env: Mapping[str, str]) -> int:
        """Start the user's command: our standard streams, our process group, our terminal.

        It gets SIGTERM when we are killed: without us nobody would end it before the job starts again.

        Raises:
            OSError: it cannot be started.
        """
        us = os.getpid()

        def prepare() -> None:
            self._signals.restore_in_child()
            _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != us:
                os._exit(128 + signal.SIGTERM)

        return self._keep(
            subprocess.Popen(
                list(command),
                env=dict(env),
                preexec_fn=prepare,  # noqa: PLW1509 - no other thread runs here
            )
        )

    def start_child(self, command: Sequence[str], env: Mapping[str, str], cwd: Path, log: Path) -> int:
        """Start a process of our own: a session of its own, out of the terminal's reach.

        Raises:
            OSError: it cannot be started, or its log file not be opened.
        """
        with log.open("ab") as output:
            return self._keep(
                subprocess.Popen(
                    list(command),
                    env=dict(env),
                    cwd=cwd,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                    preexec_fn=self._signals.restore_in_child,  # noqa: PLW1509 - as above
                )
            )

    def reap(self) -> None:
        """Collect everyone who has ended, adopted orphans included."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            process = self._started.pop(pid, None)
            if process is not None:
                # Popen would ask for a status that we have just taken.
                process.returncode = self._ended[pid] = os.waitstatus_to_exitcode(status)

    def exit_status(self, pid: int) -> int | None:
        """The exit code, or minus the signal, of a process that we started; None while it runs."""
        return self._ended.get(pid)

    def _keep(self, process: subprocess.Popen[bytes]) -> int:
        # An earlier process may have had this pid.
        self._ended.pop(process.pid, None)
        self._started[process.pid] = process
        return process.pid


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal to a child that is not reaped yet; nothing happens when it is gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def descendants(spared: Collection[int]) -> list[psutil.Process]:
    """All living descendants of this process except those named, and their descendants.

    Each knows its start time, so a signal never reaches a later process of the same pid.
    """
    found: list[psutil.Process] = []
    for child in psutil.Process().children():
        if child.pid in spared:
            continue
        try:
            found += [child, *child.children(recursive=True)]
        except psutil.NoSuchProcess:
            continue
    return [process for process in found if _is_alive(process)]


def signal_all(processes: Collection[psutil.Process], number: signal.Signals) -> None:
    """Send a signal to each that still lives."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            process.send_signal(number)


def name_of(process: psutil.Process) -> str:
    """Name and pid, for people."""
    try:
        return f"{process.name()} {process.pid}"
    except psutil.Error:
        return str(process.pid)


def _prctl(option: int, value: int) -> bool:
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        return bool(libc.prctl(option, value, 0, 0, 0) == 0)
    except (OSError, AttributeError):
        return False


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
