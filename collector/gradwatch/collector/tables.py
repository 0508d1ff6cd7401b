"""The store's tables, as the newest migration leaves them, and the JSON codec of their rows."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import sqlalchemy as sa
from pydantic import TypeAdapter

from gradwatch.collector import observations as obs
from gradwatch.collector.model import Attempt, AttemptId, Event, Incident, JobState, Journal, State
from gradwatch.collector.policy.dossier import Dossier

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gradwatch.collector.recovery.model import Entry

metadata = sa.MetaData()


def _state_table(name: str) -> sa.Table:
    return sa.Table(
        name,
        metadata,
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("job", sa.Text),
        sa.Column("state", sa.Text, nullable=False),
    )


job = _state_table("job")
attempt = _state_table("attempt")
journal = _state_table("journal")
incident = _state_table("incident")
dossier = _state_table("dossier")

stray = sa.Table(
    "stray",
    metadata,
    sa.Column("reason", sa.Text, primary_key=True),
    sa.Column("count", sa.BigInteger, nullable=False),
)

told = sa.Table(
    "told",
    metadata,
    sa.Column("incident", sa.Text, primary_key=True),
    sa.Column("outcome", sa.Text, nullable=False),
    sa.Column("at", sa.Float, nullable=False),
)

picture = sa.Table(
    "picture",
    metadata,
    sa.Column("job", sa.Text, primary_key=True),
    sa.Column("packed", sa.LargeBinary, nullable=False),
)

audit = sa.Table(
    "audit",
    metadata,
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
    sa.Column("job", sa.Text, nullable=False),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("what", sa.Text, nullable=False),
    sa.Column("about", sa.Text),
    sa.Column("text", sa.Text, nullable=False),
)

event = sa.Table(
    "event",
    metadata,
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
    sa.Column("job", sa.Text, nullable=False),
    sa.Column("generation", sa.Integer),
    sa.Column("attempt", sa.Integer),
    sa.Column("rank", sa.Integer),
    sa.Column("incarnation", sa.Text, nullable=False),
    sa.Column("seq", sa.BigInteger, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("at", sa.Float),
    sa.Column("received_at", sa.Float, nullable=False),
    sa.Column("body", sa.Text, nullable=False),
)

_NAMES: Mapping[type, str] = {body: kind for kind, body in obs.KINDS.items()}

_T = TypeVar("_T")
_JOB = TypeAdapter(JobState)
_ATTEMPT = TypeAdapter(Attempt)
_JOURNAL = TypeAdapter(Journal)
_INCIDENT = TypeAdapter(Incident)
_DOSSIER = TypeAdapter(Dossier)
_BODIES: Mapping[type, TypeAdapter[Any]] = {body: TypeAdapter(body) for body in _NAMES}


def job_row(value: JobState) -> dict[str, Any]:
    """A job as a row."""
    return {"key": value.name, "job": value.name, "state": _dump(_JOB, value)}


def attempt_row(value: Attempt) -> dict[str, Any]:
    """An attempt as a row. Who its ranks are is in their journals' rows: it would be long, and twice."""
    key = json.dumps([*value.id])
    return {"key": key, "job": value.id.job, "state": _dump(_ATTEMPT, replace(value, ranks={}))}


def journal_row(value: Journal) -> dict[str, Any]:
    """A journal as a row."""
    return {"key": value.incarnation, "job": value.job, "state": _dump(_JOURNAL, value)}


def incident_row(value: Incident) -> dict[str, Any]:
    """An incident as a row."""
    return {"key": value.id, "job": value.attempt.job, "state": _dump(_INCIDENT, value)}


def dossier_row(value: Dossier) -> dict[str, Any]:
    """A dossier as a row."""
    return {"key": value.job, "job": value.job, "state": _dump(_DOSSIER, value)}


def audit_row(value: Entry) -> dict[str, Any]:
    """A line of the audit trail as a row."""
    return {
        "job": value.job,
        "at": value.at,
        "what": value.what,
        "about": value.about,
        "text": value.text,
    }


def event_row(value: Event) -> dict[str, Any]:
    """An accepted record as a row; its body is canonical JSON."""
    kind = type(value.body)
    body = json.loads(_BODIES[kind].dump_json(value.body))
    return {
        "job": value.job,
        "generation": None if value.attempt is None else value.attempt.generation,
        "attempt": None if value.attempt is None else value.attempt.number,
        "rank": value.rank,
        "incarnation": value.incarnation,
        "seq": value.seq,
        "kind": _NAMES[kind],
        "at": value.at,
        "received_at": value.received_at,
        "body": json.dumps(body, sort_keys=True, separators=(",", ":")),
    }


def read_state(connection: sa.Connection) -> State:
    """Read back everything that the collector knew."""
    journals = {value.incarnation: value for value in _load(connection, journal, _JOURNAL)}
    ranks: dict[AttemptId, dict[int, str]] = {}
    for value in journals.values():
        if value.rank is not None:
            ranks.setdefault(value.rank.attempt, {})[value.rank.hello.rank] = value.incarnation
    return State(
        jobs={value.name: value for value in _load(connection, job, _JOB)},
        attempts={
            value.id: replace(value, ranks=ranks.get(value.id, {}))
            for value in _load(connection, attempt, _ATTEMPT)
        },
        journals=journals,
        incidents={value.id: value for value in _load(connection, incident, _INCIDENT)},
        strays={row[0]: row[1] for row in connection.execute(sa.select(stray))},
    )


def read_dossiers(connection: sa.Connection) -> dict[str, Dossier]:
    """Read back what deciding rests on, by job."""
    return {value.job: value for value in _load(connection, dossier, _DOSSIER)}


def _load(connection: sa.Connection, table: sa.Table, codec: TypeAdapter[_T]) -> list[_T]:
    rows = connection.execute(sa.select(table.c.state).order_by(table.c.key))
    return [codec.validate_json(row.state) for row in rows]


def _dump(codec: TypeAdapter[_T], value: _T) -> str:
    return codec.dump_json(value).decode()
