"""Gradients that go bad in each phase, one case after the other, in one process group.

usage: python -m tests.training.phases OUTPUT host|device

With `device` the probe looks at this CPU as at a device, whose read-outs come late.
Rank 1 has the fault, in the last step of each case, whose update is left out. OUTPUT gets the names of the
cases in order, written by rank 0.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import UserDict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradwatch.agent import watch
from tests.training.group import process_group
from tests.training.late import late_device_look

STEPS = 4
BAD_STEP = STEPS - 1
NAN = float("nan")


@dataclasses.dataclass
class Batch:
    values: torch.Tensor
    about: dict[str, Any]


class Spoil(torch.autograd.Function):
    """The identity, whose gradient is NaN."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        del ctx
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        del ctx
        return torch.full_like(gradient, NAN)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 6)
        self.first = nn.Linear(6, 12)
        self.last = nn.Linear(12, 3)

    def forward(self, batch: Any, *, spoil: str = "") -> Any:
        values = batch
        if isinstance(batch, (dict, UserDict)):
            values = batch["values"]
        elif isinstance(batch, Batch):
            values = batch.values
        elif isinstance(batch, Opaque):
            values = batch.take()
        if not values.is_floating_point():
            values = self.embedding(values).mean(1)
        hidden = self.first(values).tanh()
        if spoil == "forward":
            hidden = (hidden - hidden).log()
        if spoil == "backward":
            hidden = Spoil.apply(hidden)
        return {"logits": self.last(hidden), "about": "a string"}


class Opaque:
    """Holds its values where nobody can look."""

    __slots__ = ("_values",)

    def __init__(self, values: torch.Tensor) -> None:
        self._values = values

    def take(self) -> torch.Tensor:
        return self._values


def values_of(rank: int, step: int, micro: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    return torch.randn(4, 6, generator=generator)


def loss_of(output: Any, kind: str) -> torch.Tensor:
    logits = output["logits"]
    if kind == "loss":
        # The gradient of sqrt at 0 is infinite, the loss itself is finite.
        return (logits * 0).pow(2).sum().sqrt()
    # Finite, and not any more when it is multiplied by the scale.
    return logits.pow(2).mean() * (1e30 if kind == "overflow" else 1.0)


def spoilt(values: torch.Tensor) -> torch.Tensor:
    values = values.clone()
    values[1, 2] = NAN
    return values


# name: (options, what the probe should say)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tensor": ({"kind": "input"}, {"phase": "PHASE_INPUT"}),
    "dataclass": ({"kind": "input", "wrap": lambda x: Batch(x, {"n": 1})}, {"phase": "PHASE_INPUT"}),
    "user_dict": ({"kind": "input", "wrap": lambda x: UserDict(values=x)}, {"phase": "PHASE_INPUT"}),
    "nested_number": (
        {"kind": "number", "wrap": lambda x: {"values": x, "scale": [1.0]}},
        {"phase": "PHASE_INPUT"},
    ),
    "opaque": ({"kind": "input", "wrap": Opaque}, {"phase": None}),
    "parameter": ({"kind": "parameter"}, {"phase": "PHASE_PARAMETER"}),
    "parameter_and_opaque": ({"kind": "parameter", "wrap": Opaque}, {"phase": "PHASE_PARAMETER"}),
    "forward": ({"kind": "forward"}, {"phase": "PHASE_FORWARD"}),
    "tokens": ({"kind": "forward", "tokens": True}, {"phase": "PHASE_FORWARD"}),
    "loss": ({"kind": "loss"}, {"phase": "PHASE_LOSS"}),
    "loss_of_opaque": ({"kind": "loss", "wrap": Opaque}, {"phase": "PHASE_LOSS"}),
    "backward": ({"kind": "backward"}, {"phase": "PHASE_BACKWARD"}),
    "third_micro_batch": (
        {"kind": "input", "micro": 4, "bad_micro": 2},
        {"phase": "PHASE_INPUT", "microbatch": 2, "batch": 2},
    ),
    "loss_of_the_second": (
        {"kind": "loss", "micro": 3, "bad_micro": 1},
        {"phase": "PHASE_LOSS", "microbatch": 1, "batch": 1},
    ),
    "backward_of_the_first": (
        {"kind": "backward", "micro": 3, "bad_micro": 0},
        {"phase": "PHASE_BACKWARD", "microbatch": 0, "batch": 0},
    ),
    "backward_of_the_second": (
        {"kind": "backward", "micro": 3, "bad_micro": 1},
        {"phase": "PHASE_BACKWARD", "microbatch": 1, "batch": 1},
    ),
    "backward_of_the_last": (
        {"kind": "backward", "micro": 3, "bad_micro": 2},
        {"phase": "PHASE_BACKWARD", "microbatch": 2, "batch": 2},
    ),
    "evaluated_before": ({"kind": "forward", "evaluate": True}, {"phase": "PHASE_FORWARD"}),
    "compiled_inside": ({"kind": "forward", "inside": True}, {"phase": "PHASE_FORWARD"}),
    "compiled_outside": ({"kind": "loss", "outside": True}, {"phase": "PHASE_LOSS"}),
    "static_graph": ({"kind": "forward", "static_graph": True}, {"phase": "PHASE_FORWARD"}),
    "unused": ({"kind": "loss", "find_unused_parameters": True}, {"phase": "PHASE_LOSS"}),
    # A GradScaler's own overflow is no fault; a fault under a GradScaler is one.
    "overflow": ({"kind": "overflow", "scaler": True}, {"phase": "PHASE_LOSS", "overflow": True}),
    "overflow_of_opaque": (
        {"kind": "overflow", "scaler": True, "wrap": Opaque},
        {"phase": "PHASE_LOSS", "overflow": True},
    ),
    "overflow_in_the_second": (
        {"kind": "overflow", "scaler": True, "micro": 3, "bad_micro": 1},
        {"phase": "PHASE_LOSS", "microbatch": 1, "batch": 1, "overflow": True},
    ),
    "scaled_input": ({"kind": "input", "scaler": True}, {"phase": "PHASE_INPUT"}),
    "scaled_parameter": ({"kind": "parameter", "scaler": True}, {"phase": "PHASE_PARAMETER"}),
    "scaled_forward": ({"kind": "forward", "scaler": True}, {"phase": "PHASE_FORWARD"}),
}
# Steps in a row that a GradScaler skips, on rank 1.
COLLAPSE = 20


