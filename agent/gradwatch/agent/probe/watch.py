"""The explicit way to be watched, for scripts that want a word in it."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from gradwatch.agent.probe.activate import Probe
    from gradwatch.agent.probe.watcher import Watcher


class Watch:
    """What `watch` returns. Does nothing, at no cost, in a process that is not watched.

    No method raises, whatever happens inside Gradwatch.
    """

    def __init__(self, watcher: Watcher | None) -> None:
        self._watcher = watcher

    @property
    def active(self) -> bool:
        """Whether this process is watched."""
        return self._watcher is not None

    def set_step(self, step: int) -> None:
        """Say which step is under way; from now on it is counted from there."""
        if self._watcher is not None:
            self._guarded(lambda watcher: watcher.clock.set_step(step))

    def tag(self, *, batch: Any) -> None:
        """Say which samples are in the batch under way; an event then names them.

        Args:
            batch: anything that JSON can hold, such as a list of sample ids. None forgets it.
        """
        if self._watcher is not None:
            self._guarded(lambda watcher: watcher.tag(batch))

    def checkpoint_saved(self, path: str | os.PathLike[str], step: int | None = None) -> None:
        """Say that a checkpoint has been written, and at which step."""
        if self._watcher is not None:
            self._guarded(lambda watcher: watcher.checkpoint_saved(os.fspath(path), step))

    def _guarded(self, call: Any) -> None:
        watcher = self._watcher
        if watcher is not None:
            watcher.fuses.call("watch", call, watcher)


def _adopt(probe: Probe, model: Any, optimizer: Any) -> None:
    from torch.nn.parallel import DistributedDataParallel

    if probe.fsdp.knows(model):
        return  # it is watched from its first forward pass on
    if not isinstance(model, DistributedDataParallel):
        probe.single.adopt(model, optimizer)
    elif probe.ddp.model_of(model) is None:
        probe.ddp.adopt(model)


def watch(model: Any = None, optimizer: Any = None, *, load: Callable[[str], object] | None = None) -> Watch:
    """Watch a DistributedDataParallel or `fully_shard` model, or in a process that trains alone any model.

    A job under `gradwatch run` is watched without this call; it is there to set the step, to name
    batches and checkpoints, and for processes in which torch's autoload is switched off.

    Args:
        model: a DistributedDataParallel instance, or a module that `fully_shard` shards; or the module
            itself where it is not distributed.
        optimizer: the one whose `step()` counts as a step; found by its parameters if not given.
        load: loads all that the script needs from the checkpoint at a path. A rollback then needs no
            restart: all ranks call it at the end of the same step. All ranks of the job have to
            give it, since this call is then a collective. See `docs/checkpoints.md`.

    Returns:
        A handle, which does nothing when GRADWATCH_SPOOL is not set. Never raises.
    """
    if not os.environ.get("GRADWATCH_SPOOL"):
        return Watch(None)
    try:
        from gradwatch.agent.probe.activate import activate

        probe = activate()
        if probe is None:
            return Watch(None)
        try:
            if model is not None:
                _adopt(probe, model, optimizer)
            if optimizer is not None:
                probe.watcher.clock.follow_optimizer(optimizer)
        finally:
            # Also on a rank that is not watched, since the others wait for it.
            if load is not None:
                probe.watcher.reload.accept(model, optimizer, load)
        return Watch(probe.watcher)
    except Exception as error:
        sys.stderr.write(
            f"gradwatch: this model is not watched: {error!r}. The training goes on without it.\n"
        )
        return Watch(None)
