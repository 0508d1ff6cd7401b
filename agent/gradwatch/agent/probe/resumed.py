"""Whether the job opens the checkpoint that it was told to go back to, before its first update.

Some scripts take `--resume` and ignore it. The functions by which Python opens files are wrapped until the
checkpoint is seen, and that of safetensors, which opens files by itself. Ranks tell each other by the store
of the job, since often one of them loads for all. Installed only in a process that was told of a checkpoint
on a local path, and not in the children that it forks.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from gradwatch.agent.probe.opened_files import OpenedFiles
from gradwatch.agent.probe.saves import when_imported

if TYPE_CHECKING:
    from types import ModuleType

    from gradwatch.agent.probe.watcher import Watcher

# The part of the probe, for its fuse.
PART = "resumed"


class Resumed:
    """Looks out for the checkpoint's files, until the first update attempt.

    Args:
        watcher: the process's.
        path: of the checkpoint, as the job was told it; None when there is none, or none on a local path.

    Attributes:
        waits: nothing has been written down yet.
    """

    def __init__(self, watcher: Watcher, path: str | None) -> None:
        self._watcher = watcher
        self._path = path
        self._real = "" if path is None else os.path.realpath(path)
        self._opened = False
        self._files = OpenedFiles(self.opens)
        self._published = False
        self.waits = path is not None

    def install(self) -> None:
        """Have each file that is opened told."""
        if not self.waits:
            return
        self._files.begin()
        # Those of a data loader would be told of each file that they open, until they end.
        os.register_at_fork(after_in_child=self._give_up)
        when_imported({"safetensors": self._patch, "safetensors.torch": self._patch})

    def opens(self, path: Any) -> None:
        """A file is being opened. Never raises."""
        if self._opened or not self.waits:
            return
        try:
            real = os.path.realpath(os.fsdecode(path))
        except (TypeError, ValueError, OSError):
            return  # a descriptor, or no path
        self._opened = real == self._real or real.startswith(self._real.rstrip(os.sep) + os.sep)
        if self._opened:
            self._files.end()

    def round_begins(self) -> None:
        """Gradients are about to be reduced: what is told now the other ranks can read after that."""
        if self._published:
            return
        self._published = True
        store = _store()
        if self._opened and store is not None:
            store.set(self._key, "opened")
        self._watcher.clock.resumes(self._by_any_rank())

    def attempted(self) -> None:
        """An update attempt begins, or the process ends."""
        if not self.waits or not self._watcher.watching:
            return
        self.round_begins()
        opened = self._by_any_rank()
        self._give_up()
        self._watcher.clock.resumes(opened)
        self._watcher.append("resumed", {"path": self._path, "opened": opened})

    @property
    def _key(self) -> str:
        return f"gradwatch/resumed/{self._watcher.settings.generation}"

    def _by_any_rank(self) -> bool:
        store = None if self._opened else _store()
        return self._opened or (store is not None and bool(store.check([self._key])))

    def _give_up(self) -> None:
        """Nothing is looked out for any more."""
        self.waits = False
        self._files.end()

    def _patch(self, module: ModuleType) -> None:
        original = getattr(module, "safe_open", None)
        if original is None or hasattr(original, "__wrapped__"):
            return

        @functools.wraps(original)
        def safe_open(*args: Any, **kwargs: Any) -> Any:
            self.opens(args[0] if args else kwargs.get("filename"))
            return original(*args, **kwargs)

        module.safe_open = safe_open  # type: ignore[attr-defined]


def local_path(path: str | None) -> str | None:
    """A path of this machine; None for an address such as `s3://bucket/key`."""
    return path if path and "://" not in path else None


def _store() -> Any:
    """The store of the job; None without one, or with one that cannot be asked."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    try:
        store = dist.distributed_c10d._get_default_store()
        store.check(["gradwatch/resumed"])
    except Exception:
        return None
    return store
