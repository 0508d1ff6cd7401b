"""Setting checkpoints aside, where no "resume from latest" looks, and bringing them back. Never deletes.

A move is a rename within the file system, into `<root>/.gradwatch-quarantine/ID/`. Its manifest is written
first and says what belongs there; so a process that is killed in between leaves a state from which the same
call goes on, and `restore` goes back.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from gradwatch.agent.checkpoints.listing import QUARANTINE
from gradwatch.agent.checkpoints.moves import (
    Refusal,
    Refused,
    RefusedError,
    folder,
    made,
    move,
    parent,
    refused,
    status,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

MANIFEST = "manifest.json"
_NEW_MANIFEST = f".{MANIFEST}.new"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MAX_MANIFEST = 16 << 20


@dataclass(frozen=True)
class Moved:
    """What was moved, relative to the root; paths that a call before had moved already included."""

    id: str
    paths: tuple[str, ...]


def quarantine(root: Path, identifier: str, paths: Sequence[str], reason: str, at: str) -> Moved | Refused:
    """Move checkpoints out of sight; all of them, or none.

    The same call again finishes what one that was killed has begun.

    Args:
        root: the declared root.
        identifier: a new folder's name; the decision's id.
        paths: files or folders, relative to the root.
        reason: for who finds it; goes into the manifest.
        at: the time, RFC 3339; goes into the manifest.
    """
    try:
        return _set_aside(root, identifier, paths, {"id": identifier, "reason": reason, "at": at})
    except RefusedError as error:
        return error.refused
    except OSError as error:
        return refused(error, f"cannot set checkpoints aside in {root / QUARANTINE}")


def restore(root: Path, identifier: str) -> Moved | Refused:
    """Bring back what a quarantine holds, to where it was; all of it, or nothing.

    Args:
        root: the declared root.
        identifier: the quarantine's.
    """
    try:
        return _bring_back(root, identifier)
    except RefusedError as error:
        return error.refused
    except OSError as error:
        return refused(error, f"cannot restore {identifier} under {root}")


def _set_aside(root: Path, identifier: str, paths: Sequence[str], about: dict[str, Any]) -> Moved:
    _check_id(identifier)
    parts = [_parts(path) for path in paths]
    names = ["/".join(part) for part in parts]
    with folder(root) as top:
        _check_sources(top, identifier, parts)
        with made(top, QUARANTINE) as all_:
            try:
                with made(all_, identifier) as target:
                    _write_manifest(target, {**about, "paths": names})
                    _move_all(top, target, parts)
            except (OSError, RefusedError):
                _tidy(all_, identifier, names)
                raise
    return Moved(identifier, tuple(names))


def _bring_back(root: Path, identifier: str) -> Moved:
    _check_id(identifier)
    with folder(root) as top, contextlib.ExitStack() as opened:
        try:
            all_ = opened.enter_context(folder(QUARANTINE, top))
            source = opened.enter_context(folder(identifier, all_))
        except FileNotFoundError as error:
            where = root / QUARANTINE
            raise RefusedError(
                Refusal.UNKNOWN_ID, f"there is no quarantine {identifier} in {where}"
            ) from error
        names = _read_manifest(source, root, identifier)
        _move_all(source, top, [_parts(name) for name in names])
        _tidy(all_, identifier, names)
    return Moved(identifier, tuple(names))


def _move_all(source: int, target: int, parts: Sequence[tuple[str, ...]]) -> None:
    """Move all, or put back what was moved.

    Raises:
        RefusedError: one could not be moved.
    """
    done: list[tuple[str, ...]] = []
    for part in parts:
        try:
            if move(source, target, part):
                done.append(part)
        except (OSError, RefusedError) as error:  # noqa: PERF203 - it ends the loop
            left = [path for path in reversed(done) if not _moved_back(source, target, path)]
            why = (
                error.refused
                if isinstance(error, RefusedError)
                else refused(error, f"cannot move {'/'.join(part)}")
            )
            raise RefusedError(why.why, why.message, tuple("/".join(path) for path in left)) from error


def _moved_back(source: int, target: int, part: tuple[str, ...]) -> bool:
    try:
        return move(target, source, part)
    except (OSError, RefusedError):
        return False


def _check_sources(top: int, identifier: str, parts: Sequence[tuple[str, ...]]) -> None:
    """Refuse before anything is made: what is not there, is a link, or lies on another file system."""
    device = os.fstat(top).st_dev
    for part in parts:
        path = "/".join(part)
        try:
            with parent(top, part) as above:
                seen = status(above, part[-1])
        except FileNotFoundError:
            seen = None
        if seen is None:
            if _is_there(top, (QUARANTINE, identifier, *part)):
                continue
            raise RefusedError(Refusal.MISSING, f"{path} is not there")
        if stat.S_ISLNK(seen.st_mode):
            raise RefusedError(Refusal.SYMLINK, f"{path} is a symbolic link; name what it leads to")
        if seen.st_dev != device:
            raise RefusedError(
                Refusal.OTHER_FILE_SYSTEM,
                f"{path} is on another file system than the root: it cannot be renamed",
            )


def _is_there(within: int, part: tuple[str, ...]) -> bool:
    try:
        with parent(within, part) as above:
            return status(above, part[-1]) is not None
    except (OSError, RefusedError):
        return False


def _write_manifest(within: int, document: dict[str, Any]) -> None:
    """Write it once; a call that goes on must be about the same paths, less those that never got here.

    Raises:
        RefusedError: the quarantine of that name is about something else.
    """
    known = _load_manifest(within)
    if known is not None:
        before, now = known.get("paths"), document["paths"]
        if before == now:
            return
        known_paths = (
            {path for path in before if isinstance(path, str)} if isinstance(before, list) else set()
        )
        left_out = known_paths - set(now)
        if not set(now) < known_paths or any(_is_there(within, _parts(path)) for path in left_out):
            raise RefusedError(
                Refusal.OCCUPIED, f"there is a quarantine {document['id']} of other checkpoints"
            )
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(_NEW_MANIFEST, flags, 0o644, dir_fd=within), "wb") as file:
        file.write(json.dumps(document, indent=2).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.rename(_NEW_MANIFEST, MANIFEST, src_dir_fd=within, dst_dir_fd=within)


def _load_manifest(within: int) -> dict[str, Any] | None:
    try:
        descriptor = os.open(MANIFEST, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=within)
        with os.fdopen(descriptor, "rb") as file:
            document = json.loads(file.read(_MAX_MANIFEST))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise RefusedError(Refusal.FAILED, f"its manifest is damaged: {error}") from error
    return document if isinstance(document, dict) else {}


def _read_manifest(within: int, root: Path, identifier: str) -> list[str]:
    names = (_load_manifest(within) or {}).get("paths")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        where = root / QUARANTINE / identifier
        raise RefusedError(
            Refusal.FAILED, f"{where / MANIFEST} does not say what belongs where; move it by hand"
        )
    return names


def _tidy(all_: int, identifier: str, names: Sequence[str]) -> None:
    """Remove a quarantine's manifest and folders, if nothing that was moved is in it any more."""
    with contextlib.suppress(OSError, RefusedError):
        with folder(identifier, all_) as target:
            if any(_is_there(target, _parts(name)) for name in names):
                return
            for _, folders, _, descriptor in os.fwalk(".", topdown=False, dir_fd=target):
                for name in folders:
                    os.rmdir(name, dir_fd=descriptor)
            for name in (MANIFEST, _NEW_MANIFEST):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=target)
        os.rmdir(identifier, dir_fd=all_)


def _check_id(identifier: str) -> None:
    if _ID.fullmatch(identifier) is None:
        raise RefusedError(Refusal.BAD_ID, f"{identifier!r:.120} cannot be a quarantine's name")


def _parts(path: str) -> tuple[str, ...]:
    pure = PurePosixPath(path)
    if pure.is_absolute() or not pure.parts or ".." in pure.parts or "\0" in path:
        raise RefusedError(Refusal.OUTSIDE_ROOT, f"{path!r:.200} is not a path below the root")
    if pure.parts[0] == QUARANTINE:
        raise RefusedError(Refusal.OUTSIDE_ROOT, f"{path!r:.200} is in quarantine already")
    return pure.parts
