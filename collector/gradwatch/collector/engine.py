"""The thin shell around the pure part: the one writer of the state.

Reports are folded one after the other; what they change is stored before the state is
swapped and the report acknowledged. The store has a thread of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from gradwatch.collector.access.identity import ANYBODY
from gradwatch.collector.access.reports import why_not_taken
from gradwatch.collector.books import Books
from gradwatch.collector.boundary import BoundaryDocument, boundary_of
from gradwatch.collector.errors import ForbiddenError, OperatorError, StoreError
from gradwatch.collector.fold import fold, tick
from gradwatch.collector.model import Changes, FoldConfig, Incident, State, apply
from gradwatch.collector.observations import DropReason
from gradwatch.collector.picture.gallery import Gallery
from gradwatch.collector.policy.decision import Decision
from gradwatch.collector.policy.dossier import Dossier
from gradwatch.collector.recovery.model import Entry
from gradwatch.collector.recovery.operator import operator_rollback
from gradwatch.collector.recovery.think import Thought, think

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from gradwatch.collector.access.identity import Identity
    from gradwatch.collector.observations import Report
    from gradwatch.collector.policies import PolicyBook
    from gradwatch.collector.store import Store

_T = TypeVar("_T")

_log = logging.getLogger(__name__)

TICK_SECONDS = 1.0
PICTURE_SECONDS = 30.0
# Reports that wait for the writer; beyond it the streams wait.
_QUEUE = 256


@dataclass(frozen=True)
class Told:
    """A report, and whose it is."""

    report: Report
    identity: Identity


@dataclass
class Asked:
    """An operator's wish, and what became of it."""

    job: str
    who: str
    decision: Decision | None = None
    refused: str = ""


