"""Train until a file appears; on the way one rank meets a NaN in its data.

usage: python -m tests.training.until_told STOP_FILE BAD_RANK BAD_STEP [RECOVER]

With RECOVER the bad update is thrown away by the script itself, and training goes on finite.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.training.group import process_group


def main(stop: Path, bad_rank: int, bad_step: int, *, recover: bool) -> None:
    with process_group() as rank:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        ddp = DistributedDataParallel(model)
        optimizer = torch.optim.Adam(ddp.parameters(), lr=0.01)
        told = torch.zeros(1)
        step = 0
        while not told.item():
            inputs = torch.randn(4, 8)
            if (rank, step) == (bad_rank, bad_step):
                inputs[0, 0] = float("nan")
            optimizer.zero_grad()
            ddp(inputs).pow(2).mean().backward()
            if not recover or all(parameter.grad.isfinite().all() for parameter in model.parameters()):
                optimizer.step()
            step += 1
            time.sleep(0.02)
            # Rank 0 decides for all, so that nobody waits in a collective that others have left.
            told[0] = float(stop.exists())
            dist.broadcast(told, src=0)
        if rank == 0:
            print(f"trained {step} steps", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), recover="RECOVER" in sys.argv)
