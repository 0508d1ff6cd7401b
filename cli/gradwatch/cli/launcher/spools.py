"""The run's own folder: made before the command starts, removed when all of it is shipped."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from typing import TYPE_CHECKING, Any

from gradwatch.agent.launch.journal import Commanded, LaunchJournal
from gradwatch.agent.probe import spool
from gradwatch.agent.sidecar import cleanup

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

    Attributes:
        folder: where it is.
        journal: the launcher's own.

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
        try:
            self.folder.mkdir(parents=True)
            # Held until we are gone: no other run's sidecar takes the folder on before.
            self._lock = spool.try_lock(self.folder / cleanup.LAUNCHER_LOCK)
            self.journal = LaunchJournal(
                self.folder, job=job, generation=generation, command=command, policy_hash=policy_hash
            )
        except OSError as error:
            cleanup.remove_spool(self.folder)
            raise SpoolUnusableError(f"cannot write {self.folder}: {error.strerror or error}") from error

    def commanded(self) -> Commanded | None:
        """What a framework's controller says that takes the orders in our place; None when there is none."""
        with contextlib.suppress(OSError, ValueError):
            return Commanded((self.folder / spool.COMMANDED).read_text())
        return None

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

    def rank_pids(self) -> set[int]:
        """The processes that began a rank's journal here."""
        pids = set()
        for path in self.folder.glob("rank*.000000.jsonl"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError), path.open("rb") as file:
                pids.add(int(json.loads(file.readline())["hello"]["pid"]))
        return pids

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
