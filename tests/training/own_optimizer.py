"""Train with an optimizer that is none of torch's; the batch of rank 1 is NaN at step BAD_STEP.

usage: python -m tests.training.own_optimizer
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.training.group import process_group

if TYPE_CHECKING:
    from collections.abc import Iterable

BAD_STEP = 3


class SignDescent:
    """Goes against the sign of each gradient."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)

    @torch.no_grad()
    def step(self) -> None:
        """Update the weights, and forget the gradients."""
        for one in self._parameters:
            if one.grad is not None:
                one.sub_(1e-2 * one.grad.sign())
            one.grad = None


def main() -> None:
    with process_group():
        torch.manual_seed(0)
        net = DistributedDataParallel(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)))
        optimizer = SignDescent(net.parameters())
        for step in range(BAD_STEP + 2):
            inputs = torch.randn(3, 4)
            if step == BAD_STEP and dist.get_rank() == 1:
                inputs[1, 2] = float("nan")
            # Two backward passes, two rounds, and one update.
            for half in inputs, inputs.neg():
                net(half).square().mean().backward()
            optimizer.step()


if __name__ == "__main__":
    main()
