"""One run: start the command, attend to it, obey orders, end with an exit code."""

from __future__ import annotations

import dataclasses
import datetime as dt
import os
import secrets
import signal
import time
from typing import TYPE_CHECKING, Any

from gradwatch.cli.errors import UsageError
from gradwatch.cli.launcher import (
    environment,
    lifecycle,
    orphans,
    policy_file,
    preflight,
    processes,
    report,
    watch,
)
from gradwatch.cli.launcher.attention import Attention
from gradwatch.cli.launcher.console import Console
from gradwatch.cli.launcher.lifecycle import Act
from gradwatch.cli.launcher.performer import Performer
from gradwatch.cli.launcher.report import EndedBy, Ending
from gradwatch.cli.launcher.signals import Signals
from gradwatch.cli.launcher.spools import RunSpool, SpoolUnusableError

if TYPE_CHECKING:
    from gradwatch.cli.launcher.config import RunConfig
    from gradwatch.cli.launcher.job_view import JobView
    from gradwatch.cli.launcher.lifecycle import Life

_TICK_SECONDS = 0.1
# Orders are looked for this often: it is part of what a rollback takes.
_OBEYING_TICK_SECONDS = 0.05
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
    run.end_orphans()
    run.open_spool()
    with run.signals.blocked():
        return run.run()


class _Run:
    def __init__(self, config: RunConfig) -> None:
        self.signals = Signals()
        self._config = config
        self._console = Console(quiet=config.quiet)
        self._processes = processes.Processes(self.signals)
        self._spool: RunSpool | None = None
        self._spool_error: str | None = None
        self._attention: Attention | None = None
        self._autoloaded = False
        self._commanded = False
        self._local_ranks: dict[int, int] = {}
        self._performer: Performer | None = None
        self._life: Life | None = None

    # ---------------------------------------------------------------- before

    def end_orphans(self) -> None:
        """End what a killed launcher of this job has left on this node."""
        config = self._config
        try:
            orphans.end_orphans(config.state_dir, config.job, config.rules.grace_seconds, self._console.warn)
        except OSError as error:
            self._console.warn(f"cannot look for processes of an earlier launcher: {error}")

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
                policy_hash=None if config.policy is None else config.policy.hash,
            )
            if config.own_collector:
                policy_file.announce(config.state_dir, config.job, config.policy)
        except (SpoolUnusableError, OSError) as error:
            self._spool_error = f"{error}; name another folder with --state-dir"
            if config.require_watch:
                raise UsageError(f"cannot watch the command: {self._spool_error}") from None
            self._console.warn(f"THIS RUN IS UNWATCHED: {self._spool_error}")
            if self._spool is not None:
                self._spool.remove()
                self._spool = None
            return
        self._attention = Attention(config, self._spool, self._processes, self.signals, self._console)

    def fail_to_start(self, exit_code: int, why: str) -> int:
        """The command cannot be started."""
        self._console.warn(why)
        ended_by = EndedBy.NOT_FOUND if exit_code == preflight.NOT_FOUND else EndedBy.NOT_EXECUTABLE
        return self._finish(Ending(exit_code, ended_by), watch.Coverage(0, None, []))

    # ---------------------------------------------------------------- while

    def run(self) -> int:
        """Start the command, attend to it until the run's end, and clear up."""
        processes.become_subreaper()
        try:
            ending = self._live()
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            exit_code = preflight.NOT_FOUND if missing else preflight.NOT_EXECUTABLE
            return self._never_started(exit_code, error)
        self._note_circumstances()
        generation = 0 if self._life is None else self._life.generation
        if self._spool is not None and self._attention is not None:
            self._spool.journal.end(generation, ending.exit_code, ending.ended_by.value)
            self._attention.end()
        covered = self._coverage()
        if self._config.require_watch and ending.exit_code == 0 and not covered.complete:
            ending = Ending(_NOT_WATCHED, EndedBy.REQUIRE_WATCH)
        return self._finish(ending, covered)

    def _live(self) -> Ending:
        """Go through the states until the end.

        Raises:
            OSError: the command cannot be started.
        """
        config, attention = self._config, self._attention
        performer = Performer(config, self._spool, attention, self._processes, self._console)
        self._performer = performer
        rules = config.rules_when(watched=self._spool is not None)
        tick = _OBEYING_TICK_SECONDS if rules.obeys else _TICK_SECONDS
        before, act = lifecycle.begin(rules, environment.generation(os.environ), time.monotonic())
        self._life = before
        performer.perform(before, act, before)
        moved = False
        while True:
            # What has just changed can lead on at once: a restart waits for nothing.
            for number, from_terminal in self.signals.wait(0.0 if moved else tick):
                performer.signalled(number, from_terminal=from_terminal)
            self._processes.reap()
            self._console.flush()
            if attention is not None:
                attention.tick()
            order = None if attention is None else attention.order()
            facts = performer.facts(before, order)
            if facts.commanded is not None:
                # A framework's controller stops and starts its workers; the command is its driver.
                rules = dataclasses.replace(rules, obeys=False)
            self._life, act = lifecycle.step(before, order, facts, rules, time.monotonic())
            performer.perform(self._life, act, before)
            if act is Act.END and self._life.ending is not None:
                return self._life.ending
            moved, before = self._life != before, self._life

    # ---------------------------------------------------------------- after

    def _never_started(self, exit_code: int, error: OSError) -> int:
        why = f"cannot start {self._config.command[0]}: {error.strerror or error}"
        if self._spool is not None:
            generation = 0 if self._life is None else self._life.generation
            self._spool.journal.end(generation, exit_code, EndedBy.NOT_FOUND.value)
        if self._attention is not None and self._attention.pids:
            self._attention.end()
        elif self._spool is not None:
            self._spool.remove()
        return self.fail_to_start(exit_code, why)

    def _note_circumstances(self) -> None:
        """What only the spool tells, and has to be known after the spool is gone."""
        if self._spool is not None:
            self._autoloaded = self._spool.autoloaded()
            self._local_ranks = self._spool.local_hellos()
            self._commanded = self._spool.commanded() is not None

    def _coverage(self) -> watch.Coverage:
        return watch.coverage(
            watch.Circumstances(
                view=None if self._attention is None else self._attention.view,
                autoloaded=self._autoloaded,
                autoload_off=os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0",
                local_ranks=self._local_ranks,
                own_collector=self._config.own_collector,
                spool_error=self._spool_error,
            )
        )

    def _resumed(self, view: JobView | None) -> dict[str, Any] | None:
        if self._commanded:
            return report.resumed_by_controller(view)
        return None if self._performer is None else self._performer.resume_document(view)

    def _finish(self, ending: Ending, covered: watch.Coverage) -> int:
        config, console = self._config, self._console
        view = None if self._attention is None else self._attention.view
        if self._performer is not None:
            self._performer.warn_if_not_honoured(view)
        for text in covered.warnings:
            console.warn(text)
        if ending.ended_by not in {EndedBy.NOT_FOUND, EndedBy.NOT_EXECUTABLE}:
            console.note(watch.last_line(config.job, covered, view))
        if config.report is not None:
            document = report.build(
                config.job,
                ending,
                covered,
                view,
                console.warnings,
                generation=0 if self._life is None else self._life.generation,
                exclude_node=None if self._life is None else self._life.exclude_node,
                resume=self._resumed(view),
            )
            try:
                report.write(config.report, document)
            except OSError as error:
                console.warn(f"cannot write the report {config.report}: {error}")
        console.last_words()
        return ending.exit_code
