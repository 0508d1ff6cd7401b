"""Read a state directory that no collector holds: the same documents as the HTTP API gives."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from gradwatch.collector import document, schema, statedir
from gradwatch.collector.books import Books
from gradwatch.collector.errors import NoStateError, StoreError
from gradwatch.collector.picture.gallery import Gallery
from gradwatch.collector.picture.picture import picture
from gradwatch.collector.picture.timeline import Timeline
from gradwatch.collector.policy.dossier import Dossier
from gradwatch.collector.statedir import CollectorInfo, default_state_dir, holder
from gradwatch.collector.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from gradwatch.collector.model import State
    from gradwatch.collector.picture.schema import PictureDocument

__all__ = ["CollectorInfo", "Reader", "default_state_dir", "holder", "opened"]


class Reader:
    """What a collector has left in a state directory. Made by `opened`.

    Args:
        store: open.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._state: State = store.load()
        self._books = Books(store.load_dossiers())

    def jobs(self) -> list[schema.JobDocument]:
        """All jobs, by name."""
        return document.jobs(self._state, self._books)

    def job(self, name: str) -> schema.JobDocument | None:
        """One job; None when it is not known."""
        return document.job(self._state, name, self._books) if name in self._state.jobs else None

    def picture(self, name: str) -> PictureDocument | None:
        """One job as it is drawn; None when it is not known."""
        known = self._state.jobs.get(name)
        if known is None:
            return None
        gallery = Gallery()
        gallery.hang(self._store.pictures())
        dossier = self._books.dossiers.get(name, Dossier(name))
        return picture(self._state, known, dossier, gallery.timelines.get(name) or Timeline())

    def incidents(
        self, *, job: str | None = None, status: str | None = None, limit: int | None = None
    ) -> list[schema.IncidentDocument]:
        """Incidents, newest first; see `document.incidents`."""
        return document.incidents(self._state, self._books, job=job, status=status, limit=limit)

    def incident(self, id_: str) -> schema.IncidentDocument | None:
        """One incident; None when it is not known."""
        known = self._state.incidents.get(id_)
        return None if known is None else document.incident(known, self._books)

    def events(self, job: str, *, after: int = 0, limit: int = 1000) -> list[schema.EventDocument]:
        """A job's accepted records in the order of their arrival; see `Store.events`."""
        return [document.event(row) for row in self._store.events(job, after=after, limit=limit)]

    def audit(self, job: str, *, after: int = 0, limit: int = 1000) -> list[schema.AuditDocument]:
        """A job's audit trail, oldest first; see `Store.audit`."""
        return [document.audit(row) for row in self._store.audit(job, after=after, limit=limit)]


@contextlib.contextmanager
def opened(state_dir: Path) -> Iterator[Reader]:
    """Open a state directory for reading.

    Raises:
        NoStateError: no collector has ever kept anything there.
        StateDirInUseError: a collector holds it: ask that one; `holder` says where it is.
        StoreError: it cannot be read, or is of another version.
    """
    database = state_dir / statedir.DATABASE
    if not database.exists() or not (state_dir / statedir.LOCK).exists():
        raise NoStateError(
            f"{state_dir} holds no collector's state; give --state-dir, or --url of a collector"
        )
    with statedir.held(state_dir, shared=True, patience=0.0):
        store = Store.in_file(database)
        try:
            if not store.is_current():
                raise StoreError(
                    f"{database} was written by another version; "
                    "start `gradwatch collector` once to bring it up to date"
                )
            yield Reader(store)
        finally:
            store.close()
