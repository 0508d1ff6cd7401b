"""The largest magnitude of each gradient in a bucket: the look before the reduction, on the host.

One read pass, parameter by parameter. A look at a small gradient costs its call, not its bytes, so small
ones that lie side by side share a look: the largest of them stands for each, until it grows or is not finite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from gradwatch.agent.probe import scan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradwatch.agent.probe.rounds import Bucket

# Elements below which a gradient is small.
SMALL = 8192
# Those that share a look are looked at one by one once the largest is this many times what it was of late.
GROWN = 4.0
_LATELY = 0.1
# Buckets are made anew when DDP learns the order of arrival; older layouts are forgotten.
_LAYOUTS = 64


@dataclass
class Run:
    """Gradients that lie side by side and share a look.

    Attributes:
        keys: their parameters', as in `Moment.order`.
        ends: where each begins in the buffer, and where the last one ends.
        lately: a moving mean of their largest magnitude.
    """

    keys: tuple[int, ...]
    ends: tuple[int, ...]
    lately: float = 0.0

    def has_grown(self, magnitude: float) -> bool:
        """Whether this magnitude, finite, is more than is usual of late; it is remembered."""
        grown = magnitude > GROWN * self.lately
        self.lately += _LATELY * (magnitude - self.lately)
        return grown


class Magnitudes:
    """Looks at buckets, of whose layouts it remembers which gradients share a look."""

    def __init__(self) -> None:
        self._layouts: dict[tuple[int, ...], list[Run] | None] = {}

    def look(self, bucket: Bucket, found: dict[int, float]) -> bool:
        """Look at all of a bucket.

        Args:
            bucket: in host memory.
            found: is given the largest magnitude of each gradient by key; NaN if it has one.

        Returns:
            Whether all is finite.
        """
        runs, buffer = self._runs_of(bucket), bucket.buffer
        values = None if runs is None or buffer is None else scan.readable(buffer)
        if runs is None or values is None:
            magnitudes = {key: scan.magnitude(gradient) for key, gradient in bucket.gradients()}
            found.update(magnitudes)
            return all(map(math.isfinite, magnitudes.values()))
        finite = True
        for run in runs:
            magnitude = scan.largest(_part(values, run.ends[0], run.ends[-1]))
            if math.isfinite(magnitude) and not (run.has_grown(magnitude) and len(run.keys) > 1):
                found.update(dict.fromkeys(run.keys, magnitude))
                continue
            for key, start, end in zip(run.keys, run.ends, run.ends[1:], strict=False):
                found[key] = scan.largest(_part(values, start, end))
                finite = finite and math.isfinite(found[key])
        return finite

    def _runs_of(self, bucket: Bucket) -> list[Run] | None:
        """How its gradients lie; None where each is to be looked at by itself."""
        if bucket.keys is None or bucket.buffer is None:
            return None
        try:
            return self._layouts[bucket.keys]
        except KeyError:
            if len(self._layouts) >= _LAYOUTS:
                self._layouts.clear()
        runs = self._layouts[bucket.keys] = runs_in(bucket.buffer, bucket.gradients())
        return runs


def _part(values: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """Of a flat buffer; indexing it would cost as much as a small look."""
    return values if end - start == len(values) else values.narrow(0, start, end - start)


def runs_in(buffer: torch.Tensor, gradients: Sequence[tuple[int, torch.Tensor]]) -> list[Run] | None:
    """Which gradients share a look; None unless they fill the buffer one after the other.

    Args:
        buffer: flat, of any dtype.
        gradients: views of it, with their keys, in order.
    """
    if buffer.layout != torch.strided or buffer.dim() != 1 or not buffer.is_contiguous():
        return None
    runs: list[Run] = []
    end = 0
    for key, gradient in gradients:
        if gradient.layout != torch.strided or gradient.storage_offset() - buffer.storage_offset() != end:
            return None
        start, end = end, end + gradient.numel()
        if not gradient.numel():
            continue
        last = runs[-1] if runs else None
        if last is not None and gradient.numel() < SMALL and last.ends[-1] - last.ends[-2] < SMALL:
            runs[-1] = Run((*last.keys, key), (*last.ends, end))
        else:
            runs.append(Run((key,), (start, end)))
    return runs if end == buffer.numel() else None
