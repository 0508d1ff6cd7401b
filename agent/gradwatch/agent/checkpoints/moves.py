"""Renaming below a folder, along paths that follow no symlink, by directory descriptors."""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Refusal(str, Enum):
    """Why nothing was moved."""

    BAD_ID = "bad_id"
    UNKNOWN_ID = "unknown_id"
    OUTSIDE_ROOT = "outside_root"
    SYMLINK = "symlink"
    MISSING = "missing"
    OCCUPIED = "occupied"
    OTHER_FILE_SYSTEM = "other_file_system"
    DISK_FULL = "disk_full"
    NOT_PERMITTED = "not_permitted"
    FAILED = "failed"


@dataclass(frozen=True)
class Refused:
    """Nothing was moved.

    Attributes:
        why: the reason as a word.
        message: what was wrong, where, and what to do.
        left: what could not be put back either; empty but for a file system that fails twice.
    """

    why: Refusal
    message: str
    left: tuple[str, ...] = ()


class RefusedError(Exception):
    """Carries a `Refused` to where it is returned."""

    def __init__(self, why: Refusal, message: str, left: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.refused = Refused(why, message, left)


def move(source: int, target: int, part: tuple[str, ...]) -> bool:
    """Rename one path from one folder to the same path in another; False if that was done before."""
    name, path = part[-1], "/".join(part)
    with contextlib.ExitStack() as opened:
        above = target
        for step in part[:-1]:
            above = opened.enter_context(made(above, step))
        try:
            below = opened.enter_context(parent(source, part))
            there = status(below, name) is not None
        except FileNotFoundError:
            there = False
        occupied = status(above, name) is not None
        if not there and occupied:
            return False
        if not there:
            raise RefusedError(Refusal.MISSING, f"{path} is not there")
        if occupied:
            raise RefusedError(
                Refusal.OCCUPIED, f"there is another {path} where it should go; move that away first"
            )
        os.rename(name, name, src_dir_fd=below, dst_dir_fd=above)
        return True


@contextlib.contextmanager
def folder(path: Path | str, within: int | None = None) -> Iterator[int]:
    """A folder's descriptor; below another one, no symlink is followed."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (os.O_NOFOLLOW if within is not None else 0)
    try:
        descriptor = os.open(path, flags, dir_fd=within)
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.ENOTDIR}:
            raise RefusedError(
                Refusal.SYMLINK, f"{path} is a symbolic link or no folder; name what it leads to"
            ) from error
        raise
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def made(within: int, name: str) -> Iterator[int]:
    """A folder that is made if it is not there."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, 0o755, dir_fd=within)
    with folder(name, within) as descriptor:
        yield descriptor


@contextlib.contextmanager
def parent(top: int, part: tuple[str, ...]) -> Iterator[int]:
    """The folder that a path below `top` lies in."""
    with contextlib.ExitStack() as opened:
        above = top
        for step in part[:-1]:
            above = opened.enter_context(folder(step, above))
        yield above


def status(within: int, name: str) -> os.stat_result | None:
    """What is in a folder under a name, itself a link or not; None if nothing."""
    try:
        return os.stat(name, dir_fd=within, follow_symlinks=False)
    except FileNotFoundError:
        return None


def refused(error: OSError, what: str) -> Refused:
    """An error of the system, translated."""
    why = {
        errno.EXDEV: Refusal.OTHER_FILE_SYSTEM,
        errno.ENOSPC: Refusal.DISK_FULL,
        errno.EDQUOT: Refusal.DISK_FULL,
        errno.EACCES: Refusal.NOT_PERMITTED,
        errno.EPERM: Refusal.NOT_PERMITTED,
        errno.EROFS: Refusal.NOT_PERMITTED,
        errno.ENOENT: Refusal.MISSING,
    }.get(error.errno or 0, Refusal.FAILED)
    return Refused(why, f"{what}: {error.strerror or error}")
