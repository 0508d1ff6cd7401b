"""DistributedDataParallel with a GradScaler whose first scale is far too large, for torchrun."""

import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.e2e.scripts.training import group, new_model, train


class Scaled:
    """An optimizer and its loss, behind a GradScaler."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.skipped = 0
        self._optimizer = optimizer
        self._scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)

    def backward(self, loss: torch.Tensor) -> None:
        self._scaler.scale(1000 * loss).backward()

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()

    def step(self) -> None:
        before = self._scaler.get_scale()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self.skipped += self._scaler.get_scale() < before


rank = group()
model = DistributedDataParallel(new_model())
scaled = Scaled(torch.optim.SGD(model.parameters(), lr=1e-6))
train(model, scaled, rank, backward=scaled.backward)
# One write: torchrun runs Python unbuffered, and print would write the newline by itself.
sys.stdout.write(f"rank {rank}: {scaled.skipped} updates skipped\n")
dist.destroy_process_group()
