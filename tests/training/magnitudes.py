"""Gradients that are finite on every rank until they are reduced, case after case in one process group.

usage: python -m tests.training.magnitudes host|device

With `device` the probe looks at this CPU as at a device, whose read-outs come late.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from tests.training.group import process_group
from tests.training.late import late_device_look

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS = 8
EXPLODING_STEPS = 32
TOO_FAST_FROM = 20
TOO_LARGE_AT = (3, 4, 6)
CLIPPED_AT = 6
DIVERGES_AT = 5
CHECK_EVERY = 3


def train(rank: int, loss: Callable[[torch.Tensor, int, int], torch.Tensor], *, scaled: bool = False) -> None:
    """One case, whose gradients are reduced in fp16; bad updates are left out."""
    torch.manual_seed(2)
    ddp = DistributedDataParallel(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)))
    ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0, enabled=scaled)
    for step in range(STEPS):
        optimizer.zero_grad()
        torch.manual_seed(10 * step + rank)
        scaler.scale(loss(ddp(torch.randn(3, 4)), rank, step)).backward()
        if scaled:
            scaler.step(optimizer)
            scaler.update(1.0)
        elif all(parameter.grad.isfinite().all() for parameter in ddp.parameters()):
            optimizer.step()
    dist.barrier()


def overflowing(*steps: int, on: int | None = None) -> Callable[[torch.Tensor, int, int], torch.Tensor]:
    """Gradients that are finite in fp32 and not in fp16."""

    def loss(output: torch.Tensor, rank: int, step: int) -> torch.Tensor:
        return output.pow(2).mean() * (1e9 if step in steps and on in (None, rank) else 1.0)

    return loss


def nan_on_rank_1(output: torch.Tensor, rank: int, step: int) -> torch.Tensor:
    return output.pow(2).mean() * (float("nan") if (rank, step) == (1, 3) else 1.0)


def explode(rank: int) -> nn.Module:
    """A run that diverges: after some steps its learning rate is a thousand times too large.

    Returns:
        The model, whose gradients are bad to the end.
    """
    torch.manual_seed(2)
    ddp = DistributedDataParallel(nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 2)))
    optimizer = torch.optim.SGD(ddp.parameters(), lr=1e-3)
    for step in range(EXPLODING_STEPS):
        if step == TOO_FAST_FROM:
            optimizer.param_groups[0]["lr"] = 2.0
        optimizer.zero_grad()
        torch.manual_seed(10 * step + rank)
        ddp(torch.randn(8, 4)).pow(2).mean().backward()
        optimizer.step()
    return ddp


def too_large(rank: int) -> None:
    """Finite gradients, in one bad update each, whose squares Adam cannot keep; nobody guards it."""
    torch.manual_seed(2)
    ddp = DistributedDataParallel(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)))
    optimizer = torch.optim.Adam(ddp.parameters(), lr=0.01)
    for step in range(STEPS):
        optimizer.zero_grad()
        torch.manual_seed(10 * step + rank)
        loss = ddp(torch.randn(3, 4)).pow(2).mean()
        (loss * (1e25 if rank == 1 and step in TOO_LARGE_AT else 1.0)).backward()
        if step == CLIPPED_AT:
            nn.utils.clip_grad_norm_(ddp.parameters(), 1.0, foreach=False)
        optimizer.step()


def diverging_replica(rank: int) -> None:
    """One bit of one parameter of rank 1 is another one from some step on."""
    torch.manual_seed(2)
    ddp = DistributedDataParallel(nn.Sequential(*(nn.Linear(3, 3) for _ in range(6))))
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01)
    for step in range(STEPS):
        if rank == 1 and step == DIVERGES_AT:
            weight = ddp.module[4].weight.detach()
            weight.view(torch.int32)[1, 2] ^= 1
        optimizer.zero_grad()
        torch.manual_seed(10 * step + rank)
        ddp(torch.randn(3, 3)).pow(2).mean().backward()
        optimizer.step()


CASES: dict[str, Callable[[int], object]] = {
    "in the reduction": lambda rank: train(rank, overflowing(2, 3, 6)),
    "in the reduction, of one rank": lambda rank: train(rank, overflowing(2, on=1)),
    "before the reduction": lambda rank: train(rank, nan_on_rank_1),
    "of a scaled loss": lambda rank: train(rank, overflowing(2), scaled=True),
    "too large for Adam": too_large,
    "diverging replica": diverging_replica,
    "exploding": explode,
    "too large for Adam, beside a bad model": too_large,
}


def main(look: str) -> None:
    if look == "device":
        late_device_look()
    with process_group() as rank:
        kept = [case(rank) for case in CASES.values()]
        del kept


if __name__ == "__main__":
    main(sys.argv[1])
