"""What is known of the checkpoints under a root, remembered so that no terabytes are read twice."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from gradwatch.agent.checkpoints.complete import SETTLE_SECONDS
from gradwatch.agent.checkpoints.result import Completeness
from gradwatch.agent.sidecar import cursor

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from gradwatch.agent.checkpoints.survey import Seen

# With those that have gone; what is there is always remembered, or it would be scanned for ever.
MAX_KNOWN = 10_000
_MAX_BYTES = 256 << 20
_FIRST_RETRY_SECONDS = 60.0
_LAST_RETRY_SECONDS = 3600.0


@dataclass(frozen=True)
class Known:
    """A checkpoint that was scanned.

    Attributes:
        fingerprint: what it was then.
        body: what was said of it: a `CheckpointScanned`.
        again_at: when to look again though nothing has changed, in seconds since the epoch; None for never:
            it is complete or torn.
        tries: how often its scan has failed in a row.
    """

    fingerprint: str
    body: dict[str, Any]
    again_at: float | None = None
    tries: int = 0


def learned(
    seen: Seen, completeness: Completeness | None, body: dict[str, Any], before: Known | None, now: float
) -> Known:
    """What is known after a scan.

    Args:
        seen: what was scanned.
        completeness: that the scan found; None when it failed.
        body: the record about it.
        before: what was known of that path.
        now: seconds since the epoch.
    """
    if completeness is None:
        same = before is not None and before.fingerprint == seen.fingerprint
        tries = 1 + (before.tries if same and before is not None else 0)
        wait = min(_FIRST_RETRY_SECONDS * 2 ** (tries - 1), _LAST_RETRY_SECONDS)
        return Known(seen.fingerprint, body, now + wait, tries)
    if completeness is Completeness.IN_FLIGHT:
        settled = seen.modified_at + SETTLE_SECONDS + 1
        return Known(seen.fingerprint, body, settled if settled > now else now + SETTLE_SECONDS)
    return Known(seen.fingerprint, body)


def due_while_watching(
    seen: Iterable[Seen], before: Mapping[str, str], known: Mapping[str, Known], now: float
) -> list[Seen]:
    """What to scan while the job trains: what has changed and holds still, the newest first.

    Args:
        seen: at this look.
        before: fingerprints at the look before.
        known: by path.
        now: seconds since the epoch.
    """
    due = []
    for one in seen:
        have = known.get(one.path)
        if have is None or have.fingerprint != one.fingerprint:
            wanted = before.get(one.path) == one.fingerprint
        else:
            wanted = have.again_at is not None and have.again_at <= now
        if wanted:
            due.append(one)
    return _newest_first(due)


def due_now(seen: Iterable[Seen], known: Mapping[str, Known]) -> list[Seen]:
    """What to scan when nothing writes any more: all that has changed or could not be scanned."""
    return _newest_first(
        one
        for one in seen
        if (have := known.get(one.path)) is None or have.fingerprint != one.fingerprint or have.tries
    )


def _newest_first(seen: Iterable[Seen]) -> list[Seen]:
    return sorted(seen, key=lambda one: one.modified_at, reverse=True)


class Memory:
    """Results by path, in a file of the state folder.

    Args:
        state_dir: the state folder; None to forget with the process.
        root: the declared one.

    Attributes:
        known: by path relative to the root, oldest first.
        there: paths that were told of and not seen to go.
    """

    def __init__(self, state_dir: Path | None, root: str) -> None:
        self.known: dict[str, Known] = {}
        self.there: set[str] = set()
        self._root = root
        name = hashlib.sha256(self._root.encode(errors="surrogateescape")).hexdigest()[:32]
        self._file = None if state_dir is None else state_dir / "checkpoints" / f"{name}.json"
        self._version = importlib.metadata.version("gradwatch")

    def put(self, path: str, known: Known) -> None:
        """Remember a result as the newest."""
        self.known.pop(path, None)
        self.known[path] = known
        if len(self.known) > MAX_KNOWN:
            gone = next((old for old in self.known if old not in self.there and old != path), None)
            if gone is not None:
                del self.known[gone]

    def load(self) -> None:
        """Read the file. A missing, foreign or damaged one gives nothing: all is scanned again."""
        if self._file is None:
            return
        try:
            with self._file.open("rb") as file:
                document = json.loads(file.read(_MAX_BYTES))
            if (document["version"], document["root"]) != (self._version, self._root):
                return
            known = {str(path): _known(one) for path, one in document["known"].items()}
            there = {str(path) for path in document["there"]}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return
        self.known, self.there = known, there

    def save(self) -> None:
        """Replace the file in one step.

        Raises:
            OSError: it cannot be written.
        """
        if self._file is None:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "version": self._version,
            "root": self._root,
            # What is not settled is looked at again.
            "known": {path: asdict(known) for path, known in self.known.items() if known.again_at is None},
            "there": sorted(self.there),
        }
        cursor.replace_file(self._file, json.dumps(document, separators=(",", ":")).encode())


def _known(one: dict[str, Any]) -> Known:
    if not isinstance(one["fingerprint"], str) or not isinstance(one["body"]["path"], str):
        raise TypeError(f"not a result: {one!r:.100}")
    return Known(one["fingerprint"], one["body"])
