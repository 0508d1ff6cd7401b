"""Trainings in threads of one process.

usage: python -m tests.training.threads OUTPUT CASE

OUTPUT gets the weights and the gradients at the end.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

import torch
from torch import distributed, nn

STEPS, BAD_STEP = 8, 5
THREADS, LONG = 3, 150
WAIT = 60.0


class Training:
    """A model with its optimizer, which are its thread's own."""

    def __init__(self, seed: int, wrap: Any = lambda model: model) -> None:
        torch.manual_seed(seed)
        self.model = wrap(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.batch = torch.rand(3, 4)

    def run(self, steps: int, bad: int | None = None) -> None:
        for step in range(steps):
            self.optimizer.zero_grad()
            loss = self.model(self.batch).square().sum()
            (loss * float("nan") if step == bad else loss).backward()
            self.optimizer.step()


def in_thread(*args: Any, target: Any) -> threading.Thread:
    """A thread that has begun."""
    thread = threading.Thread(target=target, args=args)
    thread.start()
    return thread


def together() -> list[Training]:
    """All at the same time, after each has made a step in the main thread."""
    trainings = [Training(seed) for seed in range(THREADS)]
    for one in trainings:
        one.run(1)
    for thread in [in_thread(LONG, target=one.run) for one in trainings]:
        thread.join()
    return trainings


def each_its_own() -> list[Training]:
    """Models and optimizers are made in the threads."""
    trainings: list[Training] = [None] * THREADS  # type: ignore[list-item]
    begins, lock = threading.Barrier(THREADS), threading.Lock()

    def train(seed: int) -> None:
        with lock:  # of the random numbers
            trainings[seed] = Training(seed)
        begins.wait(WAIT)
        trainings[seed].run(LONG)

    for thread in [in_thread(seed, target=train) for seed in range(THREADS)]:
        thread.join()
    return trainings


def moved() -> list[Training]:
    """One training, never in the main thread, and in a second thread once the first one has ended."""
    training = Training(0)
    in_thread(STEPS, target=training.run).join()
    in_thread(STEPS, BAD_STEP, target=training.run).join()
    return [training]


def wrapped(model: nn.Module) -> nn.Module:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
    distributed.init_process_group("gloo")
    return nn.parallel.DistributedDataParallel(model)


def evaluated() -> list[Training]:
    """Another thread evaluates the wrapped model meanwhile."""
    training, over = Training(0, wrapped), threading.Event()

    def evaluate() -> None:
        with torch.no_grad():
            while not over.wait(0.001):
                training.model.module(training.batch)

    thread = in_thread(target=evaluate)
    training.run(STEPS, BAD_STEP)
    over.set()
    thread.join()
    return [training]


def beside() -> list[Training]:
    """Another thread trains a model of its own beside the wrapped one."""
    training, other = Training(0, wrapped), Training(1)
    thread = in_thread(LONG, target=other.run)
    training.run(STEPS, BAD_STEP)
    thread.join()
    return [training, other]


def held() -> list[Training]:
    """A second thread begins to train while the guard holds the gradients of the first one."""
    training, other = Training(0), Training(1)
    training.run(1)

    def train_another(*_: Any) -> None:
        in_thread(1, target=other.run).join()

    training.optimizer.register_step_pre_hook(train_another)
    training.run(1, 0)
    return [training, other]


CASES = {
    "together": together,
    "each-its-own": each_its_own,
    "moved": moved,
    "evaluated": evaluated,
    "beside": beside,
    "held": held,
}


def main() -> None:
    """See the module."""
    output, case = sys.argv[1:]
    trainings = CASES[case]()
    states = {
        f"{place}.{name}.{kind}": tensor
        for place, one in enumerate(trainings)
        for name, parameter in one.model.named_parameters()
        for kind, tensor in (("weight", parameter.detach()), ("gradient", parameter.grad))
    }
    torch.save(states, output)


if __name__ == "__main__":
    main()
