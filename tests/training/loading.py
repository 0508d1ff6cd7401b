"""Trainings that go back to a checkpoint in process; each rank has a spool of its own, as on two nodes.

usage: python -m tests.training.loading STORY

An order lies in a rank's spool from an iteration on that the story names, so that it is known in which
one the ranks must load. Beside the spools, rankN.json gets what happened, and ckpts the checkpoints.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from tests.training.group import process_group

RANK = int(os.environ.get("RANK", "0"))
SPOOL = Path(os.environ.get("GRADWATCH_SPOOL", ""))
CKPT = "step-3.pt"


class Training:
    """A model that can be saved and loaded, and trains on batches that its step alone decides."""

    def __init__(self, ckpts: Path, *, scaled: bool = False, compressed: bool = False) -> None:
        torch.manual_seed(0)
        self.ddp = DistributedDataParallel(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)))
        self.optimizer = torch.optim.Adam(self.ddp.parameters(), lr=0.01)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2, enabled=scaled)
        self.compression: Any = None
        if compressed:
            self.compression = powerSGD_hook.PowerSGDState(
                process_group=None,
                matrix_approximation_rank=1,
                start_powerSGD_iter=2,
                min_compression_rate=0.5,
            )
            self.ddp.register_comm_hook(self.compression, powerSGD_hook.powerSGD_hook)
        self.ckpts = ckpts
        self.step = 0
        self.iteration = 0
        self.loads: list[tuple[int, str]] = []
        self.fail_on: int | None = None
        self.differing: list[str] = []
        self.carried: list[float] = []
        self._to_check: str | None = None

    def update(self, *, bad: bool = False) -> None:
        """One iteration; the step counts before it ends, since the end is where `load` is called."""
        self.check()
        torch.manual_seed(1000 * self.step + RANK)
        batch = torch.randn(4, 8)
        if bad and RANK == 1:
            batch[1, 1] = float("nan")
        self.optimizer.zero_grad()
        self.scaler.scale(self.ddp(batch).square().mean()).backward()
        self.step += 1
        self.iteration += 1
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def state(self) -> dict[str, Any]:
        return {
            "model": self.ddp.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
        }

    def save(self) -> str:
        path = self.ckpts / f"step-{self.step}.pt"
        if RANK == 0:
            self.ckpts.mkdir(exist_ok=True)
            torch.save(self.state(), path)
        dist.barrier()
        return str(path)

    def load(self, path: str) -> None:
        """What is given to `watch`."""
        assert torch._C._current_graph_task_id() == -1, "inside of a backward pass"
        self.loads.append((self.iteration, path))
        state = torch.load(path, weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.fail_on == RANK:
            raise OSError("planted: the disk is gone")
        self.ddp.module.load_state_dict(state["model"])
        self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        self._to_check = path

    def check(self) -> None:
        """Whether the iteration after a load begins with just what was in the checkpoint."""
        path, self._to_check = self._to_check, None
        if path is not None:
            saved, mine = torch.load(path, weights_only=True), self.state()
            if not _same(saved, mine):
                self.differing.append(f"iteration {self.iteration}")


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(_same, left, right))
    return bool(torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right)


def order(path: str, generation: int, **more: Any) -> dict[str, Any]:
    return {
        "id": f"decision-{generation}",
        "job": "test-job",
        "launch": "0" * 32,
        "generation": generation,
        "action": "ACTION_LOAD",
        "reason": "a test",
        "resume_path": path,
        "resume_step": "3",
    } | more


def give(document: Any) -> None:
    """Put an order into this rank's spool, in one step as the sidecar does."""
    new = SPOOL / ".order.json.new"
    new.write_text(document if isinstance(document, str) else json.dumps(document))
    new.rename(SPOOL / "order.json")


def tell(**what: Any) -> None:
    (SPOOL.parent / f"rank{RANK}.json").write_text(json.dumps(what))


def liveness_of(node: int) -> list[bool]:
    """Which of a node's rank journals a living process holds, in the order of their beginning."""
    from gradwatch.agent.probe import spool

    dist.barrier()
    files = (SPOOL.parent / f"node{node}").glob("*.progress")
    held = [spool.is_locked(path) for path in sorted(files, key=_began)]
    dist.barrier()
    return held


def _began(progress: Path) -> float:
    with progress.with_suffix(".000000.jsonl").open() as file:
        return float(json.loads(file.readline())["at"])


