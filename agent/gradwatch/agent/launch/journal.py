"""What a launch tells the collector, through its journal in the spool.

A launch is whoever starts the job's command, or a framework's workers, and obeys orders about it.
"""

from __future__ import annotations

import contextlib
import enum
import os
from typing import TYPE_CHECKING, Any

from gradwatch.agent.launch import orders
from gradwatch.agent.probe import spool
from gradwatch.agent.probe.journal import Journal
from gradwatch.agent.probe.node import node_name
from gradwatch.agent.sidecar.cursor import replace_file

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


class Commanded(str, enum.Enum):
    """What a framework's controller has left for the launcher in whose spool it writes."""

    RUNNING = "running"
    HALTED = "halted"  # by an order


class LaunchJournal:
    """The journal of one launch, open until its end.

    Args:
        folder: the spool; must exist.
        job: the job's name.
        generation: of the job.
        command: what is started, for people.
        policy_hash: of the policy that the launch obeys; None when it obeys none.
        whole_job: it starts and stops the workers of every host.

    Raises:
        OSError: nothing can be written there.
    """

    def __init__(
        self,
        folder: Path,
        *,
        job: str,
        generation: int,
        command: Sequence[str],
        policy_hash: str | None = None,
        whole_job: bool = False,
    ) -> None:
        self.launch = spool.new_incarnation()
        self._folder = folder
        self._about = {"job": job, "launch": self.launch}
        self._journal = Journal(folder, spool.launch_journal_name(self.launch))
        started: dict[str, Any] = {
            "generation": generation,
            "node": node_name(),
            "pid": os.getpid(),
            "command": list(command),
        }
        if policy_hash is not None:
            started["policy_hash"] = policy_hash
        if whole_job:
            started["whole_job"] = True
        if not self._append("launch_started", started):
            self._journal.close()
            raise OSError(", ".join(self._journal.dropped))

    def command_started(self, generation: int, no_restart: str = "") -> None:
        """Write down that the command runs.

        Args:
            generation: in which it runs.
            no_restart: why it cannot be stopped and started again; "" when it can.
        """
        started: dict[str, Any] = {"generation": generation}
        if no_restart:
            started["no_restart"] = no_restart
        self._append("command_started", started)

    def command_stopped(
        self, generation: int, order: str, exit_code: int | None, *, restarts: bool = False
    ) -> None:
        """Write down that nothing lives of what the command started, and that we wait for an order.

        Args:
            generation: in which it ran.
            order: the id of the order that it was stopped for; "" if it ended by itself.
            exit_code: when it ended by itself.
            restarts: it will be started again whatever is ordered.
        """
        stopped: dict[str, Any] = {"generation": generation, "order": order}
        if exit_code is not None:
            stopped["exit_code"] = exit_code
        if restarts:
            stopped["restarts"] = True
        self._append("command_stopped", stopped)

    def order(self) -> orders.Order | None:
        """The newest order for this launch."""
        try:
            data = (self._folder / spool.ORDER).read_bytes()
        except OSError:
            return None
        return orders.parse(data, job=self._about["job"], launch=self.launch)

    def word_times(self) -> tuple[int, ...]:
        """When the collector's newest words were written down here; only a change of it says something."""
        times = []
        for name in (spool.ORDER, spool.STATUS):
            with contextlib.suppress(OSError):
                times.append((self._folder / name).stat().st_mtime_ns)
        return tuple(times)

    def take_command(self, state: Commanded) -> None:
        """Tell the launcher whose spool this is that orders are for this launch now, and what came of them.

        Raises:
            OSError: it cannot be told.
        """
        replace_file(self._folder / spool.COMMANDED, state.value.encode())

    def end(self, generation: int, exit_code: int, ended_by: str) -> bool:
        """Write down how it ended, and let go; returns whether that is in the journal."""
        ended = {"generation": generation, "exit_code": exit_code, "ended_by": ended_by}
        written = self._append("launch_ended", ended)
        self._journal.close()
        return written

    def _append(self, kind: str, body: Mapping[str, Any]) -> bool:
        return self._journal.append(kind, {**self._about, **body})
