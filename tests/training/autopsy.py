"""Micro-batches that go bad in one operator each, one case after the other, in one process group.

usage: python -m tests.training.autopsy OUTPUT

The fault is in the data of rank 1 in the last step of each case, whose update is left out. OUTPUT gets the
names of the cases in order, written by rank 0.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.training.group import process_group

STEPS = 3
BAD_STEP = STEPS - 1
WIDTH = 6


class Block(nn.Module):
    """A linear layer, and something that goes wrong where its input is an exact 0 or as large as 1000."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.linear(self.spoil(values))

    def spoil(self, values: torch.Tensor) -> torch.Tensor:
        return values


class Log(Block):
    def spoil(self, values: torch.Tensor) -> torch.Tensor:
        return values.abs().log()  # log of 0


class MaskedLog(Block):
    """The logarithm of 0 is taken, and is not used; then one is used."""

    def spoil(self, values: torch.Tensor) -> torch.Tensor:
        unused = torch.zeros(3).log()
        torch.where(unused < 0, 0.0, unused)
        return values.abs().log()  # the log that is used


class Sqrt(Block):
    def spoil(self, values: torch.Tensor) -> torch.Tensor:
        return values.abs().sqrt()  # its slope at 0 is infinite


class Attention(Block):
    """Every row has a masked place; a row of zeros in the input masks all of it."""

    def spoil(self, values: torch.Tensor) -> torch.Tensor:
        scores = values @ values.T
        mask = torch.eye(len(values), dtype=torch.bool)
        honest = scores.masked_fill(mask, float("-inf")).softmax(-1)
        empty = (values == 0).all(-1, keepdim=True)
        weights = scores.masked_fill(empty, float("-inf")).softmax(-1)  # a row without a place
        return (honest + weights) @ values


class Exp(Block):
    def spoil(self, values: torch.Tensor) -> torch.Tensor:
        return values.exp()  # of 1000


class Ratio(Block):
    def spoil(self, values: torch.Tensor) -> torch.Tensor:
        return values / values.abs().sum(-1, keepdim=True)  # 0 / 0


class Net(nn.Module):
    def __init__(self, block: type[Block]) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.body = nn.Sequential(nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        self.block = block()
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        mixed = self.body(self.first(values))
        # What is 0 or large in the input is so after the layers, too.
        values = torch.where((values == 0) | (values > 100), mixed * 0 + values, mixed)
        return self.last(self.block(values))


def values_of(rank: int, step: int, micro: int, fill: float | None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    values = torch.randn(4, WIDTH, generator=generator)
    if fill is not None:
        values[1] = fill
    return values


def code(text: str) -> dict[str, Any]:
    return {"code": text}


FORWARD = {"phase": "PHASE_FORWARD", "module": "block"}
BACKWARD = {"phase": "PHASE_BACKWARD", "module": "block"}

# name: (options, what rank 1 should journal)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "log": ({"block": Log}, {**FORWARD, "operator": "aten.log.default", "at": "log of 0"}),
    "masked_log": (
        {"block": MaskedLog},
        {**FORWARD, "operator": "aten.log.default", "at": "the log that is used"},
    ),
    "sqrt": ({"block": Sqrt}, {**BACKWARD, "operator": "aten.div.Tensor", "at": "its slope at 0"}),
    "attention": (
        {"block": Attention},
        {**FORWARD, "operator": "aten._softmax.default", "at": "without a place"},
    ),
    "exp": ({"block": Exp, "fill": 1000.0}, {**FORWARD, "operator": "aten.exp.default", "at": "of 1000"}),
    "ratio": ({"block": Ratio}, {**FORWARD, "operator": "aten.div.Tensor", "at": "0 / 0"}),
}


def run(rank: int, options: dict[str, Any]) -> None:
    torch.manual_seed(5)
    ddp = DistributedDataParallel(Net(options["block"]))
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01)
    for step in range(STEPS):
        optimizer.zero_grad()
        bad = rank == 1 and step == BAD_STEP
        output = ddp(values_of(rank, step, 0, options.get("fill", 0.0) if bad else None))
        output.pow(2).mean().backward()
        if step != BAD_STEP:
            optimizer.step()
    dist.barrier()


def main(output: Path) -> None:
    with process_group() as rank:
        for options, _ in CASES.values():
            run(rank, options)
        if rank == 0:
            output.write_text(json.dumps([*CASES]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
