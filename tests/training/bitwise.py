"""Train every case for 20 steps and save the weights: what must not differ by one bit.

usage: python -m tests.training.bitwise OUTPUT CASE…
"""

from __future__ import annotations

import contextlib
import copy
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from tests.training.group import process_group

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS = 20


class Net(nn.Module):
    """Two branches, one of which some steps do not use."""

    def __init__(self, *, sparse: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 12, sparse=sparse)
        self.first = nn.Linear(12, 24)
        self.norm = nn.LayerNorm(24)
        self.branch = nn.Linear(24, 24)
        self.last = nn.Linear(24, 7)

    def forward(self, tokens: torch.Tensor, *, use_branch: bool = True) -> torch.Tensor:
        hidden = self.norm(self.first(self.embedding(tokens).mean(1)).tanh())
        if use_branch:
            hidden = hidden + self.branch(hidden).tanh()
        return self.last(hidden)


def batch(rank: int, step: int, micro: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    return torch.randint(0, 32, (6, 5), generator=generator)


def noop_hook(_state, bucket):  # no annotations: torch compares them, and they are strings here
    """A user's own hook: half the sum over the ranks."""
    buffer = bucket.buffer().mul_(0.5)
    return dist.all_reduce(buffer, async_op=True).get_future().then(lambda done: done.value()[0])


def register_nothing(ddp: DistributedDataParallel) -> None:
    del ddp


def register_fp16(ddp: DistributedDataParallel) -> None:
    ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)


def register_builtin_fp16(ddp: DistributedDataParallel) -> None:
    ddp._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS)


def register_builtin_allreduce(ddp: DistributedDataParallel) -> None:
    ddp._register_builtin_comm_hook(dist.BuiltinCommHookType.ALLREDUCE)


def register_raw(ddp: DistributedDataParallel) -> None:
    dist._register_comm_hook(ddp.reducer, None, noop_hook)


def register_power_sgd(ddp: DistributedDataParallel) -> None:
    state = powerSGD_hook.PowerSGDState(
        process_group=None, matrix_approximation_rank=1, start_powerSGD_iter=3, min_compression_rate=0.5
    )
    ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


def train(
    rank: int, *, register: Callable[[DistributedDataParallel], None] = register_nothing, **options: Any
) -> Any:
    """One case; what is not an option of DDP is taken out of `options` first."""
    dtype = options.pop("dtype", torch.float32)
    set_to_none = options.pop("set_to_none", True)
    micro_batches = options.pop("micro_batches", 1)
    skip_branch = options.pop("skip_branch", False)
    join = options.pop("join", None)
    compile_inside = options.pop("compile_inside", False)
    compile_outside = options.pop("compile_outside", False)
    late = options.pop("late", False)
    copied = options.pop("copied", False)
    sparse = options.pop("sparse", False)
    optimizer_class = options.pop("optimizer", torch.optim.Adam)

    torch.manual_seed(7)
    model: Any = Net(sparse=sparse).to(dtype)
    if compile_inside:
        model = torch.compile(model, fullgraph=True, backend="aot_eager")
    ddp = DistributedDataParallel(model, bucket_cap_mb=options.pop("bucket_cap_mb", 0.002), **options)
    if copied:
        ddp = copy.deepcopy(ddp)
    if not late:
        register(ddp)
    module: Any = torch.compile(ddp, backend="aot_eager") if compile_outside else ddp
    optimizer = optimizer_class(ddp.parameters(), lr=0.01)
    steps = STEPS + (rank * 3 if join is not None else 0)
    context = contextlib.nullcontext() if join is None else ddp.join(divide_by_initial_world_size=join)
    with context:
        for step in range(steps):
            if late and step == 1:
                register(ddp)
            optimizer.zero_grad(set_to_none=set_to_none)
            for micro in range(micro_batches):
                syncs = micro == micro_batches - 1
                with contextlib.nullcontext() if syncs else ddp.no_sync():
                    use_branch = not (skip_branch and (step + rank + micro) % 3 == 0)
                    kwargs = {} if compile_inside else {"use_branch": use_branch}
                    module(batch(rank, step, micro), **kwargs).float().pow(2).mean().backward()
            optimizer.step()
    return {name: value.detach().clone() for name, value in ddp.state_dict().items()}


def objects_as_without_us(rank: int) -> Any:
    """`torch.save(model)`, `deepcopy(ddp)` and what a second registration says."""
    del rank
    torch.manual_seed(3)
    ddp = DistributedDataParallel(Net())
    for step in range(3):
        ddp(batch(0, step)).sum().backward()
    clone = copy.deepcopy(ddp)
    buffer = io.BytesIO()
    torch.save(ddp.module, buffer)
    torch.save(ddp, buffer)
    weights = io.BytesIO()
    torch.save(ddp.state_dict(), weights)
    ddp.register_comm_hook(None, noop_hook)
    try:
        ddp.register_comm_hook(None, noop_hook)
        message = "no error"
    except RuntimeError as error:
        message = str(error).splitlines()[0]
    return {
        "clone": clone.state_dict(),
        "pickled": buffer.tell() > 0,
        "attributes": sorted(set(vars(ddp)) | set(vars(ddp.module))),
        "second registration": message,
    }


