"""The `train.py` of the documentation: saves checkpoints, resumes, and meets one NaN on rank 1.

usage: train.py [--resume PATH]

With FOREVER in its environment it trains until that file exists. CHECKPOINTS names the folder.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

STEPS = 20
BAD_STEP = 5
FOLDER = Path(os.environ.get("CHECKPOINTS", "saved"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--resume")
    arguments = parser.parse_args()
    forever = os.environ.get("FOREVER")
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = nn.Linear(4, 4)
    step = 0
    if arguments.resume:
        state = torch.load(arguments.resume, weights_only=True)
        model.load_state_dict(state["model"])
        step = state["step"]
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01)
    over = torch.zeros(1)
    while not over.item():
        inputs = torch.randn(2, 4)
        if rank == 1 and step == BAD_STEP:
            inputs[0, 0] = float("nan")
        optimizer.zero_grad()
        ddp(inputs).pow(2).mean().backward()
        optimizer.step()
        step += 1
        if forever:
            time.sleep(0.05)
        if rank == 0 and step % 10 == 0 and step <= 2 * STEPS:
            FOLDER.mkdir(exist_ok=True)
            torch.save({"model": model.state_dict(), "step": step}, FOLDER / f"step_{step}.pt")
        # Rank 0 decides for all.
        over[0] = float(Path(forever).exists() if forever else step >= STEPS)
        dist.broadcast(over, src=0)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
