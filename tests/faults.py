"""Faults for rehearsals, that read as a sentence: `inject.nonfinite_at(rank=1, step=3)`.

They act on tensors of the training itself, and know nothing of Gradwatch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class GradientFault:
    """A gradient that goes bad on one rank in one step, and in no other parameter.

    Attributes:
        elements: how many of its elements, at most as many as it has.
        offset: the first of them, in flat order; wraps around.
    """

    rank: int
    step: int
    parameter: str
    value: float
    elements: int = 1
    offset: int = 0

    def arm(self, parameter: torch.Tensor, *, rank: int, step: int) -> RemovableHandle | None:
        """Put the fault into the next backward pass of `parameter`, if rank and step are its own."""
        if (rank, step) != (self.rank, self.step):
            return None

        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            spoilt = gradient.clone()
            flat = spoilt.view(-1)
            for element in range(min(self.elements, flat.numel())):
                flat[(self.offset + element) % flat.numel()] = self.value
            return spoilt

        return parameter.register_hook(spoil)


class inject:  # noqa: N801 - reads as a verb
    """The faults, by the sentence that names them."""

    @staticmethod
    def nonfinite_at(
        *,
        rank: int,
        step: int,
        parameter: str,
        value: float = float("nan"),
        elements: int = 1,
        offset: int = 0,
    ) -> GradientFault:
        """A gradient element of one parameter turns to `value` before it is accumulated."""
        return GradientFault(rank, step, parameter, value, elements, offset)
