"""In which order do gradients arrive in a backward pass.

DDP's bucket order is not it: buckets follow the model's declaration until they are
rebuilt, and are never rebuilt with find_unused_parameters. A hook on each parameter,
called when its gradient has been accumulated, is; autograd runs it before the hook of DDP's
reducer, so a parameter has its place before its bucket is reduced.

Activation checkpointing runs a backward pass inside the backward pass: that is one pass still. The inner
one is told by the call of `torch.autograd.backward` that is under way around it.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch._compile import _disable_dynamo

if TYPE_CHECKING:
    from collections.abc import Callable


class Arrivals:
    """The arrival order of the backward pass under way, over all watched models.

    Attributes:
        order: keys of the parameters that have arrived in this backward pass. A new list
            for each pass, so that whoever keeps one can go on reading it.
        passes: backward passes begun since `forget_passes`.
        when_over: called at the end of each backward pass in which something has arrived. Must not raise.
    """

    def __init__(self) -> None:
        self.order: list[int] = []
        self.passes = 0
        self.when_over: list[Callable[[], object]] = []
        self._under_way = False
        self._next_key = 0
        self._forgets = False
        self._calls = 0

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
        """Count backward passes from 0 again: a reduction has finished.

        After the one under way, if there is one: another model's reductions may follow in it.
        """
        self._forgets = self._under_way
        if not self._under_way:
            self.passes = 0

    def thread_begins(self) -> None:
        """Another thread is followed from now on."""
        self._calls = 0

    def backward_begins(self) -> bool:
        """`torch.autograd.backward` is called; whether it is not so inside of another one."""
        self._calls += 1
        return self._calls == 1

    def backward_ended(self, failed: bool) -> bool:
        """That call is over; whether it was not inside of another one."""
        if not self._calls:
            return False  # it began in a thread that was not followed then
        self._calls -= 1
        if self._calls == 0 and self._under_way:
            self._over(failed=failed)
        return self._calls == 0

    def _begin(self) -> None:
        self.order = []
        self.passes += 1
        self._under_way = when_backward_ends(self._end)

    def _end(self) -> None:
        # The inner pass of a checkpoint ends here, too.
        if self._calls <= 1:
            self._over()

    def _over(self, *, failed: bool = False) -> None:
        self._under_way = False
        if self._forgets:
            self.forget_passes()
        if not failed:
            for call in self.when_over:
                call()


def patch_backward(begins: Callable[[Any, Any], object], ended: Callable[[bool], object]) -> None:
    """Have every call of `torch.autograd.backward`, in which `Tensor.backward` ends, told.

    Args:
        begins: called with (tensors, grad_tensors) as they are given; must not raise.
        ended: called with whether it has failed; must not raise.
    """
    original = torch.autograd.backward

    @functools.wraps(original)
    def backward(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:
        begins(tensors, grad_tensors)
        try:
            original(tensors, grad_tensors, *args, **kwargs)
        except BaseException:
            ended(True)
            raise
        ended(False)

    torch.autograd.backward = _disable_dynamo(backward)


def when_backward_ends(call: Callable[[], Any]) -> bool:
    """Have `call` run at the end of the backward pass under way; False when there is none."""
    try:
        torch.autograd.Variable._execution_engine.queue_callback(call)
    except RuntimeError:
        return False
    return True
