"""A recorded history: the JSON lines of `gradwatch events JOB --json`, read back. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from gradwatch.collector import observations as obs
from gradwatch.collector.policy.problems import EventsError
from gradwatch.collector.schema import EventDocument

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_BODIES: Mapping[str, TypeAdapter[Any]] = {kind: TypeAdapter(body) for kind, body in obs.KINDS.items()}


@dataclass(frozen=True, slots=True)
class Logged:
    """One line of the log: a journal's record, or how far its process had come.

    Attributes:
        seq: the record's; below 0 for a progress.
        at: the record's own time; None when it is not known.
        received_at: the collector's time when it arrived, in seconds since the epoch; what
            shares it arrived in one report.
    """

    id: int
    job: str
    incarnation: str
    seq: int
    at: float | None
    received_at: float
    body: obs.Body | obs.Progress


@dataclass(frozen=True, slots=True)
class Log:
    """A recorded history, in order of arrival; records of a kind that is not known are only counted."""

    events: tuple[Logged, ...]
    unknown_kinds: tuple[str, ...] = ()


def read_log(lines: Iterable[str], file: str) -> Log:
    """Read a log.

    Args:
        lines: one JSON object each; empty ones are passed over.
        file: its name, for messages.

    Raises:
        EventsError: a line is no event.
    """
    events: list[Logged] = []
    unknown: set[str] = set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            document = EventDocument.model_validate_json(line)
            if document.kind not in _BODIES:
                unknown.add(document.kind)
                continue
            body = _BODIES[document.kind].validate_json(json.dumps(document.body))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise EventsError(
                f"{file}:{number}: this is no line of `gradwatch events JOB --json`: "
                f"{where + ': ' if where else ''}{first['msg']}"
            ) from None
        at = None if document.at is None else document.at.timestamp()
        received_at = document.received_at.timestamp()
        where_from = (document.id, document.job, document.incarnation, document.seq)
        events.append(Logged(*where_from, at, received_at, body))
    return Log(tuple(_as_they_came(events)), tuple(sorted(unknown)))


def _as_they_came(events: Iterable[Logged]) -> list[Logged]:
    """In order of arrival; checksums, which are logged only once they differ, where they were told."""
    in_order: list[Logged] = []
    for one in sorted(events, key=lambda one: one.id):
        place = len(in_order)
        if isinstance(one.body, obs.Checksum):
            after = (
                number
                for number, other in enumerate(in_order)
                if other.incarnation == one.incarnation and other.seq > one.seq
            )
            place = next(after, place)
        moved = one if place == len(in_order) else replace(one, received_at=in_order[place].received_at)
        in_order.insert(place, moved)
    return in_order
