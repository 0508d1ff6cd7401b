"""What kinds of numbers a tensor holds, and in which range its finite ones lie."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from gradwatch.agent.probe import scan
from gradwatch.agent.probe.parameters import dtype_name

_LOOKED_AT = ("cpu", "cuda")


@dataclass(frozen=True)
class Kinds:
    """Which kinds of non-finite numbers there are."""

    nan: bool = False
    positive: bool = False
    negative: bool = False

    @property
    def any(self) -> bool:
        """Whether there is one."""
        return self.nan or self.positive or self.negative

    def __or__(self, other: Kinds) -> Kinds:
        return Kinds(self.nan or other.nan, self.positive or other.positive, self.negative or other.negative)

    def __le__(self, other: Kinds) -> bool:
        """Whether the other has all of these."""
        return (self | other) == other

    @property
    def value(self) -> str:
        """The enum name of `gradwatch.v1.Value` that is told of them."""
        if self.nan:
            return "VALUE_NAN"
        return "VALUE_POSITIVE_INFINITY" if self.positive else "VALUE_NEGATIVE_INFINITY"


FINITE = Kinds()


def kinds_of(value: Any) -> Kinds:
    """Of a tensor, or of a number; waits for a device."""
    if isinstance(value, float):
        return Kinds(math.isnan(value), value == math.inf, value == -math.inf)
    if (
        not isinstance(value, torch.Tensor)
        or value.device.type not in _LOOKED_AT
        or scan.surely_finite(value)
    ):
        return FINITE
    values = scan.readable(value)
    if values is None:
        return FINITE
    low, high = (extreme.item() for extreme in values.aminmax())
    if math.isnan(low) or math.isnan(high):
        # It hides the infinities, and is worse.
        return Kinds(nan=True)
    return Kinds(positive=high == math.inf, negative=low == -math.inf)


def described(value: Any, rows: int | None = None) -> dict[str, Any]:
    """The `OperatorInput` message of a tensor or a number, in its JSON mapping.

    Args:
        value: what went in.
        rows: the dimension along which its rows are normalised; None where they are not.
    """
    if not isinstance(value, torch.Tensor):
        number = float(value)
        finite = math.isfinite(number)
        told: dict[str, Any] = {"dtype": type(value).__name__, "shape": [], "nonfinite": int(not finite)}
        return told | {"min": number, "max": number} if finite else told
    told = {"dtype": dtype_name(value.dtype), "shape": list(value.shape), "nonfinite": 0}
    values = value.detach() if not (value.is_floating_point() or value.is_complex()) else scan.readable(value)
    if (
        values is None
        or values.numel() == 0
        or value.device.type not in _LOOKED_AT
        or value.dtype == torch.bool
    ):
        return told
    if values.is_floating_point():
        are_finite = torch.isfinite(values)
        told["nonfinite"] = values.numel() - int(are_finite.sum())
        if rows is not None:
            told["empty_rows"] = int((~are_finite.any(rows)).sum())
        values = values[are_finite]
    if values.numel():
        low, high = values.aminmax()
        told |= {"min": float(low), "max": float(high)}
    return told
