"""DistributedDataParallel, for torchrun."""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.e2e.scripts.training import group, new_model, tell_modules, train

rank = group()
model = DistributedDataParallel(new_model())
train(model, torch.optim.SGD(model.parameters(), lr=0.01), rank)
tell_modules(rank)
dist.destroy_process_group()
