"""What the collector remembers: state rows and an append-only log of events, in one database.

One connection, one thread, one transaction per report. SQLite by default: WAL, and each
commit is on the disk before it returns.
"""

from __future__ import annotations

import importlib.resources
import json
import logging
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from gradwatch.collector import tables
from gradwatch.collector.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from alembic.config import Config

    from gradwatch.collector.model import AttemptId, Changes, State
    from gradwatch.collector.policy.dossier import Dossier
    from gradwatch.collector.recovery.model import Entry

_BUSY_SECONDS = 5.0
# Of one kind in one attempt: a rank that is bad for ever says so 16 times in a row only.
_SAID = 10_000


class Store:
    """An open store. Not for several threads at once.

    Args:
        url: of the database, for SQLAlchemy.
        busy_seconds: how long to wait for whoever else has a SQLite file locked.
    """

    def __init__(self, url: str, *, busy_seconds: float = _BUSY_SECONDS) -> None:
        self._engine = sa.create_engine(url, poolclass=sa.pool.NullPool, **_driver_options(url, busy_seconds))
        if self._engine.dialect.name == "sqlite":
            sa.event.listen(self._engine, "connect", _make_durable)
        self._connection: sa.Connection | None = None

    @classmethod
    def in_file(cls, path: Path) -> Store:
        """A store in a SQLite file, made if absent."""
        return cls(f"sqlite:///{path}")

    def migrate(self) -> None:
        """Bring the tables up to date.

        Raises:
            StoreError: they cannot be.
        """
        config = _alembic_config()
        from alembic import command

        try:
            with self._connected().begin():
                config.attributes["connection"] = self._connected()
                command.upgrade(config, "head")
        except (sa.exc.SQLAlchemyError, OSError) as error:
            raise self._broken("set up", error) from error

    def is_current(self) -> bool:
        """Whether the tables are those of this version.

        Raises:
            StoreError: they cannot be read.
        """
        config = _alembic_config()
        from alembic.runtime.migration import MigrationContext
        from alembic.script import ScriptDirectory

        try:
            with self._connected().begin():
                found = MigrationContext.configure(self._connected()).get_current_revision()
        except sa.exc.SQLAlchemyError as error:
            raise self._broken("read", error) from error
        return found == ScriptDirectory.from_config(config).get_current_head()

    def load(self) -> State:
        """Read the state back.

        Raises:
            StoreError: it cannot be read.
        """
        try:
            with self._connected().begin():
                return tables.read_state(self._connected())
        except (sa.exc.SQLAlchemyError, ValueError) as error:
            raise self._broken("read", error) from error

    def load_dossiers(self) -> dict[str, Dossier]:
        """Read back what deciding rests on, by job.

        Raises:
            StoreError: it cannot be read.
        """
        try:
            with self._connected().begin():
                return tables.read_dossiers(self._connected())
        except (sa.exc.SQLAlchemyError, ValueError) as error:
            raise self._broken("read", error) from error

    def commit(
        self, changes: Changes, dossiers: Iterable[Dossier] = (), entries: Iterable[Entry] = ()
    ) -> None:
        """Store all of it in one transaction, or nothing.

        Args:
            changes: of the state.
            dossiers: those that are different now.
            entries: for the audit trail.

        Raises:
            StoreError: nothing is stored; a later commit may succeed.
        """
        audit = [tables.audit_row(entry) for entry in entries]
        try:
            with self._connected().begin():
                self._upsert(tables.dossier, map(tables.dossier_row, dossiers))
                if audit:
                    self._connected().execute(sa.insert(tables.audit), audit)
                self._upsert(tables.job, map(tables.job_row, changes.jobs.values()))
                self._upsert(tables.attempt, map(tables.attempt_row, changes.attempts.values()))
                self._upsert(tables.journal, map(tables.journal_row, changes.journals.values()))
                self._upsert(tables.incident, map(tables.incident_row, changes.incidents.values()))
                self._upsert(
                    tables.stray, ({"reason": key, "count": count} for key, count in changes.strays.items())
                )
                self._append(tables.event, map(tables.event_row, changes.events))
        except sa.exc.SQLAlchemyError as error:
            raise self._broken("write", error) from error

    def events(self, job: str, *, after: int = 0, limit: int = 1000) -> list[dict[str, Any]]:
        """A job's accepted records in the order of their arrival, oldest first.

        Args:
            job: its name.
            after: give only those whose `id` is above it.
            limit: give at most so many.

        Raises:
            StoreError: they cannot be read.
        """
        rows = self._page(tables.event, job, after, limit)
        return [{**row, "body": json.loads(row["body"])} for row in rows]

    def said(self, attempt: AttemptId, kind: str, *, rank: int | None = None) -> list[dict[str, Any]]:
        """What the ranks of an attempt said of one kind, in the order of its arrival.

        Args:
            attempt: whose.
            kind: as in `observations.KINDS`.
            rank: of this rank only; None for all.

        Raises:
            StoreError: it cannot be read.
        """
        event = tables.event.c
        wanted = sa.select(event.body).where(
            event.job == attempt.job,
            event.generation == attempt.generation,
            event.attempt == attempt.number,
            event.kind == kind,
        )
        if rank is not None:
            wanted = wanted.where(event.rank == rank)
        try:
            with self._connected().begin():
                bodies = self._connected().scalars(wanted.order_by(event.id).limit(_SAID))
                return [json.loads(body) for body in bodies]
        except sa.exc.SQLAlchemyError as error:
            raise self._broken("read", error) from error

    def audit(self, job: str, *, after: int = 0, limit: int = 1000) -> list[dict[str, Any]]:
        """A job's audit trail, oldest first.

        Args:
            job: its name.
            after: give only lines whose `id` is above it.
            limit: give at most so many.

        Raises:
            StoreError: it cannot be read.
        """
        return self._page(tables.audit, job, after, limit)

    def told_of(self) -> set[str]:
        """Ids of the incidents that a webhook was told of, or will not be.

        Raises:
            StoreError: they cannot be read.
        """
        try:
            with self._connected().begin():
                return set(self._connected().scalars(sa.select(tables.told.c.incident)))
        except sa.exc.SQLAlchemyError as error:
            raise self._broken("read", error) from error

    def keep_told(self, incident: str, outcome: str, at: float) -> None:
        """Remember what became of telling of an incident.

        Raises:
            StoreError: it is not stored.
        """
        try:
            with self._connected().begin():
                self._upsert(tables.told, [{"incident": incident, "outcome": outcome, "at": at}])
        except sa.exc.SQLAlchemyError as error:
            raise self._broken("write", error) from error

    def pictures(self) -> dict[str, bytes]:
        """What is drawn of each job, as it was kept.

        Raises:
            StoreError: it cannot be read.
        """
        try:
            with self._connected().begin():
                rows = self._connected().execute(sa.select(tables.picture))
                return {row.job: row.packed for row in rows}
        except sa.exc.SQLAlchemyError as error:
            raise self._broken("read", error) from error

    def keep_pictures(self, packed: Mapping[str, bytes]) -> None:
        """Keep what is drawn of these jobs.

        Raises:
            StoreError: it is not stored.
        """
        rows = [{"job": job, "packed": content} for job, content in packed.items()]
        try:
            with self._connected().begin():
                self._upsert(tables.picture, rows)
        except sa.exc.SQLAlchemyError as error:
            raise self._broken("write", error) from error

    def close(self) -> None:
        """Let go of the database."""
        self._disconnect()
        self._engine.dispose()

    def _page(self, table: sa.Table, job: str, after: int, limit: int) -> list[dict[str, Any]]:
        """Rows of a log, in the order in which they were added."""
        wanted = (
            sa.select(table).where(table.c.job == job, table.c.id > after).order_by(table.c.id).limit(limit)
        )
        try:
            with self._connected().begin():
                return [dict(row) for row in self._connected().execute(wanted).mappings()]
        except sa.exc.SQLAlchemyError as error:
            raise self._broken("read", error) from error

    def _connected(self) -> sa.Connection:
        if self._connection is None:
            self._connection = self._engine.connect()
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _broken(self, what: str, error: Exception) -> StoreError:
        """The next use connects anew: whatever was wrong may be over by then."""
        self._disconnect()
        cause = getattr(error, "orig", None) or error
        return StoreError(f"cannot {what} the store {self._engine.url.database}: {cause}")

    def _append(self, table: sa.Table, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows but those that are there: what failed for one row would fail for ever, and hold up all."""
        rows = list(rows)
        if rows:
            insert = _inserting(self._engine.dialect.name)(table)
            self._connected().execute(insert.on_conflict_do_nothing(), rows)

    def _upsert(self, table: sa.Table, rows: Iterable[Mapping[str, Any]]) -> None:
        rows = list(rows)
        if not rows:
            return
        insert = _inserting(self._engine.dialect.name)(table)
        keys = list(table.primary_key.columns)
        values = {column.name: insert.excluded[column.name] for column in table.c if column not in keys}
        self._connected().execute(insert.on_conflict_do_update(index_elements=keys, set_=values), rows)


def _inserting(dialect: str) -> Any:
    """The dialect's own `insert`, which knows ON CONFLICT."""
    if dialect == "postgresql":
        from sqlalchemy.dialects import postgresql

        return postgresql.insert
    from sqlalchemy.dialects import sqlite

    return sqlite.insert


def _driver_options(url: str, busy_seconds: float) -> dict[str, Any]:
    if not url.startswith("sqlite"):
        return {}
    # The one thread that uses it is not always the one that opened it.
    return {"connect_args": {"check_same_thread": False, "timeout": busy_seconds}}


def _make_durable(connection: Any, _record: object) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()


def _alembic_config() -> Config:
    # Its very import tells of its plugins, which is nothing to whoever runs a collector.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from alembic.config import Config

    config = Config()
    folder = importlib.resources.files("gradwatch.collector") / "migrations"
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config
