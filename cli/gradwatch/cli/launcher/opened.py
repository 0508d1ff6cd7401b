"""Whether anybody on this host has opened a checkpoint.

Whether a process has read an environment variable cannot be known; that nobody opened the file it names can.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from pathlib import Path

_IN_OPEN = 0x20
_IN_ISDIR = 0x40000000
_EVENT = struct.Struct("iIII")
_READ_BYTES = 65536
# A checkpoint has few folders; what lies deeper is read together with what does not.
_FOLDERS = 64


class OpenedWatch:
    """Watches a file, or the files below a folder, from now on (inotify; no thread, no process).

    Args:
        path: of the checkpoint.
    """

    def __init__(self, path: str) -> None:
        self._fd = -1
        self._opened = False
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            self._fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
            watched = [
                libc.inotify_add_watch(self._fd, os.fsencode(one), _IN_OPEN) >= 0 for one in _folders(path)
            ]
        except (OSError, AttributeError):
            watched = []
        if self._fd >= 0 and not any(watched):
            self.close()

    def opened(self) -> bool | None:
        """Whether a file was opened since; None when that cannot be known."""
        if self._fd < 0:
            return self._opened or None
        with contextlib.suppress(BlockingIOError):
            # The kernel drops what does not fit into its queue, after the first thousands.
            while not self._opened and (data := os.read(self._fd, _READ_BYTES)):
                self._opened = _has_file(data)
        return self._opened

    def close(self) -> None:
        """Stop watching."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _folders(path: str) -> list[str]:
    found = [path]
    for folder, names, _ in os.walk(path):
        found += [str(Path(folder) / name) for name in names]
        if len(found) >= _FOLDERS:
            break
    return found[:_FOLDERS]


def _has_file(data: bytes) -> bool:
    at = 0
    while at < len(data):
        _, mask, _, length = _EVENT.unpack_from(data, at)
        if not mask & _IN_ISDIR:
            return True
        at += _EVENT.size + length
    return False
