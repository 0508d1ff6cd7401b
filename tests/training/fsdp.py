"""Train models that FSDP2 shards, one case after the other, in one group of four ranks.

usage: python -m tests.training.fsdp OUTPUT

Rank 1 has the fault, in one step of each case. Its update is left out: by the guard if the run is watched,
else by hand. Each rank writes to the folder OUTPUT what it holds of every case's weights in the end.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from gradwatch.agent import watch
from tests.training.group import process_group
from tests.training.phases import NAN, Spoil, spoilt, values_of

if TYPE_CHECKING:
    from collections.abc import Callable

RANKS = 4
BAD_RANK = 1
LOSS_RANK = 2
STEPS = 4
BAD_STEP = 2
SPOILT = "blocks.1.up.weight"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 9)
        self.down = nn.Linear(9, 6)

    def forward(self, values: torch.Tensor, spoil: str = "") -> torch.Tensor:
        weight = Spoil.apply(self.up.weight) if spoil == "backward" else self.up.weight
        hidden = nn.functional.linear(values, weight, self.up.bias).tanh()
        if spoil == "forward":
            hidden = (hidden - hidden).log()
        return values + self.down(hidden)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.last = nn.Linear(6, 3)
        self.recompute = self.reentrant = False

    def forward(self, values: torch.Tensor, spoil: str = "", *, unused: int | None = None) -> torch.Tensor:
        values = self.first(values)
        for place, block in enumerate(self.blocks):
            if place == unused:
                continue
            told = spoil if place == 1 else ""
            if self.recompute:
                values = checkpoint(block, values, told, use_reentrant=self.reentrant)
            else:
                values = block(values, told)
        return self.last(values)

    def run(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The same, by another name."""
        return self.forward(*args, **kwargs)


def whole(net: Net) -> None:
    fully_shard(net)


def nested(net: Net, **options: Any) -> None:
    for block in net.blocks:
        fully_shard(block, **options)
    fully_shard(net, **options)


def bf16(net: Net) -> None:
    nested(net, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))


def hybrid(net: Net) -> None:
    nested(net, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))


def by_column(parameter: nn.Parameter) -> Shard | None:
    """Matrices are divided by columns, where they can be."""
    return Shard(1) if parameter.dim() == 2 and parameter.shape[1] % 2 == 0 else None


def columns(net: Net) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    nested(net, mesh=mesh, shard_placement_fn=by_column)


def compiled(net: Net) -> None:
    nested(net)
    for block in net.blocks:
        block.compile(backend="aot_eager")


def offloaded(net: Net) -> None:
    nested(net, offload_policy=CPUOffloadPolicy(pin_memory=False))


def reentrant(net: Net) -> None:
    net.recompute = True
    net.reentrant = True
    nested(net)


def tied(net: Net) -> None:
    net.blocks[2].up.weight = net.blocks[0].up.weight
    whole(net)


def grouped(net: Net) -> None:
    fully_shard([net.blocks[0], net.blocks[1]])
    fully_shard(net)


def recomputed(net: Net) -> None:
    net.recompute = True
    nested(net)


def named(net: Net) -> None:
    from torch.distributed.fsdp import register_fsdp_forward_method

    nested(net)
    register_fsdp_forward_method(net, "run")


BACKWARD = {"phase": "PHASE_BACKWARD", "only": SPOILT, "operator": "aten.full_like.default"}
FORWARD = {"phase": "PHASE_FORWARD", "operator": "aten.log.default"}
INPUT = {"phase": "PHASE_INPUT", "missing": "the input is not finite"}

