"""When a rank's progress is worth a report.

Watermarks of a healthy rank change with every round; once a second is enough. What a
verdict waits for is sent at once.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradwatch.protos.v1 import gradwatch_pb2 as pb

INTERVAL_SECONDS = 1.0


class Due(enum.Enum):
    """Why a progress is sent now, or is not."""

    FIRST = "first"
    HAPPENED = "happened"
    INTERVAL = "interval"
    UNCHANGED = "unchanged"
    TOO_SOON = "too_soon"

    @property
    def now(self) -> bool:
        """Whether to send it."""
        return self in {Due.FIRST, Due.HAPPENED, Due.INTERVAL}


@dataclasses.dataclass(frozen=True)
class Sent:
    """The newest progress the collector has acknowledged, and the monotonic time of that."""

    progress: pb.Progress
    at: float


def due(sent: Sent | None, progress: pb.Progress, now: float, *, records: bool) -> Due:
    """Decide whether `progress` goes into the next report.

    Args:
        sent: None when none was sent yet.
        progress: the newest.
        now: monotonic seconds.
        records: journal records of the same rank go with it.
    """
    if sent is None:
        return Due.FIRST
    if records or _what_happened(sent.progress) != _what_happened(progress):
        return Due.HAPPENED
    if sent.progress == progress:
        return Due.UNCHANGED
    return Due.INTERVAL if now - sent.at >= INTERVAL_SECONDS else Due.TOO_SOON


def _what_happened(progress: pb.Progress) -> tuple[object, ...]:
    last_bad = progress.last_bad_round if progress.HasField("last_bad_round") else None
    return (
        last_bad,
        progress.bad_rounds,
        progress.ended,
        progress.malformed_lines,
        dict(progress.dropped),
        dict(progress.faults),
    )
