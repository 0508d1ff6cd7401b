"""Train on a CUDA device, without `--log` with every synchronisation of the host made an error.

usage: python -m tests.training.cuda OUTPUT [--bad-step N] [--log] [--device cpu]

The data of the bad step holds a NaN, or with `--log` a 0 whose logarithm is taken. The CPU can stand for a
device.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.training.late import late_device_look


class Log(nn.Module):
    """The logarithm of 0 where the whole row is 0."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        rows = values.abs().amax(-1, keepdim=True)
        return values + 0.0 * rows.log()  # log of 0


def main(output: Path, bad_step: int | None, device: torch.device, *, log: bool) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        late_device_look()
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 8)]
    if log:
        layers = [nn.Linear(64, 64, bias=False), Log(), nn.Dropout(0.1), nn.BatchNorm1d(64), nn.Linear(64, 8)]
    ddp = DistributedDataParallel(nn.Sequential(*layers).to(device), bucket_cap_mb=0.01)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-3, fused=True)
    inputs = torch.randn(60, 16, 64, device=device)
    if bad_step is not None:
        if log:
            inputs[bad_step, 3] = 0.0
        else:
            inputs[bad_step, 3, 5] = float("nan")
    for step in range(60):
        # The first steps build buckets and communicators, which synchronise by themselves.
        if not log:
            torch.cuda.set_sync_debug_mode("error" if step >= 5 else "default")
        optimizer.zero_grad()
        ddp(inputs[step]).float().pow(2).mean().backward()
        optimizer.step()
    if not log:
        torch.cuda.set_sync_debug_mode("default")
    torch.save({name: value.cpu() for name, value in ddp.state_dict().items()}, output)
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--bad-step", type=int)
    parser.add_argument("--log", action="store_true")
    parser.add_argument("--device", type=torch.device, default="cuda:0")
    given = parser.parse_args()
    main(given.output, given.bad_step, given.device, log=given.log)
    sys.stdout.flush()
    import atexit

    atexit._run_exitfuncs()
    os._exit(0)
