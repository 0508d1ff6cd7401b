"""Small trainings, each a case that a probe must not disturb.

usage: python -m tests.training.scenarios NAME OUTPUT
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.ranks import free_port
from tests.training.group import process_group
from tests.training.late import late_device_look


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def train(
    ddp: Any, steps: int = 6, *, nan_at: int | None = None, optimizer: Any = None, start: int = 0
) -> Any:
    optimizer = optimizer or torch.optim.Adam(ddp.parameters(), lr=0.01)
    rank = dist.get_rank()
    for step in range(start, start + steps):
        torch.manual_seed(100 * step + rank)
        inputs = torch.randn(4, 8)
        if step == nan_at and rank == 1:
            inputs[0, 0] = float("nan")
        optimizer.zero_grad()
        ddp(inputs).pow(2).mean().backward()
        optimizer.step()
    return ddp.state_dict()


def break_part(where: str) -> None:
    """Put an exception into the probe. Only this helper knows the probe."""
    if not os.environ.get("GRADWATCH_SPOOL"):
        return
    from gradwatch.agent.probe import look, model, passes, round_log, steps, watcher

    def broken(*_args: Any, **_kwargs: Any) -> Any:
        raise ValueError(f"planted in {where}")

    owner, name = {
        "passes": (passes.Passes, "left"),
        "scan": (look.HostLook, "local"),
        "reduced": (look.HostLook, "reduced"),
        "steps": (steps.StepClock, "_counts"),
        "attach": (model.WatchedModel, "__init__"),
        "round": (round_log.RoundLog, "end_local"),
        "journal": (watcher.Watcher, "append"),
        "identify": (watcher, "identify"),
    }[where]
    assert hasattr(owner, name), f"{owner} has no {name} to break"
    setattr(owner, name, broken)


def broken(where: str) -> Any:
    break_part(where)
    return train(DistributedDataParallel(net()))


def full_disk() -> Any:
    """From the third step on no file of this process can grow."""
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    ddp = DistributedDataParallel(net())
    optimizer = torch.optim.Adam(ddp.parameters(), lr=0.01)
    train(ddp, 2, optimizer=optimizer)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, before[1]))
    result = train(ddp, 4, nan_at=3, optimizer=optimizer, start=2)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return result


def second_process_claims_the_rank() -> Any:
    """A child, started afresh, says that it is this rank too."""
    ddp = DistributedDataParallel(net())
    result = train(ddp, 3)
    port = [free_port()]
    dist.broadcast_object_list(port)
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=claim, args=(port[0],))
    child.start()
    child.join()
    assert child.exitcode == 0
    train(ddp, 3, start=3)
    return result


def claim(port: int) -> None:
    """A group of its own, with the same rank number."""
    os.environ["MASTER_PORT"] = str(port)
    with process_group():
        train(DistributedDataParallel(net()), 2)


def deepcopied() -> Any:
    return train(copy.deepcopy(DistributedDataParallel(net())), nan_at=4)


def forked_child() -> Any:
    """A forked child, as of a DataLoader, that uses torch and exits."""
    ddp = DistributedDataParallel(net())
    result = train(ddp, 3)
    context = multiprocessing.get_context("fork")
    child = context.Process(target=lambda: torch.ones(2).sum())
    child.start()
    child.join()
    assert child.exitcode == 0
    train(ddp, 3, start=3)
    return result


def explicit(user_hook: str) -> Any:
    """`watch` in a process in which autoload is off, around a comm hook of the user's."""
    from gradwatch.agent import watch

    def hook(_state, bucket):
        fut = dist.all_reduce(bucket.buffer().div_(4), async_op=True).get_future()
        return fut.then(lambda done: done.value()[0])

    ddp = DistributedDataParallel(net(), gradient_as_bucket_view=True)
    optimizer = torch.optim.Adam(ddp.parameters(), lr=0.01)
    if user_hook == "before":
        ddp.register_comm_hook(None, hook)
    watched = watch(ddp, optimizer)
    watched.set_step(1000)
    watched.tag(batch=["a", 7])
    watched.checkpoint_saved("/somewhere/ckpt", 1000)
    if user_hook == "after":
        ddp.register_comm_hook(None, hook)
    return train(ddp, nan_at=4, optimizer=optimizer)


def own_hook(_state, bucket):
    """A user's own reduction, of which nothing is known."""
    done = dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future()
    return done.then(lambda future: future.value()[0])


def user_hook() -> Any:
    ddp = DistributedDataParallel(net())
    ddp.register_comm_hook(None, own_hook)
    return train(ddp, nan_at=3)


def two_models() -> Any:
    """A GAN: two models and optimizers in one process, the second model goes bad."""
    first, second = (DistributedDataParallel(net()) for _ in range(2))
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in (first, second)]
    for step in range(4):
        train(second, 1, optimizer=optimizers[1], start=10 * step, nan_at=30)
        train(first, 1, optimizer=optimizers[0], start=step)
    return first.state_dict()


def device_look() -> Any:
    """Read out as from a device whose events pass three questions late."""
    late_device_look()
    return train(DistributedDataParallel(net(), bucket_cap_mb=0.0005), 12, nan_at=9)


def main(name: str, output: str) -> None:
    scenarios: dict[str, Any] = {
        "full_disk": full_disk,
        "second_process": second_process_claims_the_rank,
        "deepcopied": deepcopied,
        "forked_child": forked_child,
        "two_models": two_models,
        "user_hook": user_hook,
        "device_look": device_look,
        "explicit_before": lambda: explicit("before"),
        "explicit_after": lambda: explicit("after"),
    }
    with process_group() as rank:
        run = scenarios.get(name) or (lambda: broken(name.removeprefix("broken_")))
        result = run()
        if rank == 0:
            torch.save(result, Path(output))


if __name__ == "__main__":
    main(*sys.argv[1:])
