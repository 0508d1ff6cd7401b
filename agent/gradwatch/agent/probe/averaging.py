"""DDP's own averaging, to the bit.

A registered comm hook takes the averaging over from the reducer, whose arithmetic depends on the
case (torch/csrc/distributed/c10d/reducer.cpp, `mark_variable_ready_dense`):

- a gradient that is copied into its bucket is multiplied by 1/divisor on the way;
- one that already lies in its bucket (`gradient_as_bucket_view=True` and gradients that were
  not set to None) is divided by the divisor in place;
- with `batched_grad_copy=True` (torch 2.13) the bucket is divided after the copies;
- a sparse one is divided.

The two differ in the last bit unless the divisor is a power of two. The divisor is the size of the
process group, or under `join(divide_by_initial_world_size=False)` the number of ranks still active.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch._C._distributed_c10d import GradBucket


class Averaging:
    """Divides a bucket as DDP would have.

    Args:
        gradient_as_bucket_view: of the DDP instance; without it no gradient lies in a bucket.
        batched_grad_copy: of the DDP instance.
    """

    def __init__(self, *, gradient_as_bucket_view: bool, batched_grad_copy: bool) -> None:
        self.tracks_views = gradient_as_bucket_view and not batched_grad_copy
        self._batched_copy = batched_grad_copy
        self._storage_at_arrival: dict[int, int] = {}

    def arrival_hook(self, parameter: torch.Tensor) -> Callable[[torch.Tensor], None]:
        """Notes where a parameter's gradient lies before the reducer may move it to the bucket."""
        key = id(parameter)
        storages = self._storage_at_arrival

        def arrived(arriving: torch.Tensor) -> None:
            gradient = arriving.grad
            if gradient is not None and gradient.layout == torch.strided:
                storages[key] = gradient.untyped_storage().data_ptr()

        return arrived

    def divide(self, bucket: GradBucket, divisor: int) -> torch.Tensor:
        """Divide the bucket in place and return its buffer (flat, or sparse).

        Args:
            bucket: the reducer's, with gradients summed over micro-batches, not yet over ranks.
            divisor: by how much.
        """
        buffer: torch.Tensor = bucket.buffer()
        if buffer.layout != torch.strided or self._batched_copy:
            return buffer.div_(divisor)
        if not self.tracks_views or divisor & (divisor - 1) == 0:
            return buffer.mul_(1.0 / divisor)
        here = buffer.untyped_storage().data_ptr()
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            # A gradient that did not arrive since the last reduction still lies where that
            # one left it: in the bucket (or is undefined, and its place in the bucket is zero).
            if self._storage_at_arrival.pop(id(parameter), here) == here:
                gradient.div_(divisor)
            else:
                gradient.mul_(1.0 / divisor)
        return buffer


def active_ranks(work: Any) -> int:
    """How many ranks take part, from the handle of DDP's join notification: a sum of ones."""
    work.wait()
    return int(work.get_future().value()[0].item())
