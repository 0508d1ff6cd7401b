"""The journal: append-only JSON lines that outlive a SIGKILL of the process.

A line is the protobuf JSON mapping of `gradwatch.v1.Record`, written by one bare
`os.write` on an O_APPEND descriptor: nothing waits in this process to be lost with it.
The progress file is one line, rewritten in place.

Standard library only.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from typing import TYPE_CHECKING, Any

from gradwatch.agent.probe import spool

if TYPE_CHECKING:
    from pathlib import Path

SEGMENT_BYTES = 4 << 20
TOTAL_BYTES = 64 << 20
# A fixed width lets a rewrite in place never leave the tail of a longer line behind.
PROGRESS_BYTES = 1024


class Journal:
    """The journal of one process.

    Opened by its one writer; a forked child's calls do nothing. Never raises once open:
    what cannot be written is counted in `dropped` by reason.

    Args:
        folder: the spool; must exist.
        name: from `spool.rank_journal_name` or `spool.launch_journal_name`.
        segment_bytes: a segment is closed once it is larger.
        total_bytes: while the segments that nobody has collected hold more than this,
            records are dropped.

    Raises:
        OSError: the spool cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        total_bytes: int = TOTAL_BYTES,
    ) -> None:
        self.name = name
        self.dropped: dict[str, int] = {}
        self.records = 0
        self._folder = folder
        self._segment_bytes = segment_bytes
        self._total_bytes = total_bytes
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._torn = False
        self._index = 0
        self._size = 0
        self._closed_bytes: dict[int, int] = {}
        progress = spool.try_lock(folder / spool.progress_filename(name))
        if progress is None:
            raise OSError(f"journal {name} is held by another process")
        self._progress_fd = progress
        self._fd = self._open_segment()

    @property
    def is_ours(self) -> bool:
        """Whether this process has opened it: a forked child has not."""
        return os.getpid() == self._pid

    def append(self, kind: str, body: dict[str, Any]) -> bool:
        """Write one record.

        Args:
            kind: the record's field in `Record.body`, such as "nonfinite".
            body: that message in the JSON mapping; non-finite floats are translated.

        Returns:
            Whether it is in the file.
        """
        if not self.is_ours:
            return False
        with self._lock:
            if not self._has_room():
                return self._drop("journal_full")
            record = {"seq": self.records, "at": time.time(), kind: body}
            line = _encoded(record).encode() + b"\n"
            # After a torn write the next line starts on a fresh one, so that only the
            # torn one is lost.
            data = b"\n" + line if self._torn else line
            try:
                written = os.write(self._fd, data)
            except OSError as error:
                return self._drop("disk_full" if error.errno in _NO_SPACE else "write_failed")
            self._size += written
            self._torn = written != len(data)
            if written < len(data) - 1:
                return self._drop("disk_full")
            # Also when only the newline is missing: the next write brings it, and this record with it.
            self.records += 1
            if self._size >= self._segment_bytes:
                self._rotate()
            return True

    def progress(self, body: dict[str, Any]) -> None:
        """Rewrite the progress file with a `Progress` message in the JSON mapping."""
        if not self.is_ours:
            return
        line = _encoded(body).encode()
        if len(line) >= PROGRESS_BYTES:
            self._drop("progress_too_long")
            return
        try:
            os.pwrite(self._progress_fd, line.ljust(PROGRESS_BYTES - 1) + b"\n", 0)
        except OSError:
            self._drop("progress_failed")

    def close(self) -> None:
        """Let go of the files; the sidecar then knows that the process is done."""
        if not self.is_ours or self._fd < 0:
            return
        os.close(self._fd)
        os.close(self._progress_fd)
        self._fd = self._progress_fd = -1

    def _open_segment(self) -> int:
        path = self._folder / spool.Segment(self.name, "", self._index).filename
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def _rotate(self) -> None:
        self._closed_bytes[self._index] = self._size
        self._index += 1
        try:
            fd = self._open_segment()
        except OSError:
            # Go on in the old segment: a long file beats a lost record.
            self._index -= 1
            del self._closed_bytes[self._index]
            return
        os.close(self._fd)
        self._fd, self._size = fd, 0

    def _has_room(self) -> bool:
        if sum(self._closed_bytes.values()) + self._size < self._total_bytes:
            return True
        # The sidecar deletes the segments that it has shipped.
        for index in list(self._closed_bytes):
            path = self._folder / spool.Segment(self.name, "", index).filename
            if not path.exists():
                del self._closed_bytes[index]
        return sum(self._closed_bytes.values()) + self._size < self._total_bytes

    def _drop(self, reason: str) -> bool:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        return False


_NO_SPACE = {28, 122}  # ENOSPC, EDQUOT
_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


def _encoded(message: dict[str, Any]) -> str:
    """A message as one line of JSON."""
    try:
        return _ENCODER.encode(message)
    except ValueError:
        # Few hold a number that is not finite, and a walk through all of them costs as much as writing one.
        return _ENCODER.encode(json_safe(message))


def json_safe(value: Any) -> Any:
    """Translate non-finite floats to the strings of the protobuf JSON mapping."""
    if isinstance(value, dict):
        return {key: json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
