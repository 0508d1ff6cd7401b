"""Train until a file appears; on the way one rank meets a NaN in its data.

usage: python -m tests.training.until_told STOP_FILE BAD_RANK BAD_STEP [FOLDER]

When it is there, the time is written to STOP_FILE.planted. With FOLDER, a checkpoint is saved there every ten
steps until shortly after that.
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


def main(stop: Path, bad_rank: int, bad_step: int, checkpoints: Path | None) -> None:
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
                stop.with_name(f"{stop.name}.planted").write_text(str(time.time()))
            optimizer.zero_grad()
            ddp(inputs).pow(2).mean().backward()
            optimizer.step()
            step += 1
            if checkpoints is not None and rank == 0 and step % 10 == 0 and step <= bad_step + 10:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                torch.save(state, checkpoints / f"step_{step}.pt")
            time.sleep(0.02)
            # Rank 0 decides for all, so that nobody waits in a collective that others have left.
            told[0] = float(stop.exists())
            dist.broadcast(told, src=0)
        if rank == 0:
            print(f"trained {step} steps", flush=True)


if __name__ == "__main__":
    folder = Path(sys.argv[4]) if sys.argv[4:] else None
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), folder)