# name: (how it is sharded, what is done, what the probe should say)
CASES: dict[str, tuple[Callable[[Net], None], dict[str, Any], dict[str, Any]]] = {
    "whole": (whole, {"kind": "backward"}, BACKWARD),
    "nested": (nested, {"kind": "backward"}, BACKWARD),
    "bf16": (bf16, {"kind": "backward"}, BACKWARD),
    "hybrid": (hybrid, {"kind": "backward"}, BACKWARD),
    "columns": (columns, {"kind": "backward"}, BACKWARD),
    "grouped": (grouped, {"kind": "backward"}, BACKWARD),
    "compiled": (compiled, {"kind": "forward"}, FORWARD),
    "offloaded": (offloaded, {"kind": "backward"}, BACKWARD),
    "reentrant": (
        reentrant,
        {"kind": "backward"},
        {"phase": "PHASE_BACKWARD", "only": SPOILT, "fails": "checkpoint"},
    ),
    "tied": (tied, {"kind": "forward"}, FORWARD),
    "recomputed": (recomputed, {"kind": "backward"}, BACKWARD),
    "by_another_name": (
        named,
        {"kind": "backward"},
        {"phase": "PHASE_BACKWARD", "only": SPOILT, "reason": "register_fsdp_forward_method"},
    ),
    "input": (nested, {"kind": "input"}, INPUT),
    "forward": (nested, {"kind": "forward"}, FORWARD),
    "forward_whole": (whole, {"kind": "forward"}, FORWARD),
    "loss": (nested, {"kind": "loss"}, {"phase": "PHASE_LOSS", "reason": "the loss made it"}),
    # Nothing is replayed on the other rank that is bad; its shards are needed all the same.
    "beside_a_loss": (nested, {"kind": "backward", "loss_on": LOSS_RANK}, {**BACKWARD, "loss_on": LOSS_RANK}),
    "unused": (nested, {"kind": "backward", "unused": True}, BACKWARD),
    "last_micro": (
        nested,
        {"kind": "backward", "micro": 3, "bad_micro": 2},
        {**BACKWARD, "microbatch": 2},
    ),
    "first_micro": (
        nested,
        {"kind": "backward", "micro": 3, "bad_micro": 0},
        {**BACKWARD, "microbatch": 0},
    ),
    "input_of_the_second": (
        bf16,
        {"kind": "input", "micro": 3, "bad_micro": 1},
        {**INPUT, "microbatch": 1},
    ),
    # Of the weights all ranks get the bad shard of one: all gradients are bad, on every rank.
    "parameter": (
        nested,
        {"kind": "parameter"},
        {"phase": "PHASE_PARAMETER", "everywhere": True, "missing": "a parameter of the model"},
    ),
}


def loss_of(output: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "loss":
        return (output * 0).pow(2).sum().sqrt()
    return output.float().pow(2).mean()


def run(rank: int, shard: Callable[[Net], None], options: dict[str, Any]) -> Net:
    kind, micro_batches = options["kind"], options.get("micro", 1)
    guarded = "GRADWATCH_GUARD" in os.environ
    torch.manual_seed(3)
    net: Any = Net()
    shard(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    watch(net, optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        if step == BAD_STEP and kind == "parameter" and rank == BAD_RANK:
            with torch.no_grad():
                net.blocks[1].down.weight._local_tensor[0, 0] = NAN
        for micro in range(micro_batches):
            bad = (rank, step, micro) == (BAD_RANK, BAD_STEP, options.get("bad_micro", 0))
            values = values_of(rank, step, micro)
            if bad and kind == "input":
                values = spoilt(values)
            net.set_requires_gradient_sync(micro == micro_batches - 1)
            unused = step % 3 if options.get("unused") and step != BAD_STEP else None
            call = net.run if shard is named else net
            bad_loss = (rank, step) == (options.get("loss_on"), BAD_STEP)
            output = call(values, kind if bad else "", unused=unused)
            loss_of(output, "loss" if bad_loss else kind if bad else "").backward()
        # Bad weights stay.
        is_bad = step >= BAD_STEP if kind == "parameter" else step == BAD_STEP
        if guarded or not is_bad:
            optimizer.step()
    return net


def main(output: Path) -> None:
    with process_group() as rank:
        held = {}
        for name, (shard, options, _) in CASES.items():
            net = run(rank, shard, options)
            held[name] = [parameter._local_tensor.clone() for parameter in net.parameters()]
            dist.barrier()
        # A model of another kind, beside them.
        DistributedDataParallel(nn.Linear(2, 2))
        torch.save(held, output / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
