"""What is known of operators by their names, without namespace and overload. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradwatch.collector.model import Operator
    from gradwatch.collector.observations import OperatorInput

# Logarithms and roots: they and their derivatives are finite above 0 only.
OF_POSITIVE = {"log", "log2", "log10", "sqrt", "rsqrt"}
# Of finite input these give what is not finite at the edge of their domain only.
DOMAIN = OF_POSITIVE | {"log1p", "logit", "reciprocal", "acos", "acosh", "asin", "atanh", "erfinv"}
DIVIDES = {"div", "true_divide", "divide"}
_NORMS = {"norm", "linalg_vector_norm"}
# These overflow as well. By name, the input that has its edge at zero, such as the divisor. Backward
# passes divide: that of sqrt by the root, that of log and of norms by their input.
EDGE_AT_ZERO = {
    **dict.fromkeys(DIVIDES | {"remainder", "fmod", "xlogy"}, 1),
    **dict.fromkeys(_NORMS | {"hypot", "atan2", "lgamma", "digamma"}, 0),
}
# Of which a title says that they were given the number at their edge.
EDGES = OF_POSITIVE | _NORMS | {"reciprocal"}
SUMMING = {
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
    "matmul",
    "mul",
    "add",
    "sum",
    "convolution",
    "einsum",
    "dot",
    "mv",
}
EXPONENTIAL = {"exp", "exp2", "expm1", "sinh", "cosh", "softplus"}
NORMALISING = {
    "_softmax",
    "softmax",
    "_log_softmax",
    "log_softmax",
    "_safe_softmax",
    "_scaled_dot_product_flash_attention_for_cpu",
    "native_layer_norm",
    "native_batch_norm",
    "native_group_norm",
    "_native_batch_norm_legit",
    "var",
    "var_mean",
    "std",
}


def bare_name(operator: Operator) -> str:
    """Such as `mul` for `aten.mul_.Tensor`; "" when it has no name."""
    parts = (operator.name or "").split(".")
    return (parts[1] if len(parts) > 1 else parts[0]).rstrip("_")


def holds(one: OperatorInput, number: float) -> bool:
    """Whether the number is within the range of an input's finite elements."""
    return one.min is not None and one.max is not None and one.min <= number <= one.max
