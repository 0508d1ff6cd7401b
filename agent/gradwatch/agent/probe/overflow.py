"""Finite gradients whose square overflows the optimizer's second moment.

The moment is then infinite for good, and what is divided by its root is zero: that parameter never moves
again, and nothing looks wrong. An optimizer keeps `decay * moment + (1 - decay) * gradient**2`, so it
overflows beyond the root of `max / (1 - decay)`, in the dtype of the parameter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from gradwatch.agent.probe import scan

if TYPE_CHECKING:
    from collections.abc import Iterator

# By the class or one that it is derived from. Others may square nothing.
_BY_BETAS = frozenset({"Adam", "AdamW", "NAdam", "RAdam"})
_BY_ALPHA = frozenset({"RMSprop"})
_SUMMING = frozenset({"Adagrad"})


@dataclass(frozen=True)
class Overflow:
    """The gradients of one update that are too large for the optimizer.

    Attributes:
        parameter: the one furthest over the limit.
        magnitude: the largest of its gradient, as the optimizer gets it.
        limit: beyond it the square overflows.
        parameters: all of them, by id.
    """

    parameter: torch.Tensor
    magnitude: float
    limit: float
    parameters: frozenset[int]


def decay_of(optimizer: Any, group: dict[str, Any]) -> float | None:
    """How much of a second moment stays from step to step, in one group; None when none is kept."""
    names = {owner.__name__ for owner in type(optimizer).__mro__}
    if names & _BY_BETAS:
        betas = group.get("betas")
        return None if betas is None else float(betas[1])
    if names & _BY_ALPHA:
        return float(group["alpha"]) if "alpha" in group else None
    return 0.0 if names & _SUMMING else None


def keeps_squares(optimizer: Any) -> bool:
    """Whether the optimizer is known to keep a second moment."""
    return any(decay_of(optimizer, group) is not None for group in optimizer.param_groups)


def limit_of(dtype: torch.dtype, decay: float) -> float:
    """The largest magnitude whose square a second moment of this dtype can take."""
    return math.inf if decay >= 1.0 else math.sqrt(torch.finfo(dtype).max) / math.sqrt(1.0 - decay)


def limits(optimizer: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
    """Parameters of an optimizer, their gradients, and the limits of these; none when it squares nothing."""
    for group in optimizer.param_groups:
        decay = decay_of(optimizer, group)
        if decay is None:
            continue
        by_dtype: dict[torch.dtype, float] = {}
        for parameter in group["params"]:
            dtype, gradient = parameter.dtype, parameter.grad
            if gradient is None or not (dtype.is_floating_point or dtype.is_complex):
                continue
            if dtype not in by_dtype:
                by_dtype[dtype] = limit_of(dtype, decay)
            # Of a sharded one this rank's part: looking at more would be a collective.
            yield parameter, getattr(gradient, "_local_tensor", gradient), by_dtype[dtype]


def overflow_in(optimizer: Any, scale: float = 1.0) -> Overflow | None:
    """Look at the gradients of an optimizer, in host memory, as it is about to take them.

    Args:
        optimizer: with its gradients unscaled and clipped.
        scale: by what the optimizer itself is going to divide them.
    """
    over = [
        (magnitude, limit, parameter)
        for parameter, gradient, limit in limits(optimizer)
        if limit < (magnitude := scan.magnitude(gradient) / scale) < math.inf
    ]
    if not over:
        return None
    magnitude, limit, parameter = max(over, key=lambda one: one[0] / one[1])
    return Overflow(parameter, magnitude, limit, frozenset(id(one[2]) for one in over))


def could_overflow(optimizer: Any, magnitude: float) -> bool:
    """Whether gradients up to this magnitude can be too large for the optimizer."""
    return magnitude > 0 and any(magnitude > limit for *_, limit in limits(optimizer))
