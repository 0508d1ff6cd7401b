"""Train many small models in one process group, each with a fault of the catalogue or none.

usage: python -m tests.training.attribution SEED PLAN OUTPUT

PLAN is a JSON list of the names of CLASSES, in the order in which they are trained. Every model trains past
the 10 finite rounds that close the incident before it; the fault comes in its last step but for those that
take longer to be seen. OUTPUT gets the cases with what must be said of each, one JSON document, written by
rank 0. Which parameter goes bad first is seen by hooks of this script's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.faults import Fault, inject
from tests.training.breakable import BATCH, BLOCKS, LENGTH, WIDTH, Breakable, sum_then_divide
from tests.training.group import process_group

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

STEPS_BEFORE = 12
REPLICA_CHECK_EVERY = 5
NAN = float("nan")
NO_FAULT = Fault(rank=0, step=0)


@dataclass(frozen=True)
class Case:
    """A model to be trained, and what must be said of it.

    Attributes:
        expected: fields of the incident, and of its `first`; None for no incident.
        after: steps that follow the one with the fault.
        shown_after: so many steps after the fault is planted it is seen.
        summed: gradients are summed up by a hook that divides them afterwards.
    """

    fault: Fault | None = None
    expected: dict[str, Any] | None = None
    micro_batches: int = 1
    after: int = 0
    shown_after: int = 0
    scaler: bool = False
    adam: bool = False
    summed: bool = False
    shared_statistics: bool = False


@dataclass
class Place:
    """Where a fault is to be: drawn, the same on all ranks."""

    draw: random.Random
    world_size: int
    step: int
    rank: int = field(init=False)
    block: str = field(init=False)

    def __post_init__(self) -> None:
        self.rank = self.draw.randrange(self.world_size)
        self.block = f"blocks.{self.draw.randrange(BLOCKS)}"

    @property
    def at(self) -> dict[str, int]:
        """The rank and the step."""
        return {"rank": self.rank, "step": self.step}

    def parameter(self) -> str:
        names = [name for name, _ in Breakable().named_parameters()]
        return self.draw.choice(names)

    def element(self) -> int:
        return self.draw.randrange(1 << 20)

    def value(self) -> float:
        return self.draw.choice([NAN, math.inf, -math.inf])


def began_in(phase: str, **fields: Any) -> dict[str, Any]:
    """What must be said of a fault that begins on one rank in a phase, which is then the cause as well."""
    return {"phase": phase, "cause": phase, **fields}


def bad_gradient(place: Place) -> Case:
    parameter = place.parameter()
    fault = inject.nonfinite_gradient(
        **place.at, parameter=parameter, value=place.value(), element=place.element()
    )
    return Case(fault, began_in("backward"))


def two_ranks(place: Place) -> Case:
    ranks = sorted(place.draw.sample(range(place.world_size), 2))
    fault = inject.nonfinite_on_two_ranks_at_once(
        ranks=(ranks[0], ranks[1]), step=place.step, parameter=place.parameter()
    )
    return Case(fault, began_in("backward", origins=ranks, tie=True))


def log_of_zero(place: Place) -> Case:
    module = f"{place.block}.log"
    fault = inject.log_of_zero(**place.at, module=module)
    return Case(fault, began_in("forward", operator="aten.log.default", module=module))


def sqrt_of_zero(place: Place) -> Case:
    module = f"{place.block}.root"
    fault = inject.sqrt_of_zero(**place.at, module=module)
    return Case(fault, began_in("backward", operator="aten.div.Tensor", module=module))


def masked_softmax(place: Place) -> Case:
    module = f"{place.block}.attention"
    fault = inject.fully_masked_softmax(**place.at, module=module)
    return Case(fault, began_in("forward", operator="aten._softmax.default", module=module))


def exploding_learning_rate(place: Place) -> Case:
    fault = inject.exploding_learning_rate(step=place.step, learning_rate=1e30)
    everyone = list(range(place.world_size))
    return Case(fault, began_in("forward", origins=everyone, tie=True), after=1, shown_after=1)


def nan_in_the_data(place: Place) -> Case:
    return Case(inject.nan_in_the_data(**place.at, element=place.element()), began_in("input"))


def bit_flip_in_the_data(place: Place) -> Case:
    return Case(inject.bit_flip_in_the_data(**place.at, element=place.element()), began_in("input"))


def bit_flip_in_a_weight(place: Place) -> Case:
    # Finite, and its square is not.
    fault = inject.bit_flip_in_a_weight(
        **place.at, parameter=f"{place.block}.mix.weight", element=place.element()
    )
    return Case(fault, began_in("forward", operator="aten.pow.Tensor_Scalar", module=f"{place.block}.root"))


def poisoned_weight(place: Place) -> Case:
    fault = inject.poisoned_weight(**place.at, parameter=place.parameter(), element=place.element())
    return Case(fault, began_in("parameter"))


def bad_loss(place: Place) -> Case:
    return Case(inject.sqrt_of_zero_in_the_loss(**place.at), began_in("loss"))


def third_micro_batch(place: Place) -> Case:
    at: dict[str, Any] = {**place.at, "microbatch": 2}
    module = f"{place.block}.log"
    fault, expected = place.draw.choice(
        [
            (inject.nan_in_the_data(**at, element=place.element()), began_in("input")),
            (
                inject.log_of_zero(**at, module=module),
                began_in("forward", operator="aten.log.default", module=module),
            ),
            (inject.sqrt_of_zero_in_the_loss(**at), began_in("loss")),
        ]
    )
    return Case(fault, expected | {"microbatch": 2}, micro_batches=4)


def overflow_in_the_sum(place: Place) -> Case:
    fault = inject.overflow_in_the_sum(step=place.step, parameter=place.parameter())
    return Case(fault, {"cause": "reduction", "rank": None, "origins": [], "tie": False}, summed=True)


def second_moment(place: Place) -> Case:
    fault = inject.overflow_of_the_second_moment(**place.at, parameter=place.parameter())
    return Case(fault, {"cause": "optimizer_state", "phase": None, "parameter": fault.parameter}, adam=True)


def shared_statistics(place: Place) -> Case:
    fault = inject.nan_in_the_data(**place.at, element=place.element())
    # Every rank is bad in that step; where it began was bad first.
    return Case(fault, began_in("input"), shared_statistics=True)


def diverged_replica(place: Place) -> Case:
    fault = inject.diverged_replica(**place.at, parameter=place.parameter(), element=place.element())
    expected: dict[str, Any] = {"cause": "replica_divergence", "phase": None, "parameter": fault.parameter}
    if place.world_size == 2:
        # It cannot be told which of two is the other one.
        expected |= {"origins": [0, 1], "tie": True}
    seen_after = -place.step % REPLICA_CHECK_EVERY
    return Case(fault, expected, after=seen_after, shown_after=seen_after)


def clean(place: Place) -> Case:
    return Case(micro_batches=place.draw.choice([1, 1, 2]), adam=place.draw.random() < 0.5)


def scaler_overflow(place: Place) -> Case:
    return Case(inject.scaler_overflow(**place.at), scaler=True)


CLASSES: dict[str, Callable[[Place], Case]] = {
    "gradient": bad_gradient,
    "two ranks at once": two_ranks,
    "log of 0": log_of_zero,
    "sqrt of 0": sqrt_of_zero,
    "masked softmax": masked_softmax,
    "learning rate": exploding_learning_rate,
    "NaN in the data": nan_in_the_data,
    "bit flip, data": bit_flip_in_the_data,
    "bit flip, weight": bit_flip_in_a_weight,
    "poisoned weight": poisoned_weight,
    "loss": bad_loss,
    "third micro-batch": third_micro_batch,
    "overflow in the sum": overflow_in_the_sum,
    "second moment": second_moment,
    "shared statistics": shared_statistics,
    "diverged replica": diverged_replica,
}
CLEAN: dict[str, Callable[[Place], Case]] = {"clean": clean, "scaler overflow": scaler_overflow}


class FirstBad:
    """Which parameter's gradient goes bad first in the backward passes of a step."""

    def __init__(self, model: nn.Module) -> None:
        self.name: str | None = None
        for name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda one, name=name: self._see(one, name))

    def _see(self, parameter: torch.Tensor, name: str) -> None:
        if self.name is None and parameter.grad is not None and not parameter.grad.isfinite().all():
            self.name = name


def train(case: Case, *, seed: int, rank: int, last: int) -> str | None:
    """Train one model; the first parameter that went bad on this rank."""
    torch.manual_seed(seed)
    model = Breakable(shared_statistics=case.shared_statistics)
    first_bad = FirstBad(model)
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.0005)
    if case.summed:
        ddp.register_comm_hook(None, sum_then_divide)
    optimizer: torch.optim.Optimizer = (
        torch.optim.Adam(ddp.parameters()) if case.adam else torch.optim.SGD(ddp.parameters(), lr=1e-3)
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, enabled=case.scaler)
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
                last_one = micro == case.micro_batches - 1
                with contextlib.nullcontext() if last_one else ddp.no_sync():
                    scaler.scale(fault.in_loss(ddp(inputs).square().mean())).backward()
                fault.in_optimizer(optimizer)
            scaler.step(optimizer)
            scaler.update()
    return first_bad.name


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
            expected = {"microbatch": 0, "parameter": names[expected["rank"]], **expected}
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
