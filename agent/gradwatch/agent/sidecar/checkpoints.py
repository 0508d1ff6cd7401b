"""Looking after the checkpoints below one root, as the collector asks.

A task of its own beside the shipping: whatever happens in it stays in it. What it finds goes into a journal
of its own, which is shipped like any other.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime as dt
import logging
import time
from typing import TYPE_CHECKING, Any

from gradwatch.agent.checkpoints.place import Folder
from gradwatch.agent.checkpoints.run import run_scans
from gradwatch.agent.checkpoints.survey import Seen, Survey, survey
from gradwatch.agent.probe import spool
from gradwatch.agent.probe.journal import Journal
from gradwatch.agent.sidecar import checkpoint_record
from gradwatch.agent.sidecar.checkpoint_memory import Memory, due_now, due_while_watching, learned
from gradwatch.agent.sidecar.set_aside import set_aside
from gradwatch.agent.sidecar.threads import in_thread
from gradwatch.protos.v1 import gradwatch_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from gradwatch.agent.checkpoints.place import Place
    from gradwatch.agent.checkpoints.result import Layout, ScanResult

_log = logging.getLogger(__name__)

# Looking takes at most this share of the time, however many files there are.
_SHARE = 0.05
# After so long it is looked which checkpoints are the newest by now.
_BATCH_SECONDS = 30.0
_RETRY_SECONDS = 1.0
_FIRST_FAILURE_SECONDS = 10.0
_LAST_FAILURE_SECONDS = 300.0
_REWRITTEN = "rewritten"
_ANSWERED = (pb.TASK_KIND_SCAN, pb.TASK_KIND_QUARANTINE)


@dataclasses.dataclass(frozen=True)
class About:
    """Whose checkpoints they are."""

    job: str
    generation: int
    node: str
    launch: str


class Checkpoints:
    """Watches, scans and sets aside what lies below a root.

    Args:
        place: where they lie, as it was declared.
        layout: what to look for.
        folder: the spool that its journal lies in.
        state_dir: where results are remembered; None to forget them.
        about: gives whose they are; None while no launch has begun in the spool.
        open_journals: names of journals that this process itself holds open.
        wrote: called when there is something new in the journal.
    """

    def __init__(
        self,
        place: Place,
        layout: Layout,
        *,
        folder: Path,
        state_dir: Path | None,
        about: Callable[[], About | None],
        open_journals: set[str],
        wrote: Callable[[], None],
    ) -> None:
        self._place = place
        self._layout = layout
        self._folder = folder
        self._memory = Memory(state_dir, str(place))
        self._about = about
        self._open_journals = open_journals
        self._wrote = wrote
        self._name = spool.sidecar_journal_name(spool.new_incarnation())
        self._journal: Journal | None = None
        self._said: set[str] = set()
        self._whose: About | None = None
        self._root_error: str | None = None
        self._told: dict[str, str] = {}
        self._before: dict[str, str] = {}
        self._task = pb.Task()
        self._answer: dict[str, Any] | None = None
        self._wake = asyncio.Event()
        self._scanning: asyncio.Task[None] | None = None

    def take(self, task: pb.Task) -> None:
        """The collector's newest task takes the place of the one before."""
        if (task.id, task.kind) == (self._task.id, self._task.kind):
            if self._answer is None:
                return  # under way
            done = task.kind == pb.TASK_KIND_QUARANTINE and not self._answer["error"]
            if done:
                self._tell("task_done", self._answer)
                return
        self._task = task
        self._answer = None
        if self._scanning is not None and task.kind == pb.TASK_KIND_QUARANTINE:
            self._scanning.cancel()
        self._wake.set()

    async def run(self) -> None:
        """Do as the tasks say, until cancelled."""
        failures = 0
        while True:
            task = self._task
            try:
                wait = await self._turn(task)
                failures = 0
            except Exception as error:
                failures += 1
                wait = min(_FIRST_FAILURE_SECONDS * 2 ** (failures - 1), _LAST_FAILURE_SECONDS)
                await self._failed(task, error)
            if task is self._task:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), wait)
            self._wake.clear()

    def close(self) -> None:
        """Close the journal, so that its end can be shipped."""
        if self._journal is not None:
            self._journal.close()
        self._open_journals.discard(self._name)

    async def _turn(self, task: pb.Task) -> float | None:
        """One look, or one task; gives how long there is nothing to do then, None for ever."""
        if self._journal is None and not await self._open():
            return _RETRY_SECONDS
        if task.kind == pb.TASK_KIND_WATCH:
            return await self._watch(task)
        if task.kind not in _ANSWERED:
            return await self._check_root()
        if self._answer is None:
            moved: Sequence[str] = ()
            if task.kind == pb.TASK_KIND_SCAN:
                error = await self._scan_all(task)
            else:
                error, moved = await self._set_aside(task)
            if task is self._task:
                await self._answer_with(task, error, moved)
        return None

    async def _open(self) -> bool:
        self._whose = self._about()
        if self._whose is None:
            return False
        self._open_journals.add(self._name)
        try:
            self._journal = Journal(self._folder, self._name)
        except OSError as error:
            self._open_journals.discard(self._name)
            self._say_once("journal", "cannot write a journal in %s: %s", self._folder, error)
            return False
        await in_thread(self._memory.load)
        await self._check_root()
        return True

    # ---------------------------------------------------------------- tasks

    async def _watch(self, task: pb.Task) -> float:
        began = time.monotonic()
        found = await self._look()
        took = time.monotonic() - began
        if found is None:
            return self._place.poll_seconds
        due = due_while_watching(found.seen.values(), self._before, self._memory.known, time.time())
        self._before = {path: seen.fingerprint for path, seen in found.seen.items()}
        if due:
            await self._scan(task, due, time.monotonic() + _BATCH_SECONDS)
        self._tell_root("")
        return max(self._place.poll_seconds, took / _SHARE)

    async def _scan_all(self, task: pb.Task) -> str:
        found = await self._look()
        if found is None:
            return self._root_error or "the root cannot be read"
        due = due_now(found.seen.values(), self._memory.known)
        if due:
            await self._scan(task, due, None)
        self._tell_root("")
        return ""

    async def _set_aside(self, task: pb.Task) -> tuple[str, list[str]]:
        at = dt.datetime.now(dt.timezone.utc).isoformat(timespec="milliseconds")
        paths = list(task.paths)
        place = self._place
        if not isinstance(place, Folder):
            return f"checkpoints of {place} are marked, and never moved", []
        done = await in_thread(lambda: set_aside(place.root, task.id, paths, task.reason, at))
        moved = set(done.moved)
        for path in [path for path in self._memory.there if path in moved]:
            self._forget(path)
        if moved:
            await self._save()
        return done.error, [place.address(path) for path in done.moved]

    async def _answer_with(self, task: pb.Task, error: str, paths: Sequence[str]) -> None:
        kind = pb.TaskKind.Name(task.kind)
        answer = {"id": task.id, "kind": kind, "error": error, "paths": list(paths)}
        while task is self._task:
            if self._tell("task_done", answer):
                self._answer = answer
                return
            # Somebody waits for this one word.
            await asyncio.sleep(_RETRY_SECONDS)

    async def _failed(self, task: pb.Task, error: Exception) -> None:
        self._say_once(repr(error), "looking after the checkpoints failed: %r", error, exc_info=error)
        words = f"looking after the checkpoints failed: {error!r:.300}"
        self._tell_root(words)
        if (
            task is self._task
            and task.kind in _ANSWERED
            and self._answer is None
            and self._journal is not None
        ):
            await self._answer_with(task, words, ())

    # ---------------------------------------------------------------- looking

    async def _check_root(self) -> float | None:
        """Say whether the root can be read; gives when to look again, None for never."""
        try:
            await in_thread(self._place.check)
        except OSError as error:
            self._tell_root(self._unreadable(error))
            return self._place.poll_seconds
        self._tell_root("")
        return None

    async def _look(self) -> Survey | None:
        """See what is there, and tell what is known of it; None when the root cannot be read."""
        try:
            found = await in_thread(lambda: survey(self._place, self._layout))
        except OSError as error:
            self._tell_root(self._unreadable(error))
            return None
        changed = False
        for path, seen in found.seen.items():
            known = self._memory.known.get(path)
            if known is not None and known.fingerprint == seen.fingerprint:
                changed |= self._tell_scanned(seen, known.body)
            elif (
                path in self._memory.there
                and self._told.get(path) != _REWRITTEN
                # What was said of it is no more. At once: a checkpoint that is half overwritten is none.
                and self._tell("checkpoint_scanned", checkpoint_record.rewritten(self._place, seen))
            ):
                self._told[path] = _REWRITTEN
        for path in [path for path in self._memory.there if found.lacks(path)]:
            if self._tell("checkpoint_gone", {"path": self._place.address(path)}):
                self._forget(path)
                changed = True
        if changed:
            await self._save()
        return found

    async def _scan(self, task: pb.Task, due: list[Seen], until: float | None) -> None:
        """Scan one after the other; a newer task ends it after the one under way, or at once if it must."""
        job = self._scanning = asyncio.create_task(self._scan_each(task, due, until))
        try:
            await asyncio.wait({job})
        finally:
            self._scanning = None
            if not job.done():
                job.cancel()
                await asyncio.wait({job})
        if not job.cancelled():
            job.result()

    async def _scan_each(self, task: pb.Task, due: list[Seen], until: float | None) -> None:
        safe = [seen for seen in due if self._place.holds(seen.path)]
        addresses = [self._place.address(seen.path) for seen in safe]
        try:
            async with contextlib.aclosing(run_scans(addresses)) as results:
                for seen in safe:
                    self._learn(seen, await anext(results))
                    if task is not self._task or (until is not None and time.monotonic() > until):
                        return
        finally:
            await self._save()

    def _learn(self, seen: Seen, result: ScanResult) -> None:
        body = checkpoint_record.scanned(self._place, seen, result)
        before = self._memory.known.get(seen.path)
        known = learned(seen, result.completeness, body, before, time.time())
        self._memory.put(seen.path, known)
        self._told.pop(seen.path, None)
        self._tell_scanned(seen, body)

    # ---------------------------------------------------------------- telling

    def _tell_scanned(self, seen: Seen, body: dict[str, Any]) -> bool:
        """Tell what is known of a checkpoint, once; gives whether that made a difference."""
        if self._told.get(seen.path) == seen.fingerprint or not self._tell("checkpoint_scanned", body):
            return False
        self._told[seen.path] = seen.fingerprint
        self._memory.there.add(seen.path)
        return True

    def _tell_root(self, error: str) -> None:
        if self._root_error == error or self._whose is None:
            return
        body = dataclasses.asdict(self._whose) | {"root": str(self._place), "error": error}
        if self._tell("checkpoint_root", body):
            self._root_error = error
            if error:
                self._say_once(error, "%s", error)

    def _tell(self, kind: str, body: dict[str, Any]) -> bool:
        if self._journal is None or not self._journal.append(kind, body):
            if self._journal is not None:
                reasons = ", ".join(self._journal.dropped)
                self._say_once("append", "cannot write to the journal of checkpoints: %s", reasons)
            return False
        self._wrote()
        return True

    def _forget(self, path: str) -> None:
        """It is there no more. Its result is kept: it may come back."""
        self._memory.there.discard(path)
        self._told.pop(path, None)

    def _unreadable(self, error: OSError) -> str:
        return f"cannot read the checkpoints' root {self._place}: {error.strerror or error}"

    async def _save(self) -> None:
        try:
            await in_thread(self._memory.save)
        except OSError as error:
            self._say_once("memory", "cannot remember what is known of the checkpoints: %s", error)

    def _say_once(
        self, subject: str, message: str, *values: object, exc_info: Exception | None = None
    ) -> None:
        if subject not in self._said and len(self._said) < 100:  # noqa: PLR2004
            self._said.add(subject)
            _log.warning(message, *values, exc_info=exc_info)
