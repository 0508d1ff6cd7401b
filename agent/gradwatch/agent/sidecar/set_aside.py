"""A task to set checkpoints aside, performed: what it names is checked, what has gone is passed over."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradwatch.agent.checkpoints import listing, quarantine
from gradwatch.agent.checkpoints.moves import Refused

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


@dataclass(frozen=True)
class SetAside:
    """How it went.

    Attributes:
        error: why nothing was moved, in words; "" when all was.
        moved: relative to the root; those that an earlier call has moved included.
    """

    error: str = ""
    moved: tuple[str, ...] = ()


def set_aside(root: Path, identifier: str, paths: Sequence[str], reason: str, at: str) -> SetAside:
    """Move checkpoints into quarantine: all that are there, or none. The same again changes nothing.

    Args:
        root: the declared root.
        identifier: the task's.
        paths: absolute.
        reason: for the manifest.
        at: the time, RFC 3339.
    """
    names = []
    for path in paths:
        name = listing.inside(root, path) if os.path.isabs(path) else None  # noqa: PTH117 - it is no Path yet
        if name is None:
            return SetAside(
                f"{path!r:.300} is not below the root {root}, or a symbolic link is on the way to it"
            )
        if os.path.lexists(root / name) or os.path.lexists(root / listing.QUARANTINE / identifier / name):
            names.append(name)
    if not names:
        return SetAside()
    done = quarantine.quarantine(root, identifier, names, reason, at)
    if not isinstance(done, Refused):
        return SetAside(moved=done.paths)
    left = f"; left where they were put: {', '.join(done.left)}" if done.left else ""
    return SetAside(f"{done.message}{left}")
