"""A training that saves, resumes, and repeats itself to the bit: model, optimizer, RNG, data position.

usage: torchrun … -m tests.training.resumable --folder CKPTS [--resume PATH] [more]

Once its weights are poisoned it trains on, and past its end, until somebody stops it: as long
trainings do that nobody watches. The checkpoint is one file by rank 0, `step-N.pt` after N updates.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradwatch.agent import watch
from tests.training.group import process_group
from tests.training.transient import Transient

SAMPLES = 64
BATCH = 4


def new_model() -> nn.Module:
    torch.manual_seed(0)
    # Dropout, so that a random state which is not restored shows in the weights.
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Dropout(0.2), nn.Linear(32, 4))


class Data:
    """Shuffled anew each epoch, in an order that its seed and position alone decide."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.samples = torch.randn(SAMPLES, 8, generator=torch.Generator().manual_seed(1))
        self.position = 0
        self._rank, self._world_size = rank, world_size

    def next(self) -> torch.Tensor:
        """This rank's next batch."""
        batches = SAMPLES // (BATCH * self._world_size)
        epoch, index = divmod(self.position, batches)
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(epoch))
        start = (index * self._world_size + self._rank) * BATCH
        self.position += 1
        return self.samples[order[start : start + BATCH]].clone()


class Training:
    """One process of it."""

    def __init__(self, rank: int, arguments: argparse.Namespace) -> None:
        self.rank = rank
        self.arguments = arguments
        # So that buckets stay as they are. Else DDP lays them out anew after the first backward pass of a
        # process, and with more than two ranks the place in a bucket decides in which order gloo adds up:
        # the first update after a resume would be another one in the last bit, watched or not.
        self.model = DistributedDataParallel(new_model(), find_unused_parameters=True)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.data = Data(rank, dist.get_world_size())
        self.step = self.began_at = self.saved = 0
        torch.manual_seed(100 + rank)

    def resume(self, path: str) -> None:
        """Go on from a checkpoint."""
        state = torch.load(path, weights_only=True)
        self.model.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = self.began_at = self.saved = state["step"]
        self.data.position = state["position"]
        torch.set_rng_state(state["rng"][self.rank])

    def save(self, name: str, rng: list[Any]) -> None:
        """One file."""
        state = {
            "model": self.model.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "position": self.data.position,
            "rng": rng,
        }
        torch.save(state, self.arguments.folder / name)

    def update(self, fault: Transient) -> bool:
        """One update; whether the loss was finite."""
        batch = self.data.next()
        if fault.strikes(rank=self.rank, step=self.step, began_at=self.began_at, saved=self.saved):
            batch[1, 3] = float("nan")
        self.optimizer.zero_grad()
        loss = self.model(batch).square().mean()
        loss.backward()
        # Counted first: at the end of the optimizer's step a checkpoint may be loaded in process.
        self.step += 1
        self.optimizer.step()
        return bool(loss.isfinite())

    def save_if_due(self) -> None:
        """Every so many updates; all ranks take part, since each has a random state of its own."""
        if self.step % self.arguments.save_every:
            return
        rng: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(rng, torch.get_rng_state())
        if self.rank == 0:
            self.save(f"step-{self.step}.pt", rng)
        self.saved = self.step

    @property
    def poisoned(self) -> bool:
        """Whether a weight is not finite; the same on every rank."""
        return not all(parameter.isfinite().all() for parameter in self.model.parameters())

    def obey_sigterm(self) -> None:
        """What a SIGTERM does, as the command line says."""
        if self.arguments.on_sigterm == "ignore":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        elif self.arguments.on_sigterm == "save" and self.rank == 0:
            # In a thread that is woken at once: the main one may be in a collective that others have left.
            told, tell = socket.socketpair()
            tell.setblocking(False)
            signal.signal(signal.SIGTERM, lambda *_: None)
            signal.set_wakeup_fd(tell.fileno())
            threading.Thread(target=self._save_at_sigterm, args=(told, tell), daemon=True).start()

    def _save_at_sigterm(self, told: socket.socket, _tell: socket.socket) -> None:
        told.recv(1)
        self.save(f"step-{self.step}-at-sigterm.pt", [])
        os._exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--resume", default=os.environ.get("GRADWATCH_RESUME_PATH"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save-every", type=int, default=5)
    parser.add_argument("--weights", type=Path, help="where the final weights go")
    parser.add_argument("--began", type=Path, help="gets a line with time and step at each first step")
    parser.add_argument("--on-sigterm", choices=["default", "ignore", "save"], default="default")
    parser.add_argument(
        "--crash", action="store_true", help="leave with an error when the loss is not finite"
    )
    parser.add_argument("--in-process", action="store_true", help="load a checkpoint without a restart")
    parser.add_argument("--until", type=Path, help="past the last step, wait until this file is there")
    Transient.add_arguments(parser)
    arguments = parser.parse_args()
    fault = Transient.from_arguments(arguments)
    with process_group() as rank:
        training = Training(rank, arguments)
        training.obey_sigterm()
        if arguments.in_process:
            watch(training.model, training.optimizer, load=training.resume)
        if arguments.resume:
            training.resume(arguments.resume)
        train(training, fault)
        if rank == 0 and arguments.weights:
            torch.save(training.model.module.state_dict(), arguments.weights)


def train(training: Training, fault: Transient) -> None:
    arguments = training.arguments
    while training.step < arguments.steps or training.poisoned:
        finite = training.update(fault)
        if training.rank == 0 and arguments.began and training.step == training.began_at + 1:
            with arguments.began.open("a") as file:
                file.write(f"{time.time()} {training.began_at}\n")
        if arguments.crash and not finite:
            sys.exit("the loss is not finite")
        if training.step <= arguments.steps:
            training.save_if_due()
        else:
            time.sleep(0.01)
    while arguments.until and not arguments.until.exists():
        time.sleep(0.02)


if __name__ == "__main__":
    main()
