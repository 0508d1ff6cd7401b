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
from typing import TYPE_CHECKING, Any, TypeVar

from gradwatch.collector.errors import StoreError
from gradwatch.collector.fold import fold, tick
from gradwatch.collector.model import Changes, FoldConfig, State, apply
from gradwatch.collector.observations import DropReason

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from gradwatch.collector.observations import Report
    from gradwatch.collector.store import Store

_T = TypeVar("_T")

_log = logging.getLogger(__name__)

TICK_SECONDS = 1.0
# Reports that wait for the writer; beyond it the streams wait.
_QUEUE = 256


class Engine:
    """Holds the state, and is the only one to change it.

    Args:
        store: is used on this engine's thread only.
        config: for the pure part.
        clock: the collector's time, in seconds since the epoch.

    Attributes:
        on_change: called with the names of jobs that changed.
        state: what the collector knows; replaced as a whole.
        healthy: whether the last write to the store succeeded.
    """

    def __init__(self, store: Store, config: FoldConfig, clock: Callable[[], float] = time.time) -> None:
        self.on_change: Callable[[set[str]], None] = lambda _jobs: None
        self.state = State()
        self.healthy = False
        self._store = store
        self._config = config
        self._clock = clock
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="gradwatch-store")
        self._queue: asyncio.Queue[tuple[Report, asyncio.Future[None]] | None] = asyncio.Queue(_QUEUE)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Read the state back, then write until the block ends; what was accepted by then is stored.

        Raises:
            StoreError: the store cannot be opened.
        """
        try:
            await self._in_thread(self._store.migrate)
            self.state = await self._in_thread(self._store.load)
            self.healthy = True
            writer = asyncio.create_task(self._write())
            try:
                yield
            finally:
                await self._queue.put(None)
                await writer
        finally:
            await self._in_thread(self._store.close)
            self._thread.shutdown()

    async def ingest(self, report: Report) -> None:
        """Take a report in. When this returns, everything in it is on disk.

        Cancelling the caller does not undo it.

        Raises:
            StoreError: nothing of it is stored, and the state is as it was.
        """
        stored: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        await self._queue.put((report, stored))
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
            report, stored = item
            try:
                await self._store_and_swap(self._fold(report))
            except Exception as error:
                if not stored.done():
                    stored.set_exception(error)
            else:
                if not stored.done():
                    stored.set_result(None)

    async def _tick(self) -> None:
        try:
            await self._store_and_swap(tick(self.state, self._config, self._clock()))
        except StoreError as error:
            _log.warning("%s", error)
        except Exception:
            _log.exception("a bug: the passing of time could not be taken in")

    def _fold(self, report: Report) -> Changes:
        try:
            return fold(self.state, report, self._config, self._clock())
        except Exception:
            # Sent again it would fail again, for ever, and hold up all that comes after it.
            _log.exception("a bug: a report could not be taken in, and is dropped")
            reason = DropReason.INTERNAL_ERROR.value
            return Changes(strays={reason: self.state.strays.get(reason, 0) + 1})

    async def _store_and_swap(self, changes: Changes) -> None:
        if not changes:
            return
        try:
            await self._in_thread(lambda: self._store.commit(changes))
        except Exception as error:
            if self.healthy:
                _log.error("nothing is acknowledged until the store works again: %s", error)
            self.healthy = False
            raise
        if not self.healthy:
            _log.info("the store works again")
        self.healthy = True
        self.state = apply(self.state, changes)
        for move in changes.moves:
            _log.info(
                "incident %s of job %s is %s: %s", move.incident, move.job, move.status.value, move.because
            )
        self.on_change(_touched_jobs(changes))

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _touched_jobs(changes: Changes) -> set[str]:
    return {
        *changes.jobs,
        *(attempt.job for attempt in changes.attempts),
        *(journal.job for journal in changes.journals.values() if journal.job is not None),
        *(incident.attempt.job for incident in changes.incidents.values()),
    }
