"""Is anything in this tensor NaN or infinite, and what exactly.

The largest magnitude is one read pass: aminmax propagates NaN and overflows at nothing, so a finite
magnitude is the verdict too. Where only the verdict counts, the first look is a sum. NaN and infinities
survive every partial sum, so a finite sum proves that all elements are finite. A sum of finite values can
overflow, so a non-finite one proves nothing and is followed by exact looks. Throughput of the candidates:
benchmarks/RESULTS.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# sum() is not implemented for these; they are small in memory, so a copy is affordable.
_NEEDS_UPCAST = frozenset(
    dtype
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
    if (dtype := getattr(torch, name, None)) is not None
)
# Of nearly all tensors: these need no further questions.
_PLAIN = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})


@dataclass(frozen=True)
class Finding:
    """The non-finite elements of one tensor.

    Attributes:
        value: VALUE_NAN if any is NaN, else the sign of its infinities (positive if both).
        count: how many elements are not finite.
    """

    value: str
    count: int


def readable(tensor: torch.Tensor) -> torch.Tensor | None:
    """A dense real view of the tensor's values that reductions accept; None if there is nothing.

    Sparse tensors give their values, complex ones their parts, 8-bit floats a copy in fp32.
    Integers and empty tensors give None: they are always finite.
    """
    if tensor.dtype in _PLAIN and tensor.layout == torch.strided:
        return tensor.detach() if tensor.numel() else None
    tensor = tensor.detach()
    if tensor.layout == torch.sparse_coo:
        tensor = tensor._values()
    elif tensor.layout != torch.strided:
        tensor = tensor.values()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return None
    return tensor.float() if tensor.dtype in _NEEDS_UPCAST else tensor


def magnitude(tensor: torch.Tensor) -> float:
    """The largest magnitude in a tensor in host memory: NaN if it has one, 0 for what holds no numbers."""
    values = readable(tensor)
    if values is None:
        return 0.0
    return largest(values)


def largest(values: torch.Tensor) -> float:
    """The same of values that are `readable`."""
    low, high = values.aminmax()
    # NaN is in both.
    return max(high.item(), -low.item())


def surely_small(tensor: torch.Tensor) -> bool:
    """Whether its sum of squares does not overflow: then no element is bad, nor has one such a square.

    False means "look closer". For fp32, whose dot product is one read pass; others give False at once.
    """
    if tensor.dtype != torch.float32 or tensor.layout != torch.strided or not tensor.is_contiguous():
        return False
    values = tensor.detach().view(-1)
    return math.isfinite(torch.dot(values, values).item())


def surely_finite(tensor: torch.Tensor) -> bool:
    """First look at a tensor in host memory, of any shape and dtype: one read pass.

    False means "look closer", not "non-finite".
    """
    values = readable(tensor)
    return values is None or math.isfinite(values.sum().item())


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all elements of a tensor in host memory are finite: one read pass, two if in doubt."""
    if surely_finite(tensor):
        return True
    values = readable(tensor)
    if values is None:
        return True
    low, high = values.aminmax()
    return math.isfinite(low.item()) and math.isfinite(high.item())


def is_masked_at_most(tensor: torch.Tensor) -> bool:
    """Whether no element of a tensor in host memory is NaN or infinite above zero: masks are so below it."""
    values = readable(tensor)
    return values is None or largest_of(values) < math.inf


def largest_of(values: torch.Tensor) -> float:
    """The largest of values that are `readable`; NaN if there is one, which is less than nothing."""
    return float(values.amax().item())


def examine(tensor: torch.Tensor) -> Finding | None:
    """Look exactly at a tensor in host memory; None when all its elements are finite."""
    values = readable(tensor)
    if values is None:
        return None
    low, high = (extreme.item() for extreme in values.aminmax())
    if math.isfinite(low) and math.isfinite(high):
        return None
    count = values.numel() - int(torch.isfinite(values).sum().item())
    if math.isnan(low) or math.isnan(high):
        return Finding("VALUE_NAN", count)
    return Finding("VALUE_POSITIVE_INFINITY" if high == math.inf else "VALUE_NEGATIVE_INFINITY", count)
