"""DistributedDataParallel in children of torch.multiprocessing."""

import os
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from tests.e2e.scripts.training import new_model, train

WORLD_SIZE = 2


def work(rank: int, port: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    dist.init_process_group("gloo", rank=rank, world_size=WORLD_SIZE)
    model = DistributedDataParallel(new_model())
    train(model, torch.optim.SGD(model.parameters(), lr=0.01), rank)
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(work, args=(sys.argv[1],), nprocs=WORLD_SIZE)
