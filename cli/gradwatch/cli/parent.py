"""Ending with the launcher, even one that was killed."""

from __future__ import annotations

import asyncio
import os

_POLL_SECONDS = 0.25
# The launcher's sidecar, orphaned at the same time, ships the rest first.
_GRACE_SECONDS = 4.0


async def set_when_gone(parent: int | None, stop: asyncio.Event) -> None:
    """Set `stop` some seconds after `parent` has ceased to be our parent; never if it is None."""
    if parent is None:
        return
    while os.getppid() == parent:  # noqa: ASYNC110 - the kernel tells no event of this
        await asyncio.sleep(_POLL_SECONDS)
    await asyncio.sleep(_GRACE_SECONDS)
    stop.set()
