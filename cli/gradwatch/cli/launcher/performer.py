"""Does what the state machine says: starts the command, ends it, and says so."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

from gradwatch.agent.launch import resume as told_resume
from gradwatch.agent.launch.orders import Action
from gradwatch.cli.launcher import environment, lifecycle, processes, resume
from gradwatch.cli.launcher.lifecycle import Act, State, Why
from gradwatch.cli.launcher.opened import OpenedWatch
from gradwatch.cli.launcher.signals import ENDING

if TYPE_CHECKING:
    import psutil

    from gradwatch.agent.launch.orders import Order
    from gradwatch.cli.launcher.attention import Attention
    from gradwatch.cli.launcher.config import RunConfig
    from gradwatch.cli.launcher.console import Console
    from gradwatch.cli.launcher.job_view import JobView
    from gradwatch.cli.launcher.lifecycle import Facts, Life
    from gradwatch.cli.launcher.processes import Processes
    from gradwatch.cli.launcher.spools import RunSpool


class Performer:
    """The command, and all that it starts.

    Args:
        config: the run's.
        spool: None when the job runs unwatched.
        attention: None when the job runs unwatched.
        processes: starts and reaps.
        console: for what is to be said.

    Attributes:
        user_signal: the first signal by which the user asked the run to end.
        resumed: the newest order that the command was started by with something to resume.
    """

    def __init__(
        self,
        config: RunConfig,
        spool: RunSpool | None,
        attention: Attention | None,
        processes: Processes,
        console: Console,
    ) -> None:
        self.user_signal: signal.Signals | None = None
        self.resumed: Order | None = None
        self._config = config
        self._spool = spool
        self._attention = attention
        self._processes = processes
        self._console = console
        self._command: int | None = None
        self._generation = 0
        self._impatient = False
        self._opened: OpenedWatch | None = None

    def facts(self, life: Life, order: Order | None) -> Facts:
        """How things are."""
        status = None if self._command is None else self._processes.exit_status(self._command)
        looks = life.state is State.STOPPING and status is not None
        left = self._left(sure=True) if looks else []
        return lifecycle.Facts(
            status=status,
            left=len(left),
            ranks_left=len(self._ranks_among(left)),
            user_signal=self.user_signal,
            impatient=self._impatient,
            heard_at=0.0 if self._attention is None else self._attention.heard_at,
            cannot_resume=self._why_not(order) if life.state in {State.WAITING, State.STOPPED} else None,
            commanded=None if self._spool is None else self._spool.commanded(),
        )

    def signalled(self, number: signal.Signals, *, from_terminal: bool) -> None:
        """A signal has arrived: it is the command's, while that runs."""
        running = self._command is not None and self._processes.exit_status(self._command) is None
        if number in ENDING:
            self.user_signal = self.user_signal or number
            self._impatient |= not running
        if running and self._command is not None and not from_terminal:
            processes.send(self._command, number)

    def perform(self, life: Life, act: Act, before: Life) -> None:
        """Do it.

        Args:
            life: the state that it leads to.
            act: what to do.
            before: the state until now.

        Raises:
            OSError: the command cannot be started.
        """
        if act is Act.START:
            self._start(life, before)
        elif act is Act.TERMINATE and life.order is not None and self._command is not None:
            halts = life.order.action is Action.HALT
            what = "halting: stopping the command" if halts else "rolling back: stopping the command"
            self._console.verdict(_because(what, life.order))
            processes.send(self._command, signal.SIGTERM)
        elif act is Act.WAIT_FOR_RANKS:
            self._say_wait()
        elif act is Act.TERMINATE_LEFT:
            self._end_left(life)
        elif act is Act.KILL:
            processes.signal_all(self._left(), signal.SIGKILL)
        elif act is Act.REPORT:
            self._report(life)
        elif act is Act.END:
            self._say_end(life)

    def resume_document(self, view: JobView | None = None) -> dict[str, object] | None:
        """What the report says of the newest resume; None when there was nothing to resume.

        Args:
            view: the job as the collector sees it.
        """
        order = self.resumed
        if order is None:
            return None
        return {
            "path": order.resume_path,
            "step": order.resume_step,
            "generation": order.generation,
            "honoured": self._honoured(order, view),
        }

    def warn_if_not_honoured(self, view: JobView | None = None) -> None:
        """Say so when the command was told what to resume and cannot have read it.

        Args:
            view: the job as the collector sees it: what its ranks say of it is among its warnings.
        """
        order = self.resumed
        if order is None or (view is not None and view.has_resumed(order.generation) is False):
            return
        if self._honoured(order, view) is False:
            self._console.warn(
                "not honoured: the command was told (GRADWATCH_RESUME_PATH) to resume from "
                f"{order.resume_path}, and nobody on this host opened it; read the variable, or put "
                f"{resume.MARK} into the command"
            )

    def _honoured(self, order: Order, view: JobView | None) -> bool | None:
        """Whether the command resumed as told; None when the checkpoint was opened, by whom is not known."""
        said = None if view is None else view.has_resumed(order.generation)
        if said is not None:
            return said
        if resume.takes_path(self._config.command):
            return True
        opened = None if self._opened is None else self._opened.opened()
        return False if opened is False and order.generation == self._generation else None

    def _start(self, life: Life, before: Life) -> None:
        config, order = self._config, life.order
        path = "" if order is None else order.resume_path
        self._say_start(life, before)
        env = environment.for_command(
            os.environ,
            spool=None if self._spool is None else self._spool.folder,
            job=config.job,
            policy=config.policy,
            replica_check_every=config.replica_check_every,
            autopsy=config.autopsy,
        )
        if config.collector is not None:
            env["GRADWATCH_COLLECTOR"] = config.collector
        if config.policy is not None and self._spool is not None:
            env |= told_resume.variables(order) | {"GRADWATCH_GENERATION": str(life.generation)}
        if path:
            self.resumed = order
            if self._opened is not None:
                self._opened.close()
            self._opened = OpenedWatch(path)
        self._generation = life.generation
        self._command = self._processes.start_command(resume.arguments(config.command, path), env)
        if self._spool is not None:
            self._spool.journal.command_started(life.generation)

    def _say_start(self, life: Life, before: Life) -> None:
        order = life.order
        if life.why is Why.NO_ORDER:
            self._console.warn(
                f"no order came from the collector in {self._config.rules.start_seconds:g} s: the command "
                f"starts without one, in generation {life.generation}; only the guard is at work"
            )
        if order is None:
            return
        stopped = "stopped; " if before.state is State.STOPPED else ""
        if order.resume_path:
            self._console.verdict(
                f"{stopped}resuming from {order.resume_path} ({_step(order)}) in generation {life.generation}"
            )
        elif stopped:
            self._console.verdict(
                f"stopped; starting from the beginning in generation {life.generation}: nothing to resume"
            )

    def _ranks_among(self, left: list[psutil.Process]) -> list[psutil.Process]:
        if not left or self._spool is None:
            return []
        ranks = self._spool.rank_pids()
        return [process for process in left if process.pid in ranks]

    def _say_wait(self) -> None:
        ranks = self._ranks_among(self._left())
        names = ", ".join(sorted(processes.name_of(process) for process in ranks))
        minutes = self._config.rules.rank_seconds / 60
        self._console.note(
            f"the command has ended, and {len(ranks)} of its ranks still work ({names}); waiting for them, "
            f"at most {minutes:.0f} minutes"
        )

    def _end_left(self, life: Life) -> None:
        left = self._left()
        if life.order is None and left:
            names = ", ".join(sorted({processes.name_of(process) for process in left}))
            self._console.warn(f"the command left {len(left)} processes behind ({names}); ending them")
        processes.signal_all(left, signal.SIGTERM)

    def _report(self, life: Life) -> None:
        if self._spool is None or self._command is None:
            return
        status = self._processes.exit_status(self._command)
        by_itself = life.order is None or life.order.action is not Action.STOP
        if by_itself and status is not None:
            code = 128 - status if status < 0 else status
            self._console.note(f"the command ended with {code}; waiting for what is decided about that")
            self._spool.journal.command_stopped(life.generation, "", code)
        elif life.order is not None:
            self._spool.journal.command_stopped(life.generation, life.order.id, None)

    def _say_end(self, life: Life) -> None:
        order, rules = life.order, self._config.rules
        if life.why is Why.NO_ANSWER:
            self._console.warn(
                f"halted: the collector did not answer for {rules.answer_seconds:g} s, and the command is "
                "not started without it; see that the collector runs, and start the job again"
            )
        elif life.why is Why.CANNOT_RESUME and order is not None:
            self._console.warn(f"halted: {self._why_not(order)}")
        elif life.why is Why.EXCLUDE_NODE and order is not None:
            self._console.verdict(
                _because(
                    f"stopped; the job is to go on without host {order.exclude_node}: leave it out and start "
                    f"the same command again (exit code {lifecycle.ROLLBACK_DUE})",
                    order,
                )
            )
        elif (
            life.ending is not None
            and life.ending.exit_code == lifecycle.ROLLBACK_DUE
            and life.why is Why.ORDERED
        ):
            self._console.verdict(
                "stopped; a rollback is due: start the same command again "
                f"(exit code {lifecycle.ROLLBACK_DUE})"
            )
        elif life.why is Why.ORDERED and order is not None:
            self._console.verdict(_because("halted", order))

    def _why_not(self, order: Order | None) -> str | None:
        if order is None or not order.resume_path:
            return None
        policy = self._config.policy
        checkpoints = None if policy is None else policy.checkpoints
        return told_resume.why_not_usable(
            order.resume_path, None if checkpoints is None else checkpoints.root
        )

    def _left(self, *, sure: bool = False) -> list[psutil.Process]:
        self._processes.reap()
        spared = set() if self._attention is None else self._attention.pids
        found = processes.descendants(spared)
        # A process that forks and ends while we look is missed together with its child; a second
        # look sees the child, which is ours by then.
        return processes.descendants(spared) if sure and not found else found


def _because(what: str, order: Order) -> str:
    return f"{what}: {order.reason}" if order.reason else what


def _step(order: Order) -> str:
    return "step not known" if order.resume_step is None else f"step {order.resume_step}"
