"""Train many small models in one process group, each with a fault of the catalogue or none.

usage: python -m tests.training.attribution SEED PLAN OUTPUT

PLAN is a JSON list of names of the catalogue's classes, in the order in which they are trained. Every model
trains past the 10 finite rounds that close the incident before it; the fault comes in its last step but for
those that take longer to be seen. OUTPUT gets the cases with what must be said of each, one JSON document,
written by rank 0. Which parameter goes bad first is seen by hooks of this script's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gradwatch.agent import watch
from tests.faults import NO_FAULT
from tests.training.breakable import BATCH, LENGTH, WIDTH
from tests.training.catalogue import CLASSES, CLEAN, Case, Place
from tests.training.group import process_group
from tests.training.trainings import SHAPES, Sharded

STEPS_BEFORE = 12
SCALE = 2.0**60
UNKNOWN = "unknown"


def train(case: Case, *, seed: int, rank: int, last: int) -> str | None:
    """Train one model; the first parameter that went bad on this rank."""
    shape = Sharded(case, seed) if case.sharded else SHAPES[case.shape](case, seed)
    model = shape.model
    # FSDP2 keeps the model before alive, whose optimizer would be the one that is counted by.
    watch(shape.run, shape.optimizers[0])
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, enabled=case.scaler)
    torch.manual_seed(seed + 1 + rank)
    for step in range(last + 1 + case.after):
        for optimizer in shape.optimizers:
            optimizer.zero_grad()
        fault = NO_FAULT
        # What a fault does to modules lasts to the end of the step, when the micro-batch is replayed.
        with contextlib.ExitStack() as within:
            for micro in range(case.micro_batches):
                fault = case.fault
                if fault is None or not fault.is_due(rank=rank, step=step, microbatch=micro):
                    fault = NO_FAULT
                within.enter_context(fault.in_modules(model))
                fault.in_weights(model)
                inputs = fault.in_batch(torch.randn(BATCH, LENGTH, WIDTH))
                with shape.micro_batch(is_last=micro == case.micro_batches - 1):
                    with fault.in_forward():
                        loss = scaler.scale(fault.in_loss(shape.loss(fault, inputs)))
                    shape.backward(fault, loss)
                shape.learn_of(fault, inputs)
            if not case.sharded:
                shape.first_bad.see(step)
            shape.after_backward(fault)
            shape.update(scaler, fault)
            shape.after_update(fault, step)
            if not case.sharded:
                shape.first_bad.see(step)
    assert not case.scaler or scaler.get_scale() < SCALE, "the scaled loss has not overflown"
    return shape.first_bad.name


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
        if expected.get("phase", UNKNOWN) is not None:
            # Seen by the rank itself, or by the one whose fault it shares.
            seen = names[expected["rank"]] or next(filter(None, names), None)
            expected = {"microbatch": 0, "parameter": seen, **expected}
            if expected.get("phase") == "parameter":
                expected["gradient"] = seen
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
