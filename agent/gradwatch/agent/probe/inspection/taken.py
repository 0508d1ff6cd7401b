"""Which gradients have been seen finite after their reduction, and which have been changed since.

By their identity and version, kept as plain numbers: nothing of a gradient is kept alive. Two lists of
numbers are compared in C: an update whose gradients nobody has touched costs 0.1 ms for 240 of them.
"""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    import torch

_version = attrgetter("_version")


class Taken:
    """The gradients of one model, in its order.

    Attributes:
        known: all of them were finite when they were last looked at.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Nothing is known of them."""
        self.known = False
        self._ids: list[int] = []
        self._versions: list[int] = []

    def remember(self, gradients: Sequence[torch.Tensor]) -> None:
        """These are finite now, and all that there are."""
        self._ids, self._versions = list(map(id, gradients)), list(map(_version, gradients))
        self.known = True

    def changed(self, gradients: Sequence[torch.Tensor]) -> list[int]:
        """The places of those that are not as they were remembered; of all when nothing is known."""
        return self._changed(list(map(id, gradients)), list(map(_version, gradients)))

    def _changed(self, ids: list[int], versions: list[int], beside: Collection[int] = ()) -> list[int]:
        """The same by ids and versions, of those that are not in `beside`."""
        if ids == self._ids and versions == self._versions:
            return []
        seen = dict(zip(self._ids, self._versions, strict=True))
        return [
            place for place, one in enumerate(ids) if seen.get(one) != versions[place] and one not in beside
        ]

    def refresh(self, gradients: Sequence[torch.Tensor], finite: set[int]) -> None:
        """Some have been changed, and are finite.

        Args:
            gradients: all that there are now.
            finite: by id.
        """
        if not self.known:
            return
        ids, versions = list(map(id, gradients)), list(map(_version, gradients))
        # Often it is all of them. Else those that are not among them must be as they were.
        if finite.issuperset(ids) or not self._changed(ids, versions, finite):
            self._ids, self._versions = ids, versions
