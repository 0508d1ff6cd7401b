"""The first FullyShardedDataParallel, which gradwatch does not know."""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel

from tests.e2e.scripts.training import group, new_model

rank = group()
model = FullyShardedDataParallel(new_model(), device_id=torch.device("cpu"))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
for _ in range(5):
    optimizer.zero_grad()
    model(torch.randn(4, 8)).square().mean().backward()
    optimizer.step()
dist.destroy_process_group()
