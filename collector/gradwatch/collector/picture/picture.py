"""From a timeline, the state and the dossier to the document that is drawn. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradwatch.collector import document
from gradwatch.collector.evidence import first_step
from gradwatch.collector.picture import schema
from gradwatch.collector.picture.timeline import Cell, known_magnitude
from gradwatch.collector.policy.ledger import standing_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gradwatch.collector.model import Incident, JobState, State
    from gradwatch.collector.picture.timeline import Row, Segment, Timeline
    from gradwatch.collector.policy.decision import Decision
    from gradwatch.collector.policy.dossier import Checkpoint, Dossier

_LETTERS = {Cell.UNKNOWN: ".", Cell.ENDED: "x", Cell.CLEAN: "c", Cell.SKIPPED: "s", Cell.BAD: "b"}
_BY_CELL = bytes.maketrans(bytes(_LETTERS), "".join(_LETTERS.values()).encode())
# Marks beyond these are too many to be told apart.
_MARKS = 500


def picture(state: State, job: JobState, dossier: Dossier, timeline: Timeline) -> schema.PictureDocument:
    """A job as it is drawn.

    Args:
        state: the collector's.
        job: which.
        dossier: what deciding about it rests on.
        timeline: how its ranks went.
    """
    axis = _Axis.of(timeline)
    incidents = list(document.incidents_of(state, job))[-_MARKS:]
    return schema.PictureDocument(
        job=job.name,
        columns=axis.columns,
        segments=[
            schema.SegmentDocument(
                generation=segment.generation,
                attempt=segment.attempt,
                first_step=segment.first_step,
                last_step=segment.last_step,
                stride=timeline.stride,
                first_column=first,
                columns=timeline.columns(segment),
            )
            for segment, first in axis.places
        ],
        ranks=list(_rows(axis, _world_size(state, job))),
        incidents=[_incident(axis, one) for one in incidents],
        checkpoints=_checkpoints(axis, dossier.checkpoints)[-_MARKS:],
        decisions=[_decision(axis, one, state) for one in dossier.decisions[-_MARKS:]],
    )


@dataclass(frozen=True)
class _Axis:
    """The columns of all segments, one after the other.

    Attributes:
        places: each segment with its first column.
    """

    timeline: Timeline
    places: Sequence[tuple[Segment, int]]
    columns: int

    @classmethod
    def of(cls, timeline: Timeline) -> _Axis:
        places, columns = [], 0
        for segment in timeline.segments:
            places.append((segment, columns))
            columns += timeline.columns(segment)
        return cls(timeline, places, columns)

    def column(self, generation: int, attempt: int, step: int) -> int | None:
        """Of a step in an attempt; None when that attempt is not shown."""
        for segment, first in self.places:
            if (segment.generation, segment.attempt) == (generation, attempt):
                return first + self.timeline.column(segment, step)
        return None

    def written(self, step: int, at: float) -> int | None:
        """Of a step reached before a time: in the newest segment that had begun by then and has it."""
        found = None
        for segment, first in self.places:
            begun = segment.started_at <= at or found is None
            if begun and segment.first_step <= step <= segment.last_step:
                found = first + self.timeline.column(segment, step)
        return found


def _rows(axis: _Axis, world_size: int) -> Iterator[schema.RowDocument]:
    share = axis.timeline.ranks_per_row
    for number in sorted({number for segment, _ in axis.places for number in segment.rows}):
        states, magnitudes, node = bytearray(), list[float | None](), ""
        for segment, _ in axis.places:
            columns = axis.timeline.columns(segment)
            row = segment.rows.get(number)
            node = row.node if row is not None else node
            states += _states(row, columns, ended=axis.timeline.has_ended(segment, number))
            known = [] if row is None else [known_magnitude(one) for one in row.magnitudes]
            magnitudes += [*known, *[None] * (columns - len(known))]
        yield schema.RowDocument(
            rank=number * share,
            last_rank=max(number * share, min((number + 1) * share, world_size) - 1),
            node=node,
            states=states.translate(_BY_CELL).decode(),
            magnitudes=magnitudes,
        )


def _states(row: Row | None, columns: int, *, ended: bool) -> bytes:
    cells = b"" if row is None else bytes(row.cells)
    known = cells.rstrip(bytes([Cell.UNKNOWN]))
    return known + bytes([Cell.ENDED if ended else Cell.UNKNOWN]) * (columns - len(known))


def _world_size(state: State, job: JobState) -> int:
    return max((state.attempts[one].world_size for one in job.attempts), default=1)


def _incident(axis: _Axis, incident: Incident) -> schema.IncidentMarkDocument:
    step = first_step(incident.evidence)
    attempt = incident.attempt
    last = max(incident.evidence.last_step, step)
    return schema.IncidentMarkDocument(
        id=incident.id,
        status=incident.status.value,
        cause=None if incident.verdict.cause is None else incident.verdict.cause.value,
        step=step,
        column=axis.column(attempt.generation, attempt.number, step),
        last_column=axis.column(attempt.generation, attempt.number, last),
        first_rank=None if incident.verdict.first is None else incident.verdict.first.rank,
    )


def _checkpoints(axis: _Axis, ledger: Sequence[Checkpoint]) -> list[schema.CheckpointMarkDocument]:
    standings = standing_of(ledger)
    return [
        schema.CheckpointMarkDocument(
            path=one.path,
            step=one.step,
            verdict=standings[one.path].value,
            column=None if one.step is None else axis.written(one.step, one.modified_at or one.seen_at),
        )
        for one in sorted(ledger, key=lambda one: one.seen_at)
        if one.path in standings
    ]


def _decision(axis: _Axis, decision: Decision, state: State) -> schema.DecisionMarkDocument:
    incident = None if decision.incident is None else state.incidents.get(decision.incident)
    column = None
    if incident is not None:
        attempt = incident.attempt
        column = axis.column(attempt.generation, attempt.number, incident.evidence.last_step)
    else:
        for segment, first in axis.places:
            if segment.generation == decision.generation and segment.started_at <= decision.at:
                column = first + axis.timeline.columns(segment) - 1
    return schema.DecisionMarkDocument(
        id=decision.id,
        action=decision.action.value,
        outcome=decision.outcome.value,
        column=column,
        at=document.time_of(decision.at),
    )
