"""Train many small models in one process group, each with one planted fault or none.

usage: python -m tests.training.campaign SEED FAULTS CLEAN OUTPUT [STOP_FILE]

Every model trains past the 10 finite rounds that close the incident before it; the fault comes in
its last step. With STOP_FILE it goes on, model after model, until that file is there, and rests after
each, so that there are not the more faults the longer it takes. OUTPUT gets
what was planted, one JSON document, written by rank 0. The truth about the backward order is taken
by hooks of this script's own.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.faults import GradientFault, inject
from tests.training.group import process_group

STEPS_BEFORE = 12
REST_SECONDS = 0.25


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 8)])
        self.unused_at_times = nn.Linear(32, 32)

    def example(self) -> torch.Tensor:
        return torch.randn(4, 16)

    def forward(self, inputs: torch.Tensor, *, skip: bool = False) -> torch.Tensor:
        hidden = self.layers[1](self.layers[0](inputs).relu()).relu()
        if not skip:
            hidden = hidden + self.unused_at_times(hidden).tanh()
        return self.layers[2](hidden)


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def example(self) -> torch.Tensor:
        return torch.randn(4, 3, 6, 6)

    def forward(self, inputs: torch.Tensor, *, skip: bool = False) -> torch.Tensor:
        hidden = self.norm(self.stem(inputs)).relu()
        if not skip:
            hidden = self.body(hidden).relu()
        return self.head(hidden.mean((2, 3)))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(12, 16)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(16, 12)

    def example(self) -> torch.Tensor:
        return torch.randn(2, 5, 12)

    def forward(self, inputs: torch.Tensor, *, skip: bool = False) -> torch.Tensor:
        hidden = self.blocks[0](self.embedding(inputs))
        if not skip:
            hidden = self.blocks[1](hidden)
        return self.head(hidden)


MODELS: dict[str, Any] = {"mlp": Mlp, "conv": Conv, "transformer": Transformer}
VALUES = {"nan": float("nan"), "+inf": float("inf"), "-inf": float("-inf")}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"gradient_as_bucket_view": True},
    {"static_graph": True},
    {"find_unused_parameters": True},
    {"bucket_cap_mb": 25},
]


def run_case(
    draw: random.Random, rank: int, world_size: int, steps_so_far: int, *, faulty: bool
) -> dict[str, Any]:
    """One model, one optimizer, one fault or none. All ranks draw the same."""
    name = draw.choice(sorted(MODELS))
    dtype = draw.choice([torch.float32, torch.bfloat16])
    options = {"bucket_cap_mb": 0.003, **draw.choice(OPTIONS)}
    to_none = draw.random() < 0.5
    seed = draw.randrange(1 << 30)
    last = STEPS_BEFORE + draw.randrange(6)
    torch.manual_seed(seed)
    model = MODELS[name]().to(dtype)
    parameters = dict(model.named_parameters())
    victim = draw.choice(sorted(parameters))
    skips = bool(options.get("find_unused_parameters")) and not victim.startswith(
        ("unused", "body", "blocks.1")
    )
    planted_value = draw.choice(sorted(VALUES))
    fault: GradientFault = inject.nonfinite_at(
        rank=draw.randrange(world_size),
        step=last,
        parameter=victim,
        value=VALUES[planted_value] if faulty else draw.choice([-1.0, 1.0]) * torch.finfo(dtype).max,
        elements=draw.choice([1, 1, 7, 1 << 30]),
        offset=draw.randrange(1 << 20),
    )
    if not faulty and fault.elements > 1:
        # The largest finite value in one element only: a sum of several would overflow when it is reduced.
        fault = GradientFault(fault.rank, fault.step, victim, fault.value, 1, fault.offset)

    order: list[str] = []
    for parameter_name, parameter in parameters.items():
        parameter.register_post_accumulate_grad_hook(lambda _, name=parameter_name: order.append(name))
    ddp = DistributedDataParallel(model, **options)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=1e-3)
    torch.manual_seed(seed + 1 + rank)
    for step in range(last + 1):
        optimizer.zero_grad(set_to_none=to_none)
        order.clear()
        handle = fault.arm(parameters[victim], rank=rank, step=step)
        inputs = model.example().to(dtype)
        skip = skips and (step + rank) % 3 == 0
        ddp(inputs, skip=skip).float().pow(2).mean().backward()
        if handle is not None:
            handle.remove()
        optimizer.step()
    position = [order.index(victim)]
    dist.broadcast_object_list(position, src=fault.rank)
    elements = min(fault.elements, parameters[victim].numel())
    return {
        "model": name,
        "dtype": str(dtype),
        "options": options,
        "steps": last + 1,
        "planted": {
            "rank": fault.rank,
            "step": steps_so_far + last,
            "parameter": victim,
            "value": planted_value,
            "count": elements,
            "backward_position": position[0],
        }
        if faulty
        else None,
    }


def main(seed: int, faults: int, clean: int, output: Path, stop: Path | None) -> None:
    with process_group() as rank:
        draw = random.Random(seed)
        kinds = [True] * faults + [False] * clean
        draw.shuffle(kinds)
        cases: list[dict[str, Any]] = []
        steps = 0
        while len(cases) < len(kinds) or (stop is not None and not agreed(stop)):
            faulty = kinds[len(cases) % len(kinds)]
            cases.append(run_case(draw, rank, dist.get_world_size(), steps, faulty=faulty))
            steps += cases[-1]["steps"]
            if len(cases) > len(kinds):
                time.sleep(REST_SECONDS)
            if rank == 0 and len(cases) % 20 == 0:
                print(f"world size {dist.get_world_size()}: {len(cases)} of {len(kinds)} cases", flush=True)
        if rank == 0:
            output.write_text(json.dumps(cases))


def agreed(stop: Path) -> bool:
    """Whether rank 0 sees the file: the ranks must end after the same model."""
    seen = [stop.exists()]
    dist.broadcast_object_list(seen, src=0)
    return seen[0]


if __name__ == "__main__":
    main(
        *(int(argument) for argument in sys.argv[1:4]),
        Path(sys.argv[4]),
        Path(sys.argv[5]) if len(sys.argv) > 5 else None,
    )