class Engine:
    """Holds the state, and is the only one to change it.

    Args:
        store: is used on this engine's thread only.
        config: for the pure part.
        policies: those in force.
        clock: the collector's time, in seconds since the epoch.

    Attributes:
        listeners: called with the names of jobs that changed.
        state: what the collector knows; replaced as a whole.
        dossiers: what deciding about a job rests on, by job.
        policies: those in force.
        clock: as given.
        gallery: how the ranks of each job went, as it is drawn.
        healthy: whether the last write to the store succeeded.
    """

    def __init__(
        self,
        store: Store,
        config: FoldConfig,
        policies: PolicyBook,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.listeners: list[Callable[[set[str]], None]] = []
        self.state = State()
        self.dossiers: dict[str, Dossier] = {}
        self.policies = policies
        self.gallery = Gallery()
        self.healthy = False
        self._pictures_at = 0.0
        self._store = store
        self._config = config
        self.clock = clock
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="gradwatch-store")
        self._queue: asyncio.Queue[tuple[Told | Asked, asyncio.Future[None]] | None] = asyncio.Queue(_QUEUE)

    @property
    def books(self) -> Books:
        """What documents tell besides the state."""
        return Books(self.dossiers, self.policies.in_force)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Read the state back, then write until the block ends; what was accepted by then is stored.

        Raises:
            StoreError: the store cannot be opened.
        """
        try:
            await self._in_thread(self._store.migrate)
            self.state = await self._in_thread(self._store.load)
            self.dossiers = await self._in_thread(self._store.load_dossiers)
            self.gallery.hang(await self._in_thread(self._store.pictures))
            self.healthy = True
            writer = asyncio.create_task(self._write())
            try:
                yield
            finally:
                await self._queue.put(None)
                await writer
                await self._keep_pictures()
        finally:
            await self._in_thread(self._store.close)
            self._thread.shutdown()

    async def ingest(self, report: Report, identity: Identity = ANYBODY) -> None:
        """Take a report in. When this returns, everything in it is on disk.

        Cancelling the caller does not undo it.

        Args:
            report: by a sidecar.
            identity: who reports.

        Raises:
            ForbiddenError: something in it is not theirs to report. Nothing of it is taken in.
            StoreError: nothing of it is stored, and the state is as it was.
        """
        await self._hand_over(Told(report, identity))

    async def roll_back(self, job: str, who: str) -> Decision:
        """Roll a job back because an operator asks for it.

        Args:
            job: a known one.
            who: the operator, for the audit trail.

        Raises:
            OperatorError: it cannot be.
            StoreError: nothing is stored, and nothing will be done.
        """
        asked = Asked(job, who)
        await self._hand_over(asked)
        if asked.decision is None:
            raise OperatorError(asked.refused)
        return asked.decision

    async def audit(self, job: str, *, after: int, limit: int) -> list[dict[str, Any]]:
        """A job's audit trail; see `Store.audit`."""
        return await self._in_thread(lambda: self._store.audit(job, after=after, limit=limit))

    async def boundary(self, incident: Incident) -> BoundaryDocument:
        """The parameters around the place where an incident began; see `boundary.boundary_of`."""
        first, attempt = incident.verdict.first, incident.attempt

        def read() -> BoundaryDocument:
            said = [] if first is None else self._store.said(attempt, "nonfinite", rank=first.rank)
            return boundary_of(first, said, self._store.said(attempt, "model"))

        return await self._in_thread(read)

    async def told_of(self) -> set[str]:
        """Incidents that a webhook was told of; see `Store.told_of`."""
        return await self._in_thread(self._store.told_of)

    async def keep_told(self, incident: str, outcome: str) -> None:
        """Remember that; see `Store.keep_told`."""
        now = self.clock()
        await self._in_thread(lambda: self._store.keep_told(incident, outcome, now))

    async def _hand_over(self, item: Told | Asked) -> None:
        stored: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        await self._queue.put((item, stored))
        await stored

    async def events(self, job: str, *, after: int, limit: int) -> list[dict[str, Any]]:
        """A job's accepted records; see `Store.events`."""
        return await self._in_thread(lambda: self._store.events(job, after=after, limit=limit))

    async def _write(self) -> None:
        """Be the one writer, until told to end."""
        next_tick = time.monotonic() + TICK_SECONDS
        while True:
            try:
                item = await asyncio.wait_for(self._queue.get(), max(0.0, next_tick - time.monotonic()))
            except asyncio.TimeoutError:
                next_tick = time.monotonic() + TICK_SECONDS
                await self._tick()
                continue
            if item is None:
                return
            asked, stored = item
            try:
                await self._take(asked)
            except Exception as error:
                if not stored.done():
                    stored.set_exception(error)
            else:
                if not stored.done():
                    stored.set_result(None)

    async def _take(self, item: Told | Asked) -> None:
        now = self.clock()
        if isinstance(item, Asked):
            await self._store_and_swap(self._ask(item, now))
            return
        # Here, where nothing else changes the state: whose a journal is cannot change in between.
        forbidden = why_not_taken(item.identity, item.report, self.state.journals)
        if forbidden is not None:
            raise ForbiddenError(forbidden)
        await self._store_and_swap(self._think(self._fold(item.report, now), now))

    async def _tick(self) -> None:
        now = self.clock()
        reloaded = self.policies.refresh()
        try:
            thought = self._think(tick(self.state, self._config, now), now)
            news = tuple(self._reload_entry(job, now) for job in sorted(reloaded & self.state.jobs.keys()))
            await self._store_and_swap(replace(thought, entries=(*thought.entries, *news)))
            if reloaded:
                self._say_changed(reloaded & self.state.jobs.keys())
            if time.monotonic() - self._pictures_at >= PICTURE_SECONDS:
                self._pictures_at = time.monotonic()
                await self._keep_pictures()
        except StoreError as error:
            _log.warning("%s", error)
        except Exception:
            _log.exception("a bug: the passing of time could not be taken in")

    def _reload_entry(self, job: str, now: float) -> Entry:
        in_force = self.policies.in_force(job)
        if in_force is None:
            text = "no policy is in force any more"
        elif in_force.problems:
            text = f"the policy file does not load, and the one before stays in force: {in_force.problems[0]}"
        else:
            text = f"policy {in_force.hash} is in force"
        return Entry(job, now, "policy", None, text)

    def _fold(self, report: Report, now: float) -> Changes:
        try:
            return fold(self.state, report, self._config, now)
        except Exception:
            # Sent again it would fail again, for ever, and hold up all that comes after it.
            _log.exception("a bug: a report could not be taken in, and is dropped")
            reason = DropReason.INTERNAL_ERROR.value
            return Changes(strays={reason: self.state.strays.get(reason, 0) + 1})

    def _think(self, changes: Changes, now: float) -> Thought:
        try:
            return think(
                self.state,
                self.dossiers,
                changes,
                policy_of=self.policies.policy_of,
                config=self._config,
                now=now,
            )
        except Exception:
            # What was reported is kept all the same.
            _log.exception("a bug: what follows from a report could not be decided")
            return Thought(changes, apply(self.state, changes))

    def _ask(self, asked: Asked, now: float) -> Thought:
        dossier = self.dossiers.get(asked.job, Dossier(asked.job))
        policy = self.policies.policy_of(asked.job)
        wish = operator_rollback(self.state.jobs[asked.job], dossier, policy, asked.who, now)
        if not isinstance(wish, Decision):
            asked.refused = wish
            return Thought(Changes(), self.state)
        asked.decision = wish
        return think(
            self.state,
            self.dossiers,
            Changes(jobs={asked.job: self.state.jobs[asked.job]}),
            policy_of=self.policies.policy_of,
            config=self._config,
            now=now,
            asked=[wish],
        )

    async def _store_and_swap(self, thought: Thought) -> None:
        changes = thought.changes
        if not changes and not thought.dossiers and not thought.entries:
            return
        try:
            await self._in_thread(
                lambda: self._store.commit(changes, thought.dossiers.values(), thought.entries)
            )
        except Exception as error:
            if self.healthy:
                _log.error("nothing is acknowledged until the store works again: %s", error)
            self.healthy = False
            raise
        if not self.healthy:
            _log.info("the store works again")
        self.healthy = True
        self.state = thought.state
        self.dossiers = {**self.dossiers, **thought.dossiers}
        self._draw(changes)
        for move in changes.moves:
            _log.info(
                "incident %s of job %s is %s: %s", move.incident, move.job, move.status.value, move.because
            )
        for entry in thought.entries:
            about = "" if entry.about is None else f" (decision {entry.about})"
            _log.info("job %s: %s%s: %s", entry.job, entry.what, about, entry.text)
        self._say_changed(_touched_jobs(changes) | thought.dossiers.keys())

    def _draw(self, changes: Changes) -> None:
        try:
            self.gallery.see(self.state, changes, self.clock())
        except Exception:
            _log.exception("a bug: what has changed could not be drawn")

    async def _keep_pictures(self) -> None:
        """What is lost of them with a collector that is killed is some seconds of a drawing."""
        packed = self.gallery.unkept()
        if not packed:
            return
        try:
            await self._in_thread(lambda: self._store.keep_pictures(packed))
        except StoreError as error:
            _log.warning("%s", error)

    def _say_changed(self, jobs: set[str]) -> None:
        for listener in self.listeners:
            listener(jobs)

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _touched_jobs(changes: Changes) -> set[str]:
    return {
        *changes.jobs,
        *(attempt.job for attempt in changes.attempts),
        *(journal.job for journal in changes.journals.values() if journal.job is not None),
        *(incident.attempt.job for incident in changes.incidents.values()),
    }
