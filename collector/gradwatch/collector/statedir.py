"""The state directory: who holds it, and where that collector listens.

A collector holds an exclusive flock on `collector.lock` for its life, so the kernel lets
go of it however the process ends. A reader takes the same lock shared.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
import uuid
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import platformdirs

from gradwatch.collector.errors import StateDirError, StateDirInUseError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LOCK = "collector.lock"
INFO = "collector.json"
ID = "collector.id"
DATABASE = "collector.db"
# Someone who only reads, or a collector that is just ending, lets go soon.
_PATIENCE_SECONDS = 2.0


@dataclass(frozen=True)
class CollectorInfo:
    """What `collector.json` says of the collector that runs.

    Attributes:
        id: of the state directory, the same for each collector that holds it.
        grpc: HOST:PORT.
        grpc_tls: whether it speaks TLS there.
        http: URL.
        started_at: RFC 3339, UTC.
    """

    pid: int
    grpc: str
    grpc_tls: bool
    http: str
    started_at: str
    version: str
    id: str = ""


def default_state_dir() -> Path:
    """`$XDG_STATE_HOME/gradwatch`, by default `~/.local/state/gradwatch`."""
    return platformdirs.user_state_path("gradwatch", appauthor=False)


def holder(state_dir: Path) -> CollectorInfo | None:
    """The collector that holds the directory and is ready; None when there is none."""
    try:
        fd = os.open(state_dir / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return read_info(state_dir)
    finally:
        os.close(fd)
    return None


def read_info(state_dir: Path) -> CollectorInfo | None:
    """Read `collector.json`; None when it is absent or of no use."""
    try:
        # One of an earlier version has no id.
        document = {"id": "", **json.loads((state_dir / INFO).read_text())}
        return CollectorInfo(**{name: document[name] for name in CollectorInfo.__dataclass_fields__})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def identity(state_dir: Path) -> str:
    """The state directory's id, made when there is none; to be asked by who holds the directory.

    A port that one collector has left may be another's a moment later: by the id a sidecar knows that it is.

    Raises:
        StateDirError: it can be neither read nor written.
    """
    path = state_dir / ID
    try:
        if path.exists() and (known := path.read_text("ascii", "replace").strip()):
            return known
        made = uuid.uuid4().hex
        scratch = path.with_suffix(".tmp")
        scratch.write_text(made + "\n")
        scratch.replace(path)
    except OSError as error:
        raise StateDirError(f"cannot use {path}: {error.strerror}") from error
    return made


def write_info(state_dir: Path, info: CollectorInfo) -> None:
    """Write `collector.json`; a reader sees all of it or the one before."""
    path = state_dir / INFO
    scratch = path.with_suffix(f".{info.pid}.tmp")
    scratch.write_text(json.dumps(asdict(info)) + "\n")
    scratch.replace(path)


def remove_info(state_dir: Path) -> None:
    """Take `collector.json` away."""
    with contextlib.suppress(OSError):
        (state_dir / INFO).unlink()


@contextlib.contextmanager
def held(state_dir: Path, *, shared: bool = False, patience: float = _PATIENCE_SECONDS) -> Iterator[None]:
    """Hold the directory's lock.

    Args:
        state_dir: must exist.
        shared: with others that only read.
        patience: seconds to wait for who holds it.

    Raises:
        StateDirInUseError: another collector holds it.
        StateDirError: the lock file cannot be opened.
    """
    path = state_dir / LOCK
    try:
        flags = os.O_RDONLY if shared else os.O_RDWR | os.O_CREAT
        fd = os.open(path, flags | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise StateDirError(f"cannot open {path}: {error.strerror}; give another --state-dir") from error
    try:
        _take(fd, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, state_dir, time.monotonic() + patience)
        if not shared:
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(fd)


def _take(fd: int, kind: int, state_dir: Path, deadline: float) -> None:
    while not _try_flock(fd, kind):
        if time.monotonic() >= deadline:
            raise StateDirInUseError(f"{state_dir} is in use by {_who(fd, state_dir)}")
        time.sleep(0.05)


def _try_flock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _who(fd: int, state_dir: Path) -> str:
    info = read_info(state_dir)
    if info is not None:
        return f"a collector (pid {info.pid}, {info.http}); use that one, or give another --state-dir"
    pid = os.pread(fd, 32, 0).decode(errors="replace").strip()
    return f"another collector (pid {pid or 'unknown'}); stop it, or give another --state-dir"