def fullgraph_outside(rank: int) -> Any:
    """`torch.compile(ddp, fullgraph=True)`: whatever torch says to it, it says with us."""
    torch.manual_seed(3)
    ddp = DistributedDataParallel(Net())
    module = torch.compile(ddp, backend="aot_eager", fullgraph=True)
    try:
        module(batch(rank, 0)).sum().backward()
    except Exception as error:
        return {"error": type(error).__name__}
    return {name: parameter.grad for name, parameter in ddp.named_parameters()}


def compiled_step(rank: int) -> Any:
    """The optimizer's step compiled, as one graph."""
    torch.manual_seed(3)
    ddp = DistributedDataParallel(Net())
    optimizer = torch.optim.Adam(ddp.parameters(), lr=0.01)
    step = torch.compile(optimizer.step, backend="aot_eager", fullgraph=False)
    for number in range(4):
        optimizer.zero_grad()
        ddp(batch(rank, number)).pow(2).mean().backward()
        step()
    return ddp.state_dict()


def reentrant_checkpoint(rank: int) -> Any:
    """Activation checkpointing of both kinds: nested backward passes in one of them."""
    results = {}
    for reentrant in (True, False):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
        ddp = DistributedDataParallel(Checkpointed(model, reentrant=reentrant), static_graph=reentrant)
        optimizer = torch.optim.Adam(ddp.parameters(), lr=0.01)
        for step in range(4):
            optimizer.zero_grad()
            inputs = batch(rank, step).float().requires_grad_()
            ddp(inputs).pow(2).mean().backward()
            optimizer.step()
        results[str(reentrant)] = {name: value.clone() for name, value in ddp.state_dict().items()}
    return results


class Checkpointed(nn.Module):
    """Its middle is recomputed in the backward pass."""

    def __init__(self, inner: nn.Sequential, *, reentrant: bool) -> None:
        super().__init__()
        self.inner = inner
        self.reentrant = reentrant

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.inner, inputs, use_reentrant=self.reentrant)


CASES: dict[str, Callable[[int], Any]] = {
    "objects": objects_as_without_us,
    "compile-outside-fullgraph": fullgraph_outside,
    "compiled-step": compiled_step,
    "checkpointing": reentrant_checkpoint,
}


def case(name: str, **options: Any) -> None:
    CASES[name] = lambda rank: train(rank, **options)


for as_view in (False, True):
    for to_none in (True, False):
        for kind in (torch.float32, torch.bfloat16):
            case(
                f"plain-{kind}-view={as_view}-none={to_none}",
                dtype=kind,
                gradient_as_bucket_view=as_view,
                set_to_none=to_none,
            )
        memory = {"gradient_as_bucket_view": as_view, "set_to_none": to_none}
        suffix = f"view={as_view}-none={to_none}"
        case(f"no_sync-{suffix}", micro_batches=3, **memory)
        case(f"static_graph-{suffix}", static_graph=True, **memory)
        case(f"find_unused-{suffix}", find_unused_parameters=True, skip_branch=True, **memory)
        case(
            f"find_unused-no_sync-{suffix}",
            find_unused_parameters=True,
            skip_branch=True,
            micro_batches=2,
            **memory,
        )
        case(f"join-initial-{suffix}", join=True, **memory)
        case(f"join-active-{suffix}", join=False, **memory)
        case(f"fp16-python-{suffix}", register=register_fp16, **memory)
        case(f"fp16-builtin-{suffix}", register=register_builtin_fp16, **memory)
    case(
        f"allreduce-builtin-view={as_view}",
        register=register_builtin_allreduce,
        gradient_as_bucket_view=as_view,
    )
    case(f"user-hook-view={as_view}", register=register_raw, gradient_as_bucket_view=as_view)
    case(f"user-hook-late-view={as_view}", register=register_fp16, late=True, gradient_as_bucket_view=as_view)
    case(f"deepcopy-view={as_view}", copied=True, gradient_as_bucket_view=as_view)
case("powersgd", register=register_power_sgd, bucket_cap_mb=25, gradient_as_bucket_view=False)
case("one-bucket", bucket_cap_mb=25)
for as_view in (False, True):
    for to_none in (True, False):
        memory = {"gradient_as_bucket_view": as_view, "set_to_none": to_none}
        case(f"batched_grad_copy-view={as_view}-none={to_none}", batched_grad_copy=True, **memory)
case("sparse", sparse=True, optimizer=torch.optim.SGD)
case("compile-inside", compile_inside=True, bucket_cap_mb=25)
case("compile-outside", compile_outside=True, bucket_cap_mb=25)


def main(output: str, names: list[str]) -> None:
    with process_group() as rank:
        results = {}
        for name in names or CASES:
            results[name] = CASES[name](rank)
            torch._dynamo.reset()
        if rank == 0:
            torch.save(results, Path(output))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
