"""Which pass of a watched model made a tensor that another one is given.

By the tensor's storage, which a view and a detached tensor share; its memory is not kept for that.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING

from torch.multiprocessing.reductions import StorageWeakRef

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from gradwatch.agent.probe.passes import Pass

# Tensors that are remembered, the newest.
_MAX_OUTPUTS = 256


class Outputs:
    """What the watched models of a process have made."""

    def __init__(self) -> None:
        self._made: OrderedDict[int, tuple[StorageWeakRef, int, Pass]] = OrderedDict()

    def made(self, one: Pass, tensors: Sequence[torch.Tensor]) -> None:
        """A pass has made these."""
        # What is kept of it for a replay goes when that is due.
        known = replace(one, capsule=None, entrances=[], loss=None)
        for tensor in tensors:
            storage = _storage(tensor)
            if storage is not None:
                self._made.pop(storage.cdata, None)
                self._made[storage.cdata] = storage, tensor._version, known
        while len(self._made) > _MAX_OUTPUTS or (self._made and self._oldest_is_gone()):
            self._made.popitem(last=False)

    def maker(self, tensor: torch.Tensor) -> tuple[bool, Pass | None]:
        """Whether a model made it, and the pass that did; None if it has been written to since."""
        storage = _storage(tensor) if self._made else None
        # While a weak reference is kept, no other storage has its place.
        known = None if storage is None else self._made.get(storage.cdata)
        if known is None:
            return False, None
        _, version, one = known
        return True, one if version == tensor._version else None

    def _oldest_is_gone(self) -> bool:
        oldest, _, _ = next(iter(self._made.values()))
        return bool(oldest.expired())  # type: ignore[no-untyped-call]


def _storage(tensor: torch.Tensor) -> StorageWeakRef | None:
    try:
        return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    except (RuntimeError, NotImplementedError):
        return None  # sparse, or a wrapper around other tensors
