"""A training that was told to go back to a checkpoint, by one rank or several.

usage: python -m tests.training.resuming HOW

HOW the checkpoint is loaded, if at all, is a name in LOADS.
"""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS = 2


def by_torch(path: str) -> None:
    torch.load(path)


def mapped(path: str) -> None:
    torch.load(path, mmap=True)


def through_a_link(path: str) -> None:
    link = Path(path).with_suffix(f".{os.getpid()}")
    link.symlink_to(path)
    torch.load(link)


def by_another_rank(path: str) -> None:
    if dist.get_rank() == 0:
        torch.load(path)


def a_file_below(path: str) -> None:
    (Path(path) / "deep").mkdir(exist_ok=True)
    os.close(os.open(Path(path) / "deep" / "metadata", os.O_CREAT | os.O_RDONLY))


def by_safetensors(path: str) -> None:
    from safetensors.torch import load_file

    load_file(path)


def by_distributed_checkpoint(path: str) -> None:
    from torch.distributed import checkpoint

    checkpoint.load({"weight": torch.zeros(2)}, checkpoint_id=path)


def ignored(path: str) -> None:
    del path


def a_neighbour(path: str) -> None:
    torch.load(f"{path}0")


LOADS: dict[str, Callable[[str], None]] = {
    one.__name__: one
    for one in (
        *(by_torch, mapped, through_a_link, by_another_rank, a_file_below),
        *(by_safetensors, by_distributed_checkpoint, ignored, a_neighbour),
    )
}


def is_looked_out_for() -> bool:
    return not isinstance(open, types.BuiltinFunctionType)


def child_looks_out() -> bool:
    """Whether a child that is forked does, such as one of a data loader."""
    pid = os.fork()
    if pid == 0:
        os._exit(is_looked_out_for())
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status) != 0


def main() -> None:
    alone = "RANK" not in os.environ
    if "://" not in os.environ["GRADWATCH_RESUME_PATH"]:
        assert is_looked_out_for()
    assert not child_looks_out()
    if not alone:
        dist.init_process_group("gloo")
    LOADS[sys.argv[1]](os.environ["GRADWATCH_RESUME_PATH"])
    module: nn.Module = nn.Linear(2, 1)
    if not alone:
        module = nn.parallel.DistributedDataParallel(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        module(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    assert not is_looked_out_for()
    if not alone:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
