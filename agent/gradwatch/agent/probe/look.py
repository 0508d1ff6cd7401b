"""Look at each bucket before its reduction, and at what the reduction gave: at once, in host memory.

`device_look.py` does the same on a device, where it is known rounds later.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

from gradwatch.agent.probe import scan
from gradwatch.agent.probe.magnitudes import Magnitudes
from gradwatch.agent.probe.rounds import BucketFindings, bad_gradients

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from gradwatch.agent.probe.passes import Fact
    from gradwatch.agent.probe.rounds import Bucket, Moment, RoundResult


class Look(Protocol):
    """How gradients of one device are looked at.

    Attributes:
        nbytes: of memory that it keeps.
    """

    nbytes: int

    def fact(self, tensors: Sequence[torch.Tensor]) -> Fact:
        """Whether tensors, of any devices and dtypes, are all finite."""

    def local(self, moment: Moment, bucket: Bucket, *, brief: bool) -> BucketFindings | None:
        """Look at a bucket before its reduction; findings that are known at once.

        With `brief` a hit names no parameters: they would not be written down anyway.
        """

    def reduced(self, moment: Moment, buffers: Sequence[torch.Tensor]) -> float | None:
        """Look at what the reductions of a round gave.

        Returns:
            The largest magnitude, if known at once: NaN if there is one, 0 if no square of it overflows.
        """

    def send(self) -> None:
        """No more of the newest moment will be looked at: read out what has been."""

    @property
    def reduced_flag(self) -> torch.Tensor | None:
        """On the device, whether the last reduced gradients looked at are bad; None if the host knows.

        A float of shape (), 1.0 for bad, as optimizers take `found_inf`.
        """

    def arrived(self, *, wait: bool = False) -> list[RoundResult]:
        """Rounds whose read-out has arrived since, oldest first."""

    @property
    def under_way(self) -> bool:
        """Whether `arrived` has more to give."""


class HostLook:
    """For gradients in host memory: one pass over the bucket, parameter by parameter."""

    nbytes = 0

    def __init__(self) -> None:
        self._magnitudes = Magnitudes()

    def fact(self, tensors: Sequence[torch.Tensor]) -> bool:
        """See `Look.fact`: known at once."""
        return all(scan.is_finite(tensor) for tensor in tensors)

    def local(self, moment: Moment, bucket: Bucket, *, brief: bool) -> BucketFindings | None:
        """See `Look.local`."""
        if self._magnitudes.look(bucket, moment.magnitudes):
            return None
        if brief:
            return BucketFindings(moment, bucket.index, [])
        bad = bad_gradients(bucket.gradients())
        return BucketFindings(moment, bucket.index, bad, moment.origin_on_host(), moment.passes)

    def reduced(self, moment: Moment, buffers: Sequence[torch.Tensor]) -> float | None:
        """See `Look.reduced`."""
        del moment
        magnitude = 0.0
        for buffer in buffers:
            if not scan.surely_small(buffer):
                # NaN stays once it is there.
                found = scan.magnitude(buffer)
                magnitude = magnitude if found <= magnitude or math.isnan(magnitude) else found
        return magnitude

    def send(self) -> None:
        """See `Look.send`: all is known."""

    @property
    def reduced_flag(self) -> torch.Tensor | None:
        """The host knows at once."""
        return None

    def arrived(self, *, wait: bool = False) -> list[RoundResult]:
        """Nothing is ever under way."""
        del wait
        return []

    @property
    def under_way(self) -> bool:
        """Nothing is."""
        return False
