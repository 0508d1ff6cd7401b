"""How the ranks of a job went, in a bounded number of columns. Not for several threads at once.

Each attempt is a segment of its own: after a rollback the steps come again. When there are too many columns,
each two next to each other become one, which keeps the worst state and the largest magnitude of both.
"""

from __future__ import annotations

import enum
import math
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_COLUMNS = 240
# A job that is started again and again shows its newest attempts.
MAX_SEGMENTS = 40
# A larger world has rows of several ranks, of which the worst is shown.
MAX_ROWS = 1024


class Cell(enum.IntEnum):
    """What is known of a rank in a column, the worse the larger."""

    UNKNOWN = 0
    ENDED = 1
    CLEAN = 2
    SKIPPED = 3  # the guard kept an update from being applied
    BAD = 4  # its own gradients were not finite


# A tenth of an order of magnitude; below all others: not known.
_NO_MAGNITUDE = -(1 << 15)
_FLOOR, _CEILING = -3000, 3000


@dataclass
class Row:
    """One row of a segment: a rank, or the ranks that share it.

    Attributes:
        cells: by column.
        magnitudes: by column, ten times the logarithm to base ten.
    """

    node: str
    cells: bytearray = field(default_factory=bytearray)
    magnitudes: array[int] = field(default_factory=lambda: array("h"))

    def grow(self, columns: int) -> None:
        """Have as many columns."""
        more = columns - len(self.cells)
        if more > 0:
            self.cells.extend(bytes(more))
            self.magnitudes.extend([_NO_MAGNITUDE] * more)

    def begin_earlier(self, columns: int) -> None:
        """Have as many more before the first."""
        self.cells = bytearray(columns) + self.cells
        self.magnitudes = array("h", [_NO_MAGNITUDE] * columns) + self.magnitudes

    def merge(self) -> None:
        """Make one column of each two."""
        self.grow(len(self.cells) + len(self.cells) % 2)
        self.cells = bytearray(map(max, self.cells[::2], self.cells[1::2]))
        self.magnitudes = array("h", map(max, self.magnitudes[::2], self.magnitudes[1::2]))


class Reached(NamedTuple):
    """How far a rank has come.

    Attributes:
        rounds: that it has looked at.
        bad_rounds: of these.
        ended: its process is gone.
    """

    step: int
    rounds: int
    bad_rounds: int
    ended: bool


@dataclass
class Segment:
    """One attempt.

    Attributes:
        started_at: when it was first heard of, in the collector's time.
        reached: by rank.
    """

    generation: int
    attempt: int
    first_step: int
    last_step: int
    started_at: float
    rows: dict[int, Row] = field(default_factory=dict)
    reached: dict[int, Reached] = field(default_factory=dict)


