"""What sidecars are shown of their jobs: each document is made once, for all who want it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gradwatch.collector import document
from gradwatch.collector.policy.dossier import Dossier
from gradwatch.collector.recovery.orders import order_for, task_for

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator

    from gradwatch.collector.engine import Engine
    from gradwatch.collector.recovery.orders import Order, Task

_log = logging.getLogger(__name__)

# A job that changes with every round is shown at most so often.
INTERVAL_SECONDS = 0.2
# The documents of very large jobs may take so much of the time, and no more.
_BUSY_SHARE = 0.1
# What a gRPC client takes by default is 4 MiB.
MAX_BYTES = 3 << 20
# To make the documents of thousands, and then to leave them out, takes longer than a launcher waits.
MAX_INCIDENTS = 1000


@dataclass(eq=False)
class Subscription:
    """What one sidecar has not been sent yet.

    Attributes:
        jobs: those it wants; see `Board.want`.
        launches: whose orders and tasks it wants.
        event: set while there is something.
    """

    jobs: set[str] = field(default_factory=set)
    launches: set[str] = field(default_factory=set)
    event: asyncio.Event = field(default_factory=asyncio.Event)
    _waiting: dict[str, bytes] = field(default_factory=dict)
    _told: dict[str, tuple[Order | None, Task | None]] = field(default_factory=dict)
    _to_tell: dict[tuple[str, type], Order | Task] = field(default_factory=dict)

    def tell(self, launch: str, order: Order | None, task: Task | None) -> None:
        """Have these sent, as far as they are news."""
        told_order, told_task = self._told.get(launch, (None, None))
        if order is not None and order != told_order:
            self._to_tell[launch, type(order)] = order
            self.event.set()
        if task is not None and task != told_task:
            self._to_tell[launch, type(task)] = task
            self.event.set()
        self._told[launch] = (order or told_order, task or told_task)

    def take_orders(self) -> list[Order | Task]:
        """What is to be told now."""
        waiting, self._to_tell = self._to_tell, {}
        return [*waiting.values()]

    def put(self, job: str, status: bytes) -> None:
        """Have it sent, in place of an older one."""
        self._waiting[job] = status
        self.event.set()

    def take(self) -> dict[str, bytes]:
        """What is to be sent now, by job."""
        waiting, self._waiting = self._waiting, {}
        self.event.clear()
        return waiting


class Board:
    """Makes the documents of jobs that changed.

    Args:
        engine: whose jobs.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._subscriptions: set[Subscription] = set()
        self._changed: set[str] = set()
        self._event = asyncio.Event()
        engine.listeners.append(self._note)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Show what changes, until the block ends."""
        showing = asyncio.create_task(self._show())
        try:
            yield
        finally:
            showing.cancel()
            await asyncio.wait({showing})

    @contextlib.contextmanager
    def subscribed(self) -> Iterator[Subscription]:
        """Be shown jobs within the block."""
        subscription = Subscription()
        self._subscriptions.add(subscription)
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)

    def want(self, subscription: Subscription, jobs: Iterable[str], launches: Iterable[str]) -> None:
        """Show these jobs too, and how they are now; tell what these launches are to do."""
        subscription.jobs.update(jobs)
        subscription.launches.update(launches)
        for job in subscription.jobs & self._engine.state.jobs.keys():
            subscription.put(job, self._document(job))
        self._tell(subscription, subscription.jobs)

    def _note(self, jobs: set[str]) -> None:
        self._changed |= jobs
        self._event.set()
        # Documents can wait, orders do not.
        for subscription in self._subscriptions:
            self._tell(subscription, jobs)

    def _tell(self, subscription: Subscription, jobs: set[str]) -> None:
        state = self._engine.state
        for job in jobs & subscription.jobs & state.jobs.keys():
            dossier = self._engine.dossiers.get(job, Dossier(job))
            for launch in subscription.launches & state.jobs[job].launches.keys():
                try:
                    order, task = order_for(state, dossier, launch), task_for(state, dossier, launch)
                except Exception:
                    _log.exception("a bug: what launch %s of job %s is to do cannot be told", launch, job)
                    continue
                subscription.tell(launch, order, task)

    async def _show(self) -> None:
        while True:
            await self._event.wait()
            changed, self._changed = self._changed, set()
            self._event.clear()
            began = time.monotonic()
            for job in sorted(changed):
                self._show_to_all(job)
            spent = time.monotonic() - began
            await asyncio.sleep(max(INTERVAL_SECONDS, spent / _BUSY_SHARE))

    def _show_to_all(self, job: str) -> None:
        wanting = [one for one in self._subscriptions if job in one.jobs]
        if not wanting:
            return
        try:
            status = self._document(job)
        except Exception:
            _log.exception("a bug: the status of job %s cannot be shown", job)
            return
        for subscription in wanting:
            subscription.put(job, status)

    def _document(self, job: str) -> bytes:
        engine = self._engine
        return document.as_json(
            document.job(engine.state, job, engine.books, newest=MAX_INCIDENTS), MAX_BYTES
        )
