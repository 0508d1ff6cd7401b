"""The collector's order to load a checkpoint in process, as the sidecar leaves it in the spool.

Standard library only.
"""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradwatch.agent.probe import spool

if TYPE_CHECKING:
    from pathlib import Path

_CRC_BITS = 32


@dataclass(frozen=True)
class LoadOrder:
    """What is to be loaded.

    Attributes:
        id: the decision's.
        generation: in which the ranks go on.
        path: of the checkpoint.
        step: update attempts before it was saved; None when not known.
        skip_batches: so many are to be left out, which a restarted command is told.
    """

    id: str
    generation: int
    path: str
    step: int | None
    skip_batches: int

    @property
    def ticket(self) -> int:
        """A positive int that tells the order from others; a later generation's is larger."""
        text = json.dumps([self.id, self.path, self.step, self.skip_batches])
        return self.generation << _CRC_BITS | zlib.crc32(text.encode())


def generation_of(ticket: int) -> int:
    """The generation of the order with this ticket."""
    return ticket >> _CRC_BITS


class OrderFile:
    """The order file of a spool, at the price of one `stat` while it stays as it is.

    Args:
        folder: the spool.
        job: whose orders count.
    """

    def __init__(self, folder: Path, job: str) -> None:
        self._path = folder / spool.ORDER
        self._job = job
        self._seen: tuple[int, int, int] | None = None
        self._order: LoadOrder | None = None

    def look(self) -> LoadOrder | None:
        """The order to load that is there now; None when there is none."""
        try:
            status = os.stat(self._path)  # noqa: PTH116 - once per step: a third of the time of Path.stat
            seen = (status.st_mtime_ns, status.st_ino, status.st_size)
            if seen != self._seen:
                # A file that is replaced in between differs from `seen` at the next look.
                self._order = parse(self._path.read_bytes(), self._job)
                self._seen = seen
        except OSError:
            self._seen = self._order = None
        return self._order


def parse(data: bytes, job: str) -> LoadOrder | None:
    """Read an `Order` in its JSON mapping; None when it is none of the job's to load, or malformed."""
    try:
        order = json.loads(data)
        if order.get("action") != "ACTION_LOAD" or order.get("job") != job:
            return None
        step = order.get("resume_step")
        return LoadOrder(
            id=str(order.get("id", "")),
            generation=int(order.get("generation", 0)),
            path=str(order.get("resume_path", "")),
            step=None if step is None else int(step),
            skip_batches=int(order.get("skip_batches", 0)),
        )
    except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError):
        return None


def why_not(order: LoadOrder, root: Path | None) -> str | None:
    """Why the order is not obeyed; None when it can be.

    Args:
        order: what is asked for.
        root: what the checkpoint must lie below; None when nobody has said.
    """
    if not os.path.isabs(order.path):  # noqa: PTH117 - as below
        return f"the path {order.path!r} is not absolute"
    if root is not None:
        real, below = os.path.realpath(order.path), os.path.realpath(root)
        if os.path.commonpath([real, below]) != below or real == below:
            return f"{order.path} does not lie below {root}, the root of the checkpoints"
    if order.skip_batches:
        return "batches are to be skipped, which only a restarted command is told"
    return None