class Timeline:
    """Of one job.

    Args:
        ranks_per_row: how many ranks share a row.

    Attributes:
        stride: steps in a column.
        segments: oldest first.
        version: another one after each change.
    """

    def __init__(self, ranks_per_row: int = 1) -> None:
        self.ranks_per_row = ranks_per_row
        self.stride = 1
        self.segments: list[Segment] = []
        self.version = 0

    def columns(self, segment: Segment) -> int:
        """How many columns a segment has."""
        return (segment.last_step - segment.first_step) // self.stride + 1

    def column(self, segment: Segment, step: int) -> int:
        """The column of a step in its segment; the nearest one for a step outside of it."""
        return (min(max(step, segment.first_step), segment.last_step) - segment.first_step) // self.stride

    def segment(self, generation: int, attempt: int) -> Segment | None:
        """An attempt's."""
        wanted = (generation, attempt)
        return next((one for one in self.segments if (one.generation, one.attempt) == wanted), None)

    def has_ended(self, segment: Segment, row: int) -> bool:
        """Whether the processes of all ranks of a row are gone."""
        ranks = range(row * self.ranks_per_row, (row + 1) * self.ranks_per_row)
        known = [segment.reached[rank] for rank in ranks if rank in segment.reached]
        return bool(known) and all(one.ended for one in known)

    def reach(
        self,
        attempt: tuple[int, int],
        rank: int,
        node: str,
        reached: Reached,
        *,
        magnitude: float | None,
        now: float,
    ) -> None:
        """A rank has come further; the steps on the way were clean unless something else is said of them.

        Args:
            attempt: generation and number.
            rank: of the world.
            node: where it runs.
            reached: how far it is.
            magnitude: the largest of its newest gradients; None when not known or not finite.
            now: the collector's time.
        """
        segment = self._open(attempt, reached.step, now)
        row = self._row(segment, rank, node)
        before = segment.reached.get(rank, Reached(segment.first_step, 0, 0, ended=False))
        # After many bad rounds in a row the probe only counts them.
        mostly_bad = 2 * (reached.bad_rounds - before.bad_rounds) > reached.rounds - before.rounds
        worst = Cell.BAD if mostly_bad else Cell.CLEAN
        column = self.column(segment, reached.step)
        for at in range(self.column(segment, before.step), column + 1):
            row.cells[at] = max(row.cells[at], worst)
        if magnitude is not None:
            row.magnitudes[column] = max(row.magnitudes[column], quantised(magnitude))
        segment.reached[rank] = reached
        self.version += 1

    def mark(
        self, attempt: tuple[int, int], rank: int, node: str, *, step: int, cell: Cell, now: float
    ) -> None:
        """Something was said of a rank's step; the other arguments as for `reach`."""
        segment = self._open(attempt, step, now)
        row = self._row(segment, rank, node)
        column = self.column(segment, step)
        row.cells[column] = max(row.cells[column], cell)
        self.version += 1

    # ------------------------------------------------------------------ details

    def _open(self, attempt: tuple[int, int], step: int, now: float) -> Segment:
        """The attempt's segment, wide enough for the step."""
        segment = self.segment(*attempt)
        if segment is None:
            segment = Segment(*attempt, step, step, now)
            self.segments.append(segment)
            self.segments.sort(key=lambda one: (one.generation, one.attempt))
            del self.segments[:-MAX_SEGMENTS]
        segment.last_step = max(segment.last_step, step)
        if step < segment.first_step:
            # What was journalled before the first progress may come after it.
            columns = -((step - segment.first_step) // self.stride)
            segment.first_step -= columns * self.stride
            for row in segment.rows.values():
                row.begin_earlier(columns)
        while sum(map(self.columns, self.segments)) > max(MAX_COLUMNS, len(self.segments)):
            self.stride *= 2
            for one in self.segments:
                for row in one.rows.values():
                    row.merge()
        return segment

    def _row(self, segment: Segment, rank: int, node: str) -> Row:
        row = segment.rows.setdefault(rank // self.ranks_per_row, Row(node))
        row.grow(self.columns(segment))
        return row


def quantised(magnitude: float) -> int:
    """Ten times the logarithm to base ten, rounded, and bounded; that of 0 is the smallest."""
    if magnitude <= 0:
        return _FLOOR
    return min(max(round(10 * math.log10(magnitude)), _FLOOR), _CEILING)


def known_magnitude(value: int) -> float | None:
    """The logarithm to base ten; None when it is not known."""
    return None if value == _NO_MAGNITUDE else value / 10


# ---------------------------------------------------------------- to keep it


def as_json(timeline: Timeline) -> dict[str, Any]:
    """All of it, as JSON has it."""
    return {
        "ranks_per_row": timeline.ranks_per_row,
        "stride": timeline.stride,
        "segments": [
            {
                "attempt": [one.generation, one.attempt],
                "steps": [one.first_step, one.last_step],
                "started_at": one.started_at,
                "rows": [
                    [number, row.node, "".join(map(str, row.cells)), list(row.magnitudes)]
                    for number, row in one.rows.items()
                ],
                "reached": [[rank, *reached] for rank, reached in one.reached.items()],
            }
            for one in timeline.segments
        ],
    }


def from_json(kept: Mapping[str, Any]) -> Timeline:
    """The timeline that was kept.

    Raises:
        KeyError, TypeError, ValueError: it is none.
    """
    timeline = Timeline(kept["ranks_per_row"])
    timeline.stride = kept["stride"]
    timeline.segments = [
        Segment(
            generation=one["attempt"][0],
            attempt=one["attempt"][1],
            first_step=one["steps"][0],
            last_step=one["steps"][1],
            started_at=one["started_at"],
            rows={
                number: Row(node, bytearray(map(int, cells)), array("h", magnitudes))
                for number, node, cells, magnitudes in one["rows"]
            },
            reached={rank: Reached(*reached) for rank, *reached in one["reached"]},
        )
        for one in kept["segments"]
    ]
    return timeline
