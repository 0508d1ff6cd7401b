"""One spool: what of it is to be sent next, and what has been acknowledged."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from typing import TYPE_CHECKING

from gradwatch.agent.probe import spool
from gradwatch.agent.sidecar import coalesce, cursor, tail, wire
from gradwatch.protos.v1 import gradwatch_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

_log = logging.getLogger(__name__)

# Of one journal per report: a rank that floods must not hold up the others.
JOURNAL_BYTES = 256 << 10
UNKNOWN_ENUM = "unknown_enum"


@dataclasses.dataclass(frozen=True)
class Part:
    """What one journal gives to a report.

    Attributes:
        name: the journal.
        batch: its records; None when there are none.
        progress: its progress; None when that is not due.
        after: the cursor once this part is acknowledged.
    """

    name: str
    batch: pb.Batch | None
    progress: pb.Progress | None
    after: cursor.Cursor

    @property
    def size(self) -> int:
        """Bytes on the wire, about."""
        return sum(message.ByteSize() for message in (self.batch, self.progress) if message is not None)


@dataclasses.dataclass(frozen=True)
class Remainder:
    """What of a spool the collector does not have yet."""

    journals: int
    unread_bytes: int

    @property
    def nothing(self) -> bool:
        """Whether the collector has it all."""
        return not self.journals and not self.unread_bytes


class Harvest:
    """Collects parts of one spool, and remembers which were acknowledged.

    Args:
        folder: the spool; this process holds its sidecar.lock.
        open_journals: names of those that this process itself holds open, at any moment. Their progress
            files are not touched: whoever closes a file lets go of his own locks on it.
    """

    def __init__(self, folder: Path, open_journals: Collection[str] = ()) -> None:
        self.folder = folder
        self._open_journals = open_journals
        self.behind = False
        self._cursors = cursor.load(folder)
        self._sent: dict[str, coalesce.Sent] = {}
        self._parsed: dict[str, pb.Progress] = {}
        self._first = 0
        self._said: set[str] = set()

    def collect(self, now: float, max_bytes: int) -> list[Part]:
        """Read what is new. `behind` then tells whether there was more than that.

        Args:
            now: monotonic seconds.
            max_bytes: of the parts together, about; at least one part is given if there is one.

        Raises:
            FileNotFoundError: the spool is gone.
        """
        names = [name for name in tail.list_journals(self.folder) if not self._cursor(name).closed]
        liveness = {}
        for name in names:
            with self._reported(name):
                liveness[name] = self._liveness(name)
        # Listed again: a segment that appeared before its process ended must be seen.
        segments = tail.list_journals(self.folder)
        self.behind = False
        # Who comes first rotates, so that nobody starves when `max_bytes` is small.
        self._first += 1
        start = self._first % len(names) if names else 0
        parts: list[Part] = []
        size = 0
        for name in names[start:] + names[:start]:
            if name not in liveness:
                continue
            if size >= max_bytes:
                self.behind = True
                break
            with self._reported(name):
                part = self._part(name, segments.get(name, []), liveness[name], now)
                if part is not None:
                    parts.append(part)
                    size += part.size
        return parts

    def commit(self, parts: list[Part], now: float) -> None:
        """Note that the collector has acknowledged `parts`, and delete what is shipped."""
        for part in parts:
            self._cursors[part.name] = part.after
            if part.progress is not None:
                self._sent[part.name] = coalesce.Sent(part.progress, now)
        try:
            cursor.save(self.folder, self._cursors)
        except OSError as error:
            self._say_once("cursors", "cannot remember what is shipped in %s: %s", self.folder, error)
        else:
            self._said.discard("cursors")
        with contextlib.suppress(FileNotFoundError):
            segments = tail.list_journals(self.folder)
            for part in parts:
                with self._reported(part.name):
                    position = tail.Position(part.after.segment, part.after.offset)
                    tail.delete_shipped(self.folder, part.name, segments.get(part.name, []), position)

    def remainder(self) -> Remainder:
        """Measure what is not acknowledged. Journals of living processes count with their bytes only."""
        journals = unread = 0
        with contextlib.suppress(OSError):
            for name, segments in tail.list_journals(self.folder).items():
                at = self._cursor(name)
                if at.closed:
                    continue
                left = tail.unread_bytes(self.folder, name, segments, tail.Position(at.segment, at.offset))
                ended = name not in self._open_journals and not spool.is_locked(
                    self.folder / spool.progress_filename(name)
                )
                unread += left
                journals += bool(left or ended)
        return Remainder(journals, unread)

    def all_closed(self) -> bool:
        """Whether every process that wrote here is gone and the collector has all it wrote.

        Raises:
            FileNotFoundError: the spool is gone.
        """
        names = tail.list_journals(self.folder)
        return all(self._cursor(name).closed for name in names)

    def _liveness(self, name: str) -> tail.Liveness:
        if name in self._open_journals:
            return tail.Liveness(ended=False, progress=None)
        return tail.read_liveness(self.folder, name)

    def _cursor(self, name: str) -> cursor.Cursor:
        return self._cursors.get(name, cursor.Cursor())

    def _part(self, name: str, segments: list[int], liveness: tail.Liveness, now: float) -> Part | None:
        before = self._cursor(name)
        chunk = tail.read_lines(
            self.folder,
            name,
            segments,
            tail.Position(before.segment, before.offset),
            ended=liveness.ended,
            max_bytes=JOURNAL_BYTES,
        )
        records: list[pb.Record] = []
        malformed = before.malformed + chunk.malformed
        unknown = before.unknown_enums
        for line in chunk.lines:
            read = wire.read_record(line)
            if read is None:
                malformed += 1
                _log.warning("skipped a line of %s that cannot be read: %.120r", name, line)
            else:
                records.append(read.record)
                unknown += read.unknown_enums
        after = cursor.Cursor(chunk.position.segment, chunk.position.offset, malformed, unknown)
        progress = self._progress(name, liveness, after)
        if not chunk.at_end:
            # A watermark vouches for all records before it: it goes with the last of them.
            self.behind = True
            progress = None
        elif progress is not None:
            if coalesce.due(self._sent.get(name), progress, now, records=bool(records)).now:
                after = dataclasses.replace(after, closed=liveness.ended)
            else:
                progress = None
        if progress is None and after == before:
            return None
        incarnation = tail.incarnation_of(name)
        batch = pb.Batch(incarnation=incarnation, records=records) if records else None
        return Part(name, batch, progress, after)

    def _progress(self, name: str, liveness: tail.Liveness, after: cursor.Cursor) -> pb.Progress | None:
        """The journal's progress with what only the sidecar knows; None when it has none yet."""
        parsed = None if liveness.progress is None else wire.read_progress(liveness.progress)
        if parsed is not None:
            self._parsed[name] = parsed
        known = self._parsed.get(name)
        if known is None and not liveness.ended and not after.malformed:
            return None
        progress = pb.Progress()
        if known is not None:
            progress.CopyFrom(known)
        progress.incarnation = tail.incarnation_of(name)
        progress.ended = liveness.ended
        progress.malformed_lines = after.malformed
        if after.unknown_enums:
            progress.dropped[UNKNOWN_ENUM] += after.unknown_enums
        return progress

    @contextlib.contextmanager
    def _reported(self, name: str) -> Iterator[None]:
        """A journal that cannot be read is said once and tried again; the others go on."""
        try:
            yield
        except OSError as error:
            self._say_once(name, "cannot read journal %s in %s: %s", name, self.folder, error)

    def _say_once(self, subject: str, message: str, *values: object) -> None:
        if subject not in self._said:
            self._said.add(subject)
            _log.warning(message, *values)
