"""What lies under a folder: names, sizes, times. Symlinks are named and never followed."""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

QUARANTINE = ".gradwatch-quarantine"
MAX_ENTRIES = 200_000
_MAX_DEPTH = 12


@dataclass(frozen=True)
class File:
    """A regular file.

    Attributes:
        size: in bytes.
        mtime_ns: last change of its content.
        identity: device and inode: a file that was replaced is another one.
        version: what remote storage calls what it holds (an ETag); empty where there is no such thing.
    """

    size: int
    mtime_ns: int
    identity: tuple[int, int] = (0, 0)
    version: str = ""


@dataclass(frozen=True)
class Listing:
    """What was seen under a folder at one moment.

    Attributes:
        files: by path relative to the folder, with slashes.
        symlinks: the paths that are symbolic links, whatever they lead to.
        unread: folders that could not be listed, with the reason.
    """

    files: dict[str, File] = field(default_factory=dict)
    symlinks: frozenset[str] = frozenset()
    unread: dict[str, str] = field(default_factory=dict)

    def below(self, folder: str) -> dict[str, File]:
        """The files under a folder, by path relative to it; "." is the root."""
        if folder == ".":
            return dict(self.files)
        prefix = folder + "/"
        return {path[len(prefix) :]: file for path, file in self.files.items() if path.startswith(prefix)}


def take(root: Path, *, at: str = ".") -> Listing:
    """List all files under `root`, or under its folder `at`, or the single file `at`.

    A root that is itself a symlink is followed: it was declared so. The quarantine is left out.

    Raises:
        OSError: the root, or `at`, cannot be read.
    """
    if at != ".":
        status = (root / at).lstat()
        if stat.S_ISLNK(status.st_mode):
            return Listing({}, frozenset({at}), {})
        if stat.S_ISREG(status.st_mode):
            return Listing({at: _file(status)})
    walk = _Walk(root)
    walk.folder(at, 0)
    while walk.waiting and len(walk.files) + len(walk.symlinks) <= MAX_ENTRIES:
        folder, depth = walk.waiting.pop()
        try:
            walk.folder(folder, depth)
        except OSError as error:
            walk.unread[folder] = error.strerror or str(error)
    for folder, _ in walk.waiting:
        walk.unread[folder] = f"more than {MAX_ENTRIES} files"
    return Listing(walk.files, frozenset(walk.symlinks), walk.unread)


class _Walk:
    def __init__(self, root: Path) -> None:
        self._root = root
        self.files: dict[str, File] = {}
        self.symlinks: set[str] = set()
        self.unread: dict[str, str] = {}
        self.waiting: list[tuple[str, int]] = []

    def folder(self, folder: str, depth: int) -> None:
        with os.scandir(self._root / folder) as entries:
            for entry in entries:
                path = entry.name if folder == "." else f"{folder}/{entry.name}"
                if entry.is_symlink():
                    self.symlinks.add(path)
                elif entry.is_dir(follow_symlinks=False):
                    if entry.name != QUARANTINE and depth < _MAX_DEPTH:
                        self.waiting.append((path, depth + 1))
                elif entry.is_file(follow_symlinks=False):
                    # A file that was deleted meanwhile is not there.
                    with contextlib.suppress(FileNotFoundError):
                        self.files[path] = _file(entry.stat(follow_symlinks=False))


def inside(root: Path, path: Path | str) -> str | None:
    """A path relative to the root it must lie under, with no symlink on the way; None if it does not.

    Args:
        root: the declared root.
        path: absolute, or relative to the root; it need not exist.
    """
    real = Path(os.path.realpath(root))
    asked = Path(os.path.normpath(root / path))
    for base in (root, real):
        try:
            relative = asked.relative_to(os.path.normpath(Path(base).absolute()))
        except ValueError:
            continue
        if Path(os.path.realpath(real / relative)) != real / relative:
            return None
        return str(PurePosixPath(relative))
    return None


def _file(status: os.stat_result) -> File:
    return File(status.st_size, status.st_mtime_ns, (status.st_dev, status.st_ino))
