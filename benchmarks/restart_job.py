"""A command to be stopped and started again: one DDP process that meets a NaN in each of its lives.

usage: python restart_job.py LOG CHECKPOINTS [--resume FILE]
"""

import os
import sys
import time

LOG = sys.argv[1]


def note(what: str) -> None:
    with open(LOG, "a") as log:  # noqa: PTH123 - nothing more is imported before the first line
        log.write(f"{what} {time.time()}\n")


note("first_line")


def main() -> None:
    import argparse
    import signal
    from pathlib import Path

    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    parser = argparse.ArgumentParser()
    parser.add_argument("log")
    parser.add_argument("checkpoints", type=Path)
    parser.add_argument("--resume", type=Path)
    given = parser.parse_args()

    def end(_number: int, _frame: object) -> None:
        note("exit")
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    network = torch.nn.Linear(4, 4)
    model = DistributedDataParallel(network)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    begin = 0
    if given.resume is not None:
        saved = torch.load(given.resume)
        network.load_state_dict(saved["model"])
        begin = saved["step"]
    step = begin
    while True:
        data = torch.full((2, 4), float("nan") if step >= begin + 8 else 1.0)
        optimizer.zero_grad()
        model(data).sum().backward()
        optimizer.step()
        step += 1
        if step == begin + 5:
            torch.save({"model": network.state_dict(), "step": step}, given.checkpoints / f"step-{step}.pt")
        time.sleep(0.05)


if __name__ == "__main__":
    main()
