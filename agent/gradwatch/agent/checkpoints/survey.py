"""The checkpoints under a root at one moment, each with what tells whether it has changed since."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gradwatch.agent.checkpoints import find

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gradwatch.agent.checkpoints.listing import File
    from gradwatch.agent.checkpoints.place import Place
    from gradwatch.agent.checkpoints.result import Layout


@dataclass(frozen=True)
class Seen:
    """A checkpoint as its names, sizes and times tell it.

    Attributes:
        path: relative to the root.
        fingerprint: of its files' names, sizes and times: another one when any of them changes.
        modified_at: the newest change of a file, in seconds since the epoch.
    """

    path: str
    fingerprint: str
    modified_at: float


@dataclass(frozen=True)
class Survey:
    """All that were found.

    Attributes:
        seen: by path.
        unread: folders that could not be listed: what is in them is not known.
    """

    seen: dict[str, Seen] = field(default_factory=dict)
    unread: frozenset[str] = frozenset()

    def lacks(self, path: str) -> bool:
        """Whether a checkpoint is surely not there."""
        parents = [path[:at] for at, letter in enumerate(path) if letter == "/"]
        return path not in self.seen and self.unread.isdisjoint([path, *parents])


def survey(place: Place, layout: Layout) -> Survey:
    """Look at the names, sizes and times at a place. Opens no file.

    Raises:
        OSError: it cannot be read.
    """
    seen = {}
    taken = place.take()
    for candidate in find.find(taken, layout):
        try:
            candidate.path.encode()
        except UnicodeEncodeError:
            continue  # a name that is no text cannot be told to anybody
        files = {name: taken.files[find.file_path(candidate.path, name)] for name in candidate.files}
        newest = max((file.mtime_ns for file in files.values()), default=0)
        seen[candidate.path] = Seen(candidate.path, fingerprint(files), newest / 1e9)
    return Survey(seen, frozenset(taken.unread))


def fingerprint(files: Mapping[str, File]) -> str:
    """Tell files apart from the same ones later, after a restart and on another node too."""
    lines = (f"{file.size} {file.mtime_ns}{file.version} {name}" for name, file in sorted(files.items()))
    return hashlib.sha256("\0".join(lines).encode(errors="surrogateescape")).hexdigest()
