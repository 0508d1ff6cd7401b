"""`fully_shard`, for torchrun."""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from tests.e2e.scripts.training import group, new_model, tell_modules, train

rank = group()
model = new_model()
for layer in model:
    if any(True for _ in layer.parameters()):
        fully_shard(layer)
fully_shard(model)
train(model, torch.optim.SGD(model.parameters(), lr=0.01), rank)
tell_modules(rank)
dist.destroy_process_group()
