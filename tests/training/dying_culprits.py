"""Train again and again; each time one rank kills itself right after its bad gradient was looked at.

usage: python -m tests.training.dying_culprits TIMES OUTPUT

Every time is a process group of its own, of two forked ranks. The culprit's NaN comes through its
data, and its comm hook, which is called with the gradients as they are before the reduction, is its
last call: the other rank never gets the sum. OUTPUT gets what was planted.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.ranks import free_port


def train(rank: int, port: int, culprit: int, bad_step: int) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    torch.manual_seed(0)
    ddp = DistributedDataParallel(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)))

    def hook(_state, bucket):
        if not bucket.buffer().isfinite().all():
            os.kill(os.getpid(), signal.SIGKILL)
        mean = dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future()
        return mean.then(lambda done: done.value()[0])

    ddp.register_comm_hook(None, hook)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01)
    for step in range(bad_step + 1):
        inputs = torch.randn(4, 8)
        if (rank, step) == (culprit, bad_step):
            inputs[1, 2] = float("nan")
        optimizer.zero_grad()
        ddp(inputs).pow(2).mean().backward()
        optimizer.step()


def survive(rank: int, port: int, culprit: int, bad_step: int) -> None:
    try:
        train(rank, port, culprit, bad_step)
    except RuntimeError:
        os._exit(0)  # the other rank is gone
    os._exit(1)


def main(times: int, output: Path) -> None:
    context = multiprocessing.get_context("fork")
    planted = []
    for number in range(times):
        culprit, bad_step = random.randrange(2), random.randrange(1, 5)
        port = free_port()
        ranks = [context.Process(target=survive, args=(rank, port, culprit, bad_step)) for rank in range(2)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        exits = [process.exitcode for process in ranks]
        expected = [-signal.SIGKILL if rank == culprit else 0 for rank in range(2)]
        assert exits == expected, f"{exits} instead of {expected}"
        planted.append({"rank": culprit, "step": bad_step})
        print(f"{number + 1} of {times} culprits are dead", flush=True)
    output.write_text(json.dumps(planted))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
