"""Train a model that FSDP2 shards, and save it as `torch.distributed.checkpoint` has it, after each update.

usage: python -m tests.training.dry_steps OUTPUT

Before the model has run at all the optimizer is asked for its state, as a script does that is about to load
one; it keeps none, so torch has it make a step each time.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as distributed_checkpoint
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import fully_shard

from tests.training.group import process_group

STEPS = 3


def main(output: Path) -> None:
    warnings.simplefilter("ignore")
    with process_group():
        torch.manual_seed(0)
        net: Any = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        fully_shard(net)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        get_state_dict(net, optimizer)
        for step in range(1, STEPS + 1):
            net(torch.randn(3, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            model_state, optimizer_state = get_state_dict(net, optimizer)
            state = {"model": model_state, "optimizer": optimizer_state}
            distributed_checkpoint.save(state, checkpoint_id=output / f"step-{step}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
