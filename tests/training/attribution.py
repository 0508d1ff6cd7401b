"""Train many small models in one process group, each with a fault of the catalogue or none.

usage: python -m tests.training.attribution SEED PLAN OUTPUT

PLAN is a JSON list of names of the catalogue's classes, in the order in which they are trained. Every model
trains past the 10 finite rounds that close the incident before it; the fault comes in its last step but for
those that take longer to be seen. OUTPUT gets the cases with what must be said of each, one JSON document,
written by rank 0. Which parameter goes bad first is seen by hooks of this script's own.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gradwatch.agent import watch
from tests.faults import Fault, LargeLearningRate
from tests.training.breakable import BATCH, LENGTH, WIDTH, Breakable, sum_then_divide
from tests.training.catalogue import CLASSES, CLEAN, NAN, Case, Place
from tests.training.group import process_group

STEPS_BEFORE = 12
SCALE = 2.0**60
NO_FAULT = Fault(rank=0, step=0)


class FirstBad:
    """Which parameter's gradient goes bad first in the backward passes of a step."""

    def __init__(self, model: nn.Module) -> None:
        self.name: str | None = None
        for name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda one, name=name: self._see(one, name))

    def _see(self, parameter: torch.Tensor, name: str) -> None:
        if self.name is None and parameter.grad is not None and not parameter.grad.isfinite().all():
            self.name = name


class Replicated:
    """A model under DDP."""

    def __init__(self, case: Case, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = Breakable(shared_statistics=case.shared_statistics)
        self.first_bad = FirstBad(self.model)
        self.run = DistributedDataParallel(self.model, bucket_cap_mb=0.0005)
        if case.summed:
            self.run.register_comm_hook(None, sum_then_divide)

    def micro_batch(self, *, is_last: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if is_last else self.run.no_sync()

    def learn_of(self, fault: Fault, inputs: torch.Tensor) -> None:
        """Nothing to do: its gradients are seen as they come."""


class Sharded:
    """A model under FSDP2, whose gradients no hook sees: a twin that is not sharded has the same faults."""

    def __init__(self, case: Case, seed: int) -> None:
        torch.manual_seed(seed)
        self.run = self.model = Breakable(shared_statistics=case.shared_statistics)
        self._twin = copy.deepcopy(self.model)
        # Runs on one rank alone.
        self._twin.norm = nn.Identity()
        self.first_bad = FirstBad(self._twin)
        for block in self.model.blocks:
            fully_shard(block)
        self._root = fully_shard(self.model)

    def micro_batch(self, *, is_last: bool) -> contextlib.AbstractContextManager[None]:
        self._root.set_requires_gradient_sync(is_last)
        return contextlib.nullcontext()

    def learn_of(self, fault: Fault, inputs: torch.Tensor) -> None:
        """Run the twin on the micro-batch that a fault strikes."""
        if fault is NO_FAULT:
            return
        fault.in_weights(self._twin)
        with fault.in_modules(self._twin):
            loss = fault.in_loss(self._twin(inputs).square().mean())
            # Its own weights do not explode with the others'.
            (loss * NAN if isinstance(fault, LargeLearningRate) else loss).backward()


def train(case: Case, *, seed: int, rank: int, last: int) -> str | None:
    """Train one model; the first parameter that went bad on this rank."""
    wrapped = Sharded(case, seed) if case.sharded else Replicated(case, seed)
    model = wrapped.model
    parameters = list(model.parameters())
    optimizer: torch.optim.Optimizer = (
        torch.optim.Adam(parameters) if case.adam else torch.optim.SGD(parameters, lr=1e-3)
    )
    # FSDP2 keeps the model before alive, whose optimizer would be the one that is counted by.
    watch(wrapped.run, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, enabled=case.scaler)
    torch.manual_seed(seed + 1 + rank)
    for step in range(last + 1 + case.after):
        optimizer.zero_grad()
        # What a fault does to modules lasts to the end of the step, when the micro-batch is replayed.
        with contextlib.ExitStack() as within:
            for micro in range(case.micro_batches):
                fault = case.fault
                if fault is None or not fault.is_due(rank=rank, step=step, microbatch=micro):
                    fault = NO_FAULT
                within.enter_context(fault.in_modules(model))
                fault.in_weights(model)
                inputs = fault.in_batch(torch.randn(BATCH, LENGTH, WIDTH))
                with wrapped.micro_batch(is_last=micro == case.micro_batches - 1):
                    scaler.scale(fault.in_loss(wrapped.run(inputs).square().mean())).backward()
                wrapped.learn_of(fault, inputs)
                fault.in_optimizer(optimizer)
            scaler.step(optimizer)
            scaler.update()
    assert not case.scaler or scaler.get_scale() < SCALE, "the scaled loss has not overflown"
    return wrapped.first_bad.name


def run_case(name: str, draw: random.Random, rank: int, steps_so_far: int) -> dict[str, Any]:
    """One model. All ranks draw the same."""
    world_size = dist.get_world_size()
    last = STEPS_BEFORE + draw.randrange(4)
    place = Place(draw, world_size, last)
    case = {**CLASSES, **CLEAN}[name](place)
    bad = train(case, seed=draw.randrange(1 << 30), rank=rank, last=last)
    expected = case.expected
    if expected is not None and case.fault is not None:
        expected = {"step": steps_so_far + last + case.shown_after, **expected}
        if "origins" not in expected:
            expected |= {"rank": case.fault.rank, "origins": [case.fault.rank], "tie": False}
        elif expected["origins"]:
            expected["rank"] = expected["origins"][0]
        names: list[str | None] = [None] * world_size
        dist.all_gather_object(names, bad)
        if expected.get("phase") is not None:
            # Seen by the rank itself, or by the one whose fault it shares.
            seen = names[expected["rank"]] or next(filter(None, names), None)
            expected = {"microbatch": 0, "parameter": seen, **expected}
    steps = last + 1 + case.after
    fault = None if case.fault is None else dataclasses.asdict(case.fault)
    return {"class": name, "fault": fault, "from": steps_so_far, "steps": steps, "expected": expected}


def main(seed: int, plan: Path, output: Path) -> None:
    with process_group() as rank:
        draw = random.Random(seed)
        cases: list[dict[str, Any]] = []
        steps = 0
        for name in json.loads(plan.read_text()):
            cases.append(run_case(name, draw, rank, steps))
            steps += cases[-1]["steps"]
        if rank == 0:
            output.write_text(json.dumps(cases))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
