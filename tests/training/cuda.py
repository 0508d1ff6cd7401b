"""Train on a CUDA device with every synchronisation of the host made an error.

usage: python -m tests.training.cuda OUTPUT [BAD_STEP]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def main(output: Path, bad_step: int | None) -> None:
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    torch.manual_seed(0)
    ddp = DistributedDataParallel(
        nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 8)).to(device), bucket_cap_mb=0.01
    )
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-3, fused=True)
    inputs = torch.randn(60, 16, 64, device=device)
    if bad_step is not None:
        inputs[bad_step, 3, 5] = float("nan")
    for step in range(60):
        # The first steps build buckets and communicators, which synchronise by themselves.
        torch.cuda.set_sync_debug_mode("error" if step >= 5 else "default")
        optimizer.zero_grad()
        ddp(inputs[step]).float().pow(2).mean().backward()
        optimizer.step()
    torch.cuda.set_sync_debug_mode("default")
    torch.save({name: value.cpu() for name, value in ddp.state_dict().items()}, output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
    sys.stdout.flush()
    import atexit

    atexit._run_exitfuncs()
    os._exit(0)
