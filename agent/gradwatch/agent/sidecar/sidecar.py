"""The sidecar's loop: read, report, await the acknowledgement, move on."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import time
from typing import TYPE_CHECKING

from gradwatch.agent.probe import spool
from gradwatch.agent.sidecar import cleanup, cursor, harvest, tail, wire
from gradwatch.agent.sidecar.client import ForbiddenError
from gradwatch.protos.v1 import gradwatch_pb2 as pb

if TYPE_CHECKING:
    from pathlib import Path

    from gradwatch.agent.sidecar.client import Client

_log = logging.getLogger(__name__)

POLL_SECONDS = 0.1
ADOPT_SECONDS = 5.0
# Well under gRPC's default limit of 4 MiB, with room for one long record.
REPORT_BYTES = 512 << 10
# So often at least the collector is asked whether it is there.
ANSWER_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Drained:
    """How a sidecar left its spool.

    Attributes:
        complete: the collector has everything.
        journals: journals it does not have whole.
        unread_bytes: bytes of them that it does not have.
        spool: where those are.
    """

    complete: bool
    journals: int
    unread_bytes: int
    spool: str


class Sidecar:
    """Ships its own spool, and those that earlier runs left beside it.

    Args:
        own: the spool; its sidecar.lock is held by this process.
        neighbours: the folder of all spools on this node, or None to adopt none.
        client: the stream to the collector.

    Attributes:
        open_journals: names of journals in its own spool that this process itself holds open.
    """

    def __init__(self, own: Path, neighbours: Path | None, client: Client) -> None:
        self.open_journals: set[str] = set()
        self._own = harvest.Harvest(own, self.open_journals)
        self._neighbours = neighbours
        self._client = client
        self._adopted: dict[Path, tuple[harvest.Harvest, int]] = {}
        self._forbidden: set[Path] = set()
        self._looked = -ADOPT_SECONDS
        self._answered_at = time.monotonic()
        self._order: pb.Order | None = None
        self._order_error = ""
        # What there was when all was shipped; a process that lived then may end since.
        self._shipped: harvest.Remainder | None = None
        self._wake = asyncio.Event()
        self.draining = asyncio.Event()

    def drain(self) -> None:
        """Ship what is there, then end."""
        self.draining.set()
        self._wake.set()

    def look(self) -> None:
        """There is something new in a journal: do not wait for the next poll."""
        self._wake.set()

    def take(self, directive: pb.Directive) -> None:
        """Leave what the collector says where the launcher looks for it. Never raises."""
        if directive.HasField("status"):
            self._take_status(directive.status)
        if directive.HasField("order"):
            self._order = directive.order
            self._write_order()

    def _write_order(self) -> None:
        """Write the newest order, if it is for a launch of ours; again at the next poll if that fails."""
        order = self._order
        if order is None:
            return
        try:
            if order.launch in tail.list_launches(self._own.folder):
                cursor.replace_file(self._own.folder / spool.ORDER, wire.order_document(order))
            else:
                _log.warning("passed over an order for launch %.40s, which is none of ours", order.launch)
        except FileNotFoundError:
            pass  # the spool is gone, and its launcher with it
        except OSError as error:
            if str(error) != self._order_error:
                self._order_error = str(error)
                _log.warning("cannot write %s: %s; trying again", spool.ORDER, error)
            return
        self._order = None
        self._order_error = ""

    def _take_status(self, status: pb.JobStatus) -> None:
        try:
            cursor.replace_file(self._own.folder / spool.STATUS, status.document)
        except OSError as error:
            _log.warning("cannot write %s: %s", spool.STATUS, error)

    async def ship(self) -> None:
        """Run until `draining` is set and everything is acknowledged."""
        while True:
            self._wake.clear()
            self._write_order()
            draining = self.draining.is_set()
            if await self._ship_once(only_own=draining):
                continue
            if draining:
                # Whoever has ended while the rest was on its way has left something behind, too.
                left = self._own.remainder()
                if left.nothing:
                    await self._client.ask()
                    self._shipped = left
                    return
                await asyncio.sleep(POLL_SECONDS)
                continue
            if not self._client.connected:
                await self._client.connect()
            await self._show_that_it_answers()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._wake.wait(), POLL_SECONDS)

    async def _show_that_it_answers(self) -> None:
        """The launcher takes a collector that it hears nothing of for too long to be gone."""
        now = time.monotonic()
        if now - self._answered_at < ANSWER_SECONDS:
            return
        await self._client.deliver(pb.Report())
        self._answered_at = now
        with contextlib.suppress(OSError):
            os.utime(self._own.folder / spool.STATUS)

    def drained(self) -> Drained:
        """How things stand, for whoever asked us to end."""
        left = self._shipped or self._own.remainder()
        return Drained(left.nothing, left.journals, left.unread_bytes, str(self._own.folder))

    async def _ship_once(self, *, only_own: bool) -> bool:
        """Send one report if there is something; returns whether there is more."""
        now = time.monotonic()
        if now - self._looked >= ADOPT_SECONDS and not only_own:
            self._looked = now
            self._adopt()
        parts = self._collect(self._own, REPORT_BYTES)
        await self._deliver(self._own, parts)
        behind = self._own.behind
        room = REPORT_BYTES - sum(part.size for part in parts)
        for folder, (adopted, _) in [] if only_own else list(self._adopted.items()):
            try:
                parts = adopted.collect(now, room) if room > 0 else []
                # By itself: what an earlier run left may be of a job that we may not report for, which must
                # not keep our own from being taken.
                await self._deliver(adopted, parts, unless_forbidden=True)
            except FileNotFoundError:
                self._release(folder)
                continue
            except ForbiddenError as error:
                _log.warning("leaving alone what an earlier run left in %s: %s", folder, error)
                self._forbidden.add(folder)
                self._release(folder)
                continue
            room -= sum(part.size for part in parts)
            behind = behind or adopted.behind
        self._finish_adopted()
        return behind

    async def _deliver(
        self, source: harvest.Harvest, parts: list[harvest.Part], *, unless_forbidden: bool = False
    ) -> None:
        """Send these parts as one report, and note that they are acknowledged.

        Raises:
            ForbiddenError: as `Client.deliver`.
        """
        report = pb.Report(
            batches=[part.batch for part in parts if part.batch is not None],
            progress=[part.progress for part in parts if part.progress is not None],
        )
        if report.batches or report.progress:
            await self._client.deliver(report, unless_forbidden=unless_forbidden)
        if parts:
            source.commit(parts, time.monotonic())

    def _collect(self, source: harvest.Harvest, room: int) -> list[harvest.Part]:
        try:
            return source.collect(time.monotonic(), room)
        except FileNotFoundError:
            return []

    def _adopt(self) -> None:
        """Take on spools whose processes are gone and which no other sidecar ships."""
        if self._neighbours is None:
            return
        for folder in sorted(self._neighbours.iterdir()):
            if folder == self._own.folder or folder in self._adopted or folder in self._forbidden:
                continue
            with contextlib.suppress(OSError):
                if not is_abandoned(folder):
                    continue
                lock = spool.try_lock(folder / spool.SIDECAR_LOCK)
                if lock is not None:
                    _log.info("shipping what an earlier run left in %s", folder)
                    self._adopted[folder] = (harvest.Harvest(folder), lock)

    def _finish_adopted(self) -> None:
        for folder, (adopted, _) in list(self._adopted.items()):
            with contextlib.suppress(OSError):
                if adopted.all_closed():
                    cleanup.remove_spool(folder)
                    self._release(folder)

    def _release(self, folder: Path) -> None:
        _, lock = self._adopted.pop(folder)
        os.close(lock)


def is_abandoned(folder: Path) -> bool:
    """Whether a run wrote journals here and none of its processes lives."""
    names = tail.list_journals(folder)
    locks = [cleanup.LAUNCHER_LOCK, *(spool.progress_filename(name) for name in names)]
    return bool(names) and not any(spool.is_locked(folder / lock) for lock in locks)
