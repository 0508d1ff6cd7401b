"""Whether powers and exponentials of what an operator was given leave its dtype's range. Pure."""

from __future__ import annotations

import enum
import math
from typing import TYPE_CHECKING

from gradwatch.collector.observations import Value
from gradwatch.collector.operators import holds

if TYPE_CHECKING:
    from gradwatch.collector.model import Operator
    from gradwatch.collector.observations import OperatorInput

HALF = "float16"
# The largest number of each dtype.
LARGEST = {
    HALF: 65504.0,
    "bfloat16": 3.3895313892515355e38,
    "float32": 3.4028234663852886e38,
    "float64": 1.7976931348623157e308,
}
# The natural logarithm of an exponential's base; of those that are left out it is 1.
_BASE_LOG = {"exp2": math.log(2.0)}
_EVEN = {"cosh", "sinh"}


class Power(enum.Enum):
    """What is wrong with a power."""

    EDGE = "edge"
    MAYBE_EDGE = "maybe_edge"
    OVERFLOW = "overflow"


def power_of(operator: Operator) -> Power | None:
    """What is wrong with the power that an operator takes; None when its ranges show nothing.

    Zero has no power below 0, and what is negative none that is not whole. An exponent that is not known is
    no proof of either.
    """
    base, exponent = _of_power(operator)
    if base is None or base.min is None or base.max is None:
        return None
    negative = base.min < 0 and operator.value is Value.NAN
    if exponent is None or exponent.min is None or exponent.max is None:
        return Power.MAYBE_EDGE if holds(base, 0.0) or negative else None
    if _is_above(_logarithm(base, exponent), dtype_of(operator)):
        return Power.OVERFLOW
    at_edge = (holds(base, 0.0) and exponent.min < 0) or (negative and not _is_whole(exponent))
    return Power.EDGE if at_edge else None


def fits_float32(operator: Operator, name: str) -> bool | None:
    """Whether float32 holds what an operator gives of finite numbers; None when that is not known.

    Args:
        operator: a power or an exponential.
        name: its bare name.
    """
    if name == "pow":
        base, exponent = _of_power(operator)
        if base is None or exponent is None or None in {base.min, base.max, exponent.min, exponent.max}:
            return None
        return not _is_above(_logarithm(base, exponent), "float32")
    top = top_of(operator, name)
    return None if top is None else not _is_above(top * _BASE_LOG.get(name, 1.0), "float32")


def top_of(operator: Operator, name: str) -> float | None:
    """The number whose exponential is the largest; None when it is not known."""
    ranges = [(one.min, one.max) for one in operator.inputs if not one.is_number]
    ends = [end for range_ in ranges for end in range_[name not in _EVEN :] if end is not None]
    return max(ends, key=abs if name in _EVEN else float, default=None)


def dtype_of(operator: Operator) -> str | None:
    """The dtype of the first tensor that it was given."""
    return next((one.dtype for one in operator.inputs if not one.is_number), None)


def _of_power(operator: Operator) -> tuple[OperatorInput | None, OperatorInput | None]:
    """The base and the exponent."""
    given = operator.inputs
    return (given[0] if given else None, given[1] if len(given) > 1 else None)


def _is_whole(exponent: OperatorInput) -> bool:
    """Whether all its elements are whole numbers."""
    if exponent.dtype.startswith(("int", "uint")):
        return True
    low = exponent.min
    return low is not None and low == exponent.max and math.isfinite(low) and low == math.floor(low)


def _logarithm(base: OperatorInput, exponent: OperatorInput) -> float:
    """The natural logarithm of the largest |base| ** exponent that the ends of the ranges give."""
    if base.min is None or base.max is None or exponent.min is None or exponent.max is None:
        return -math.inf
    ends = [abs(end) for end in (base.min, base.max) if end != 0 and math.isfinite(end)]
    top = max(ends, default=None)
    if top is None:
        return -math.inf
    # Of a range with zero in it the smallest element is not known.
    least = top if holds(base, 0.0) else min(ends)
    return max(math.log(one) * power for one in (top, least) for power in (exponent.min, exponent.max))


def _is_above(logarithm: float, dtype: str | None) -> bool:
    largest = None if dtype is None else LARGEST.get(dtype)
    return largest is not None and logarithm > math.log(largest)
