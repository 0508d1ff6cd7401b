"""One run: start the command, attend to it, end with its exit code."""

from __future__ import annotations

import datetime as dt
import os
import secrets
import signal
import sys
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import psutil

from gradwatch.cli.errors import UsageError
from gradwatch.cli.launcher import environment, job_view, preflight, processes, report, watch
from gradwatch.cli.launcher.attendants import Attendants
from gradwatch.cli.launcher.report import EndedBy, Ending
from gradwatch.cli.launcher.signals import ENDING, Signals
from gradwatch.cli.launcher.spools import RunSpool, SpoolUnusableError
from gradwatch.cli.launcher.watch import Line, Weight

if TYPE_CHECKING:
    from gradwatch.cli.launcher.config import RunConfig

_TICK_SECONDS = 0.1
# What the command left behind gets this long after SIGTERM.
_GRACE_SECONDS = 5.0
# A sidecar that was only just started needs a moment before it can drain.
_START_SECONDS = 3.0
_STOP_SECONDS = 5.0
_NOT_WATCHED = 2


def launch(config: RunConfig) -> int:
    """Run a command under watch.

    Returns:
        The exit code: the command's own, or one of ours as the documentation lists them.

    Raises:
        UsageError: what was asked for cannot be had; the command was not started.
    """
    preflight.check(config)
    # Ignored, it would have the kernel reap the command before we learn how it ended.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    run = _Run(config)
    not_runnable = preflight.why_not_runnable(config.command[0], os.environ)
    if not_runnable is not None:
        return run.fail_to_start(*not_runnable)
    run.open_spool()
    with run.signals.blocked():
        return run.run()


