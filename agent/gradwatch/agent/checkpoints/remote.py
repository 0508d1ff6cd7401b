"""Checkpoints on remote storage, by URL: what fsspec opens, as s3://, gs://, abfs:// or file://.

A listing is asked for as of a folder; to be scanned, a checkpoint is fetched into a folder of this machine,
which is removed again. fsspec, and what it wants for a protocol, is imported where it is needed: whose
checkpoints lie on a file system needs neither.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import posixpath
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradwatch.agent.checkpoints.listing import MAX_ENTRIES, QUARANTINE, File, Listing

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
# Each protocol of fsspec has its own word for when a file was last written, and for what it holds.
_TIMES = ("mtime", "LastModified", "last_modified", "updated", "modified", "created")
_VERSIONS = ("ETag", "etag", "md5Hash", "content_md5", "generation")
_SCRATCH = "gradwatch-fetched-"
# Of the free space on this machine, at most this share is taken.
_SPACE = 0.8


def is_url(text: str) -> bool:
    """Whether something names remote storage rather than a path."""
    return _SCHEME.match(text) is not None


def without_scheme(url: str) -> str:
    """What a file system calls it: s3://bucket/run is bucket/run there."""
    return _SCHEME.sub("", url, count=1).rstrip("/")


def take(url: str) -> Listing:
    """List all files below a URL, or the single file there as ".".

    A prefix of an object store that has nothing below it is an empty folder. The quarantine is left out.

    Raises:
        OSError: the storage cannot be read, or nothing is installed that could.
    """
    with _as_os_errors():
        system, base = _opened(url)
        found: dict[str, Any] = system.find(base, detail=True)
    if len(found) > MAX_ENTRIES:
        raise OSError(f"more than {MAX_ENTRIES} files lie below it")
    # In an object store an object of such a name may stand for a folder.
    files = {posixpath.relpath(name, base): info for name, info in found.items() if not name.endswith("/")}
    return Listing({path: _file(info) for path, info in files.items() if QUARANTINE not in path.split("/")})


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A new folder for what is fetched; what processes that were killed have left of theirs is removed."""
    folder = Path(tempfile.gettempdir())
    for left in folder.glob(f"{_SCRATCH}*-*"):
        pid = left.name.removeprefix(_SCRATCH).partition("-")[0]
        if pid.isdigit() and not Path("/proc", pid).exists():
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{_SCRATCH}{os.getpid()}-", ignore_cleanup_errors=True) as name:
        yield Path(name)


@contextlib.contextmanager
def fetched(url: str, files: Mapping[str, File], scratch: Path) -> Iterator[Path]:
    """The checkpoint at a URL in a folder of this machine, for as long as the context lasts.

    Args:
        url: of a file, or of what is a folder's prefix.
        files: what lies there: `take`.
        scratch: in a new folder of this one, which is removed.

    Yields:
        Where it lies, under its own name.

    Raises:
        OSError: it cannot be read, or does not fit.
    """
    nbytes, free = sum(file.size for file in files.values()), shutil.disk_usage(scratch).free
    if nbytes > free * _SPACE:
        raise OSError(
            f"it has {nbytes} bytes, and {scratch}, to which it is fetched to be scanned, has {free} left: "
            "set TMPDIR to where there is more"
        )
    with tempfile.TemporaryDirectory(dir=scratch) as folder, _as_os_errors():
        system, base = _opened(url)
        local = Path(folder) / posixpath.basename(base)
        for name, file in files.items():
            path = Path(os.path.normpath(local / name))
            if local not in (path, *path.parents):
                raise OSError(f"{name!r:.100} is no name below it")
            path.parent.mkdir(parents=True, exist_ok=True)
            system.get_file(posixpath.normpath(posixpath.join(base, name)), str(path))
            os.utime(path, ns=(file.mtime_ns, file.mtime_ns))
        yield local


def _opened(url: str) -> tuple[Any, str]:
    try:
        import fsspec  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise OSError(f"{url} needs fsspec on this machine: pip install 'gradwatch[remote]'") from error
    try:
        # What was listed once may have changed since.
        system, base = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        raise OSError(f"{url} cannot be opened on this machine: {error}") from error
    return system, str(base).rstrip("/")


@contextlib.contextmanager
def _as_os_errors() -> Iterator[None]:
    """Every library behind fsspec has errors of its own."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error!s:.300}") from error


def _file(info: Mapping[str, Any]) -> File:
    time = next((info[name] for name in _TIMES if info.get(name) is not None), None)
    version = next((str(info[name]) for name in _VERSIONS if info.get(name)), "")
    return File(int(info.get("size") or 0), _nanoseconds(time), version=version)


def _nanoseconds(time: object) -> int:
    """A time in any of the forms that file systems give it, since the epoch; 0 when it is none."""
    if isinstance(time, str):
        try:
            time = dt.datetime.fromisoformat(time.replace("Z", "+00:00"))
        except ValueError:
            return 0
    if isinstance(time, dt.datetime):
        aware = time if time.tzinfo is not None else time.replace(tzinfo=dt.timezone.utc)
        time = aware.timestamp()
    return int(time * 1e9) if isinstance(time, int | float) else 0