def orders() -> None:
    """Orders that count, and orders that do not."""
    from gradwatch.agent import watch

    training = Training(SPOOL.parent / "ckpts")
    watch(training.ddp, load=training.load)
    for _ in range(3):
        training.update()
    path = training.save()
    story: dict[int, Any] = {
        4: order(path, 0),
        5: order(path, 9, job="another-job"),
        6: order(path, 9, action="ACTION_START"),
        7: '{"id": "torn',
        8: order(path, 1),  # and rank 1 fails
        {0: 12, 1: 12, 2: 14}[RANK]: order(path, 2),
        18: order(path, 3),
        21: order("step-3.pt", 4),
        24: order(str(SPOOL), 5),
        27: order(path, 6, skip_batches=2),
        30: order(path, 7, id=f"decision-7-{RANK}"),
    }
    held = []
    while training.iteration < 33:
        if training.iteration in story:
            give(story[training.iteration])
        training.fail_on = 1 if training.iteration < 12 else None
        training.update()
        if training.iteration == 11:
            training.save()
        if training.iteration in (16, 20):
            held.append(liveness_of((RANK + 1) % 3))
    with training.ddp.join():
        for _ in range(2 + RANK):
            training.update()
    give(order(path, 8))
    for _ in range(2):
        training.update()
    tell(loads=training.loads, differing=training.differing, held=held)


def kinds() -> None:
    """Guard, GradScaler, PowerSGD; and one that leaves the agreement."""
    from gradwatch.agent.probe import agreement

    agreement.TIMEOUT = agreement.dt.timedelta(seconds=3)
    from gradwatch.agent import watch

    ckpts = SPOOL.parent / "ckpts"
    told: dict[str, Any] = {}

    training = Training(ckpts)
    watch(training.ddp, training.optimizer, load=training.load)
    run(training, generation=1, bad=(6, 7, 8, 9))
    told["guard"] = [training.loads, training.differing]

    training = Training(ckpts, scaled=True)
    watch(training.ddp, training.optimizer, load=training.load)
    run(training, generation=2, bad=(4,))
    told["scaler"] = [training.loads, training.differing]

    training = Training(ckpts, compressed=True)
    watch(training.ddp, training.optimizer, load=training.load)
    run(training, generation=3)
    told["powersgd"] = [training.loads, training.differing, training.carried]

    plain = Training(ckpts)
    for _ in range(8):
        plain.update()
    loadable = Training(ckpts)
    watch(loadable.ddp, loadable.optimizer, load=loadable.load)
    for _ in range(8):
        loadable.update()
    told["idle"] = _same(plain.state(), loadable.state())

    def planted(_self: Any, _value: int) -> None:
        raise ValueError("planted")

    if RANK == 1:
        agreement.Agreement.offer = planted
    for _ in range(4):
        loadable.update()
    give(order(str(ckpts / CKPT), 9))
    for _ in range(2):
        loadable.update()
    told["left"] = all(bool(parameter.isfinite().all()) for parameter in loadable.ddp.parameters())
    tell(**told)


def run(training: Training, generation: int, bad: tuple[int, ...] = ()) -> None:
    """Train, save at step 3, order to load it before iteration 7, and train on to 14."""
    while training.iteration < 14:
        if training.iteration == 7:
            give(order(str(training.ckpts / CKPT), generation))
        training.update(bad=training.iteration in bad)
        if training.iteration == 3:
            training.save()
        if training.compression is not None:
            errors = training.compression.error_dict.values()
            training.carried.append(sum(float(one.abs().sum()) for one in errors))


def missing() -> None:
    """One rank says how to load, the other does not."""
    from gradwatch.agent.probe import agreement

    agreement.TIMEOUT = agreement.dt.timedelta(seconds=2)
    from gradwatch.agent import watch

    training = Training(SPOOL.parent / "ckpts")
    watch(training.ddp, training.optimizer, load=training.load if RANK == 0 else None)
    for _ in range(3):
        training.update()
    own = dist.new_group([0, 1])  # its name must not have been moved on one rank only
    dist.barrier(own)
    give(order(training.save(), 1))
    for _ in range(2):
        training.update()
    tell(loads=training.loads)


def inside() -> None:
    """An optimizer that steps inside of the backward pass, once its last gradient has arrived."""
    from gradwatch.agent import watch

    training = Training(SPOOL.parent / "ckpts")
    watch(training.ddp, training.optimizer, load=training.load)
    first = next(iter(training.ddp.parameters()))
    first.register_post_accumulate_grad_hook(lambda _parameter: training.optimizer.step())
    give(order(training.save(), 1))
    for _ in range(3):
        training.ddp(torch.randn(4, 8)).square().mean().backward()
    tell(loads=training.loads)


def dying() -> None:
    """A rank is gone from one moment to the next."""
    from gradwatch.agent import watch

    training = Training(SPOOL.parent / "ckpts")
    watch(training.ddp, training.optimizer, load=training.load)
    for _ in range(3):
        training.update()
    if RANK == 1:
        tell(ends="here")
        os._exit(0)
    ends = ""
    try:
        training.update()
    except RuntimeError:
        ends = "with the error of DDP"
    for _ in range(2):
        training.optimizer.step()
    tell(ends=ends)
    dist.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    with process_group():
        {"orders": orders, "kinds": kinds, "missing": missing, "inside": inside, "dying": dying}[
            sys.argv[1]
        ]()