def run(rank: int, options: dict[str, Any]) -> None:
    kind, wrap = options["kind"], options.get("wrap", lambda values: values)
    micro_batches, bad_micro = options.get("micro", 1), options.get("bad_micro", 0)
    ddp_options = {key: options[key] for key in ("static_graph", "find_unused_parameters") if key in options}
    torch.manual_seed(5)
    net: Any = Net()
    if options.get("inside"):
        net = torch.compile(net, backend="aot_eager")
    ddp = DistributedDataParallel(net, **{"find_unused_parameters": True, **ddp_options})
    module: Any = torch.compile(ddp, backend="aot_eager") if options.get("outside") else ddp
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01)
    watched = watch(ddp, optimizer)
    scaler = torch.amp.GradScaler(
        "cpu", init_scale=options.get("scale", 2.0**60), enabled="scaler" in options
    )
    steps = options.get("steps", STEPS)
    for step in range(steps):
        optimizer.zero_grad()
        if options.get("evaluate"):
            # A pass that no backward pass follows, and whose input is bad.
            ddp(wrap(spoilt(values_of(rank, step, 0))))
        for micro in range(micro_batches):
            bad = (rank, micro) == (1, bad_micro) and step >= options.get("bad_from", BAD_STEP)
            bad = bad and step % options.get("every", 1) == 0
            batch = wrap(values_of(rank, step, micro))
            if options.get("tokens"):
                batch = torch.arange(8).reshape(2, 4)
            if bad and kind == "input":
                batch = wrap(spoilt(values_of(rank, step, micro)))
            if bad and kind == "number":
                batch["scale"] = [1.0, NAN]
                batch["values"] = spoilt(batch["values"])
            if bad and kind == "parameter":
                with torch.no_grad():
                    ddp.module.first.weight[0, 0] = NAN
            watched.tag(batch=micro)
            last = micro == micro_batches - 1
            with ddp.no_sync() if not last else torch.enable_grad():
                output = module(batch, spoil=kind if bad else "")
                scaler.scale(loss_of(output, kind if bad else "")).backward()
        if scaler.is_enabled() or step != BAD_STEP:
            scaler.step(optimizer)
            scaler.update()
    dist.barrier()


def main(output: Path, look: str) -> None:
    if look == "device":
        late_device_look()
    with process_group() as rank:
        for options, _ in CASES.values():
            run(rank, options)
        sinking = {"kind": "loss", "scaler": True, "scale": 4.0, "every": 2, "bad_from": 4}
        run(rank, sinking | {"steps": 16})
        run(rank, {"kind": "overflow", "scaler": True, "steps": 6 + COLLAPSE, "bad_from": 6})
        if rank == 0:
            output.write_text(json.dumps([*CASES]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
