"""The run's own folder: made before the command starts, removed when all of it is shipped."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
from typing import TYPE_CHECKING, Any

from gradwatch.agent.probe import spool
from gradwatch.agent.probe.journal import Journal
from gradwatch.agent.sidecar import cleanup
from gradwatch.cli.launcher import orders

if TYPE_CHECKING:
    from pathlib import Path


class SpoolUnusableError(Exception):
    """Nothing can be written where the probe would have to write."""


@dataclasses.dataclass(frozen=True)
class Leftover:
    """What the sidecar could not ship."""

    journals: int
    unread_bytes: int


class RunSpool:
    """The spool of one run, with the launcher's journal open in it.

    Args:
        state_dir: the state folder; made if absent.
        run_id: the folder's name in it.
        job: the job's name.
        generation: of the job.
        command: as the user gave it.
        policy_hash: of the policy that the launcher obeys; None when it obeys none.

    Raises:
        SpoolUnusableError: it cannot be made, or not be written.
    """

    def __init__(
        self,
        state_dir: Path,
        run_id: str,
        *,
        job: str,
        generation: int,
        command: tuple[str, ...],
        policy_hash: str | None = None,
    ) -> None:
        self.folder = state_dir / "spool" / run_id
        self._launch = spool.new_incarnation()
        self._about = {"job": job, "launch": self._launch}
        try:
            self.folder.mkdir(parents=True)
            # Held until we are gone: no other run's sidecar takes the folder on before.
            self._lock = spool.try_lock(self.folder / cleanup.LAUNCHER_LOCK)
            self._journal = Journal(self.folder, spool.launch_journal_name(self._launch))
        except OSError as error:
            cleanup.remove_spool(self.folder)
            raise SpoolUnusableError(f"cannot write {self.folder}: {error.strerror or error}") from error
        started: dict[str, Any] = {
            "generation": generation,
            "node": platform.node() or "unknown",
            "pid": os.getpid(),
            "command": list(command),
        }
        if policy_hash is not None:
            started["policy_hash"] = policy_hash
        if not self._journal.append("launch_started", self._about | started):
            self._journal.close()
            cleanup.remove_spool(self.folder)
            reasons = ", ".join(self._journal.dropped)
            raise SpoolUnusableError(f"cannot write {self.folder}: {reasons}")

    @property
    def launch(self) -> str:
        """The random id of this `gradwatch run`."""
        return self._launch

    def command_started(self, generation: int) -> None:
        """Write down that the command runs."""
        self._journal.append("command_started", self._about | {"generation": generation})

    def command_stopped(self, generation: int, order: str, exit_code: int | None) -> None:
        """Write down that nothing lives of what the command started, and that we wait for an order.

        Args:
            generation: in which it ran.
            order: the id of the order that it was stopped for; "" if it ended by itself.
            exit_code: when it ended by itself.
        """
        stopped: dict[str, Any] = {"generation": generation, "order": order}
        if exit_code is not None:
            stopped["exit_code"] = exit_code
        self._journal.append("command_stopped", self._about | stopped)

    def order(self) -> orders.Order | None:
        """The newest order for this launch."""
        try:
            data = (self.folder / spool.ORDER).read_bytes()
        except OSError:
            return None
        return orders.parse(data, job=self._about["job"], launch=self._launch)

    def word_times(self) -> tuple[int, ...]:
        """When the collector's newest words were written down here; only a change of it says something."""
        times = []
        for name in (spool.ORDER, spool.STATUS):
            with contextlib.suppress(OSError):
                times.append((self.folder / name).stat().st_mtime_ns)
        return tuple(times)

    def end(self, generation: int, exit_code: int, ended_by: str) -> bool:
        """Write down how the run ended; returns whether that is in the journal."""
        written = self._journal.append(
            "launch_ended",
            self._about | {"generation": generation, "exit_code": exit_code, "ended_by": ended_by},
        )
        self._journal.close()
        return written

    def autoloaded(self) -> bool:
        """Whether any process of the job imported torch with the probe in it."""
        return (self.folder / spool.AUTOLOADED).exists()

    def status(self) -> bytes | None:
        """The newest status document of the job, if one has arrived."""
        try:
            return (self.folder / spool.STATUS).read_bytes()
        except OSError:
            return None

    def local_hellos(self) -> dict[int, int]:
        """The ranks that began a journal here: rank -> world size. For when no collector answered."""
        ranks = {}
        for path in sorted(self.folder.glob("rank*.000000.jsonl")):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError), path.open("rb") as file:
                hello: dict[str, Any] = json.loads(file.readline())["hello"]
                ranks[int(hello["rank"])] = int(hello["world_size"])
        return ranks

    def leftover(self) -> Leftover | None:
        """What the sidecar says it could not ship; None when it left no word."""
        try:
            document = json.loads((self.folder / cleanup.DRAINED).read_bytes())
            return Leftover(int(document["journals"]), int(document["unread_bytes"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def forget_leftover(self) -> None:
        """Remove the word of a sidecar that has been followed by another."""
        with contextlib.suppress(OSError):
            (self.folder / cleanup.DRAINED).unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete the folder."""
        cleanup.remove_spool(self.folder)
