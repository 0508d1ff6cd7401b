"""Save a model that FSDP2 shards over two ranks with DCP, and one rank's part with torch.save.

    python -m tests.checkpoints.sharded FOLDER

Rank 1's shard of one weight, and of its second moment, holds one NaN.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as distributed_checkpoint
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.training.group import process_group


def main() -> None:
    folder = Path(sys.argv[1])
    warnings.simplefilter("ignore")
    with process_group() as rank:
        mesh = init_device_mesh("cpu", (2,))
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
        weight = model[0].weight
        if rank == 1:
            with torch.no_grad():
                weight.to_local()[0, 0] = float("nan")
            optimizer.state[weight]["exp_avg_sq"].to_local()[0, 0] = float("nan")
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = {"model": model_state, "optim": optimizer_state, "step": 40}
        distributed_checkpoint.save(state, checkpoint_id=folder / "step-40")
        torch.save(model_state, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    main()
