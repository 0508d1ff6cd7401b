"""In which order do gradients arrive in a backward pass.

DDP's bucket order is not it: buckets follow the model's declaration until they are
rebuilt, and are never rebuilt with find_unused_parameters. A hook on each parameter,
called when its gradient has been accumulated, is; autograd runs it before the hook of DDP's
reducer, so a parameter has its place before its bucket is reduced.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


class Arrivals:
    """The arrival order of the backward pass under way, over all watched models.

    Attributes:
        order: keys of the parameters that have arrived in this backward pass. A new list
            for each pass, so that whoever keeps one can go on reading it.
        passes: backward passes begun since `forget_passes`.
    """

    def __init__(self) -> None:
        self.order: list[int] = []
        self.passes = 0
        self._under_way = False
        self._next_key = 0

    @property
    def ordinal(self) -> int:
        """Of the backward pass under way, or, between two, of the one to come."""
        return self.passes - 1 if self._under_way else self.passes

    def new_key(self) -> int:
        """A key for one parameter."""
        self._next_key += 1
        return self._next_key - 1

    def hook(self, key: int) -> Callable[[torch.Tensor], None]:
        """What to register with `register_post_accumulate_grad_hook`.

        It runs once per parameter and backward pass, so it is as short as can be.
        """

        def arrived(_parameter: torch.Tensor) -> None:
            if not self._under_way:
                self._begin()
            self.order.append(key)

        return arrived

    def forget_passes(self) -> None:
        """Count backward passes from 0 again: a reduction has finished."""
        self.passes = 0

    def _begin(self) -> None:
        self.order = []
        self.passes += 1
        self._under_way = when_backward_ends(self._end)

    def _end(self) -> None:
        self._under_way = False


def when_backward_ends(call: Callable[[], Any]) -> bool:
    """Have `call` run at the end of the backward pass under way; False when there is none."""
    try:
        torch.autograd.Variable._execution_engine.queue_callback(call)
    except RuntimeError:
        return False
    return True