class _Run:
    def __init__(self, config: RunConfig) -> None:
        self.signals = Signals()
        self._config = config
        self._processes = processes.Processes(self.signals)
        self._spool: RunSpool | None = None
        self._spool_error: str | None = None
        self._attendants: Attendants | None = None
        self._view: job_view.JobView | None = None
        self._document: bytes | None = None
        self._said = watch.Said()
        self._said_where = False
        self._warnings: list[str] = []
        self._signalled = False
        self._autoloaded = False
        self._local_ranks: dict[int, int] = {}

    # ---------------------------------------------------------------- before

    def open_spool(self) -> None:
        """Make the run's folder; without it the command runs unwatched, or not at all.

        Raises:
            UsageError: there is none and `--require-watch` was given.
        """
        config = self._config
        now = dt.datetime.now(dt.timezone.utc)
        try:
            self._spool = RunSpool(
                config.state_dir,
                environment.run_id(now, secrets.token_hex(4)),
                job=config.job,
                generation=environment.generation(os.environ),
                command=config.command,
            )
        except SpoolUnusableError as error:
            self._spool_error = f"{error}; name another folder with --state-dir"
            if config.require_watch:
                raise UsageError(f"cannot watch the command: {self._spool_error}") from None
            self._warn(f"THIS RUN IS UNWATCHED: {self._spool_error}")
            return
        self._attendants = Attendants(config, self._spool, self._processes)

    def fail_to_start(self, exit_code: int, why: str) -> int:
        """The command cannot be started."""
        self._warn(why)
        ended_by = EndedBy.NOT_FOUND if exit_code == preflight.NOT_FOUND else EndedBy.NOT_EXECUTABLE
        return self._finish(Ending(exit_code, ended_by), watch.Coverage(0, None, []))

    # ---------------------------------------------------------------- while

    def run(self) -> int:
        """Start the command, attend to it until it ends, and clear up."""
        config = self._config
        processes.become_subreaper()
        folder = None if self._spool is None else self._spool.folder
        env = environment.for_command(os.environ, spool=folder, job=config.job)
        try:
            command = self._processes.start_command(config.command, env)
        except OSError as error:
            exit_code = (
                preflight.NOT_FOUND if isinstance(error, FileNotFoundError) else preflight.NOT_EXECUTABLE
            )
            why = f"cannot start {config.command[0]}: {error.strerror or error}"
            if self._spool is not None:
                self._spool.end(exit_code, EndedBy.NOT_FOUND.value)
                self._spool.remove()
            return self.fail_to_start(exit_code, why)
        while (status := self._processes.exit_status(command)) is None:
            for number, from_terminal in self.signals.wait(_TICK_SECONDS):
                self._signalled |= number in ENDING
                if not from_terminal:
                    processes.send(command, number)
            self._processes.reap()
            self._attend()
        self._clear_up()
        self._note_circumstances()
        ending = self._ending(status)
        if self._spool is not None and self._attendants is not None:
            self._spool.end(ending.exit_code, ending.ended_by.value)
            self._drain(self._spool, self._attendants)
        covered = self._coverage()
        if config.require_watch and ending.exit_code == 0 and not covered.complete:
            ending = Ending(_NOT_WATCHED, EndedBy.REQUIRE_WATCH)
        return self._finish(ending, covered)

    def _attend(self) -> None:
        """Everything but the command. A failure here must not reach it."""
        if self._attendants is None or self._spool is None:
            return
        try:
            self._attendants.tick(time.monotonic())
            for trouble in self._attendants.troubles():
                self._warn(trouble)
            self._look_at_status(self._spool)
        except Exception as error:
            self._warn(f"something in gradwatch itself failed: {error!r}; the command goes on")

    def _look_at_status(self, spool: RunSpool) -> None:
        if not self._said_where:
            self._say_where()
        document = spool.status()
        if document is None or document == self._document:
            return
        self._document = document
        view = job_view.parse(document)
        if view is None:
            return
        self._view = view
        self._said, lines = watch.news(self._said, view)
        for line in lines:
            self._say(line)

    def _say_where(self) -> None:
        config = self._config
        if config.collector is not None:
            self._said_where = True
            self._say(Line(Weight.NOTE, f"job {config.job} reports to the collector at {config.collector}"))
            return
        found = None if self._attendants is None else self._attendants.collector
        if found is None:
            return
        self._said_where = True
        self._say(Line(Weight.NOTE, f"job {config.job}, metrics at {found.http}/metrics"))
        asked = None if config.http is None else preflight.parse_address(config.http, "--http")[1]
        if asked and asked != urlsplit(found.http).port:
            self._warn(f"a collector already runs on {config.state_dir}, at {found.http}; --http is not used")

    # ---------------------------------------------------------------- after

    def _clear_up(self) -> None:
        """End whatever the command has left behind, in whatever session."""
        left = self._left_behind()
        if not left:
            return
        names = ", ".join(sorted({_name(process) for process in left}))
        self._warn(f"the command left {len(left)} processes behind ({names}); ending them")
        processes.signal_all(left, signal.SIGTERM)
        until = time.monotonic() + _GRACE_SECONDS
        while left := self._left_behind():
            if time.monotonic() >= until:
                processes.signal_all(left, signal.SIGKILL)
            if any(number in ENDING for number, _ in self.signals.wait(_TICK_SECONDS)):
                until = 0.0
            self._processes.reap()
            self._attend()

    def _left_behind(self) -> list[psutil.Process]:
        self._processes.reap()
        return processes.descendants(set() if self._attendants is None else self._attendants.pids)

    def _ending(self, status: int) -> Ending:
        if status < 0:
            return Ending(128 - status, EndedBy.SIGNAL)
        return Ending(status, EndedBy.SIGNAL if self._signalled and status else EndedBy.COMMAND)

    def _drain(self, spool: RunSpool, attendants: Attendants) -> None:
        until = time.monotonic() + self._config.drain_seconds + _START_SECONDS
        attendants.drain(until)
        while not attendants.drained and time.monotonic() < until:
            self._processes.reap()
            self._attend()
            if any(number in ENDING for number, _ in self.signals.wait(_TICK_SECONDS / 5)):
                break
        self._attend()
        self._stop(attendants)
        left = spool.leftover()
        if left is not None and not left.journals and not left.unread_bytes:
            spool.remove()
            return
        what = "some of the run" if left is None else f"{left.journals} journals, {left.unread_bytes} bytes"
        self._warn(f"not shipped to the collector: {what} in {spool.folder}; the next run ships them")

    def _stop(self, attendants: Attendants) -> None:
        attendants.stop()
        until = time.monotonic() + _STOP_SECONDS
        while any(self._processes.exit_status(pid) is None for pid in attendants.pids):
            if time.monotonic() >= until:
                attendants.stop(signal.SIGKILL)
            self.signals.wait(_TICK_SECONDS / 5)
            self._processes.reap()

    def _note_circumstances(self) -> None:
        """What only the spool tells, and has to be known after the spool is gone."""
        if self._spool is not None:
            self._autoloaded = self._spool.autoloaded()
            self._local_ranks = self._spool.local_hellos()

    def _coverage(self) -> watch.Coverage:
        return watch.coverage(
            watch.Circumstances(
                view=self._view,
                autoloaded=self._autoloaded,
                autoload_off=os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0",
                local_ranks=self._local_ranks,
                own_collector=self._config.collector is None,
                spool_error=self._spool_error,
            )
        )

    def _finish(self, ending: Ending, covered: watch.Coverage) -> int:
        for text in covered.warnings:
            self._warn(text)
        if ending.ended_by not in {EndedBy.NOT_FOUND, EndedBy.NOT_EXECUTABLE}:
            self._say(Line(Weight.NOTE, watch.last_line(self._config.job, covered, self._view)))
        if self._config.report is not None:
            document = report.build(self._config.job, ending, covered, self._view, self._warnings)
            try:
                report.write(self._config.report, document)
            except OSError as error:
                self._warn(f"cannot write the report {self._config.report}: {error}")
        return ending.exit_code

    # ---------------------------------------------------------------- saying

    def _warn(self, text: str) -> None:
        if text not in self._warnings:
            self._say(Line(Weight.WARNING, text))

    def _say(self, line: Line) -> None:
        if line.weight is Weight.WARNING:
            self._warnings.append(line.text)
        if line.weight is Weight.NOTE and self._config.quiet:
            return
        mark = "WARNING: " if line.weight is Weight.WARNING else ""
        try:
            # One write, so that the command's own lines do not cut it in two.
            os.write(sys.stderr.fileno(), f"gradwatch: {mark}{line.text}\n".encode())
        except OSError:
            return


def _name(process: psutil.Process) -> str:
    try:
        return f"{process.name()} {process.pid}"
    except psutil.Error:
        return str(process.pid)
