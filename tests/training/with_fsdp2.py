"""An ordinary script that shards its model with FSDP2 and saves with `torch.distributed.checkpoint`.

usage: torchrun … -m tests.training.with_fsdp2 --folder CKPTS [--resume PATH] [more]

The fault is a sample that makes the model take the logarithm of 0. Once its weights are poisoned it waits
at its end until somebody stops it.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as distributed_checkpoint
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard

from tests.training.group import process_group
from tests.training.transient import Transient, hold_sigterm

SAVE_EVERY = 4


class Energy(nn.Module):
    def forward(self, values: torch.Tensor, *, dead: torch.Tensor) -> torch.Tensor:
        return torch.where(dead, values * 0, values).square().sum(-1, keepdim=True).log()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.energy = Energy()
        self.head = nn.Linear(9, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        values = inputs
        for layer in self.layers:
            values = values + layer(values).tanh()
        energy = self.energy(values, dead=(inputs == 0).all(-1, keepdim=True))
        return self.head(torch.cat([values, energy], -1))


class Training:
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model: Any = Model()
        for layer in self.model.layers:
            fully_shard(layer)
        fully_shard(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.step = self.began_at = 0

    def state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "step": torch.tensor(self.step)}

    def resume(self, path: str) -> None:
        state = self.state()
        distributed_checkpoint.load(state, checkpoint_id=path)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        self.step = self.began_at = int(state["step"])

    def update(self, rank: int, fault: Transient) -> None:
        batch = torch.randn(6, 8, generator=torch.Generator().manual_seed(1000 * self.step + rank))
        saved = self.step // SAVE_EVERY * SAVE_EVERY
        if fault.strikes(rank=rank, step=self.step, began_at=self.began_at, saved=saved):
            batch[2] = 0
        self.optimizer.zero_grad()
        self.model(batch).square().mean().backward()
        self.optimizer.step()
        self.step += 1

    @property
    def poisoned(self) -> bool:
        """Whether a weight is not finite; the same on every rank."""
        local = [parameter.to_local().isfinite().all() for parameter in self.model.parameters()]
        finite = torch.stack(local).all().int()
        dist.all_reduce(finite, dist.ReduceOp.MIN)
        return not finite


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--resume")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--weights", type=Path)
    Transient.add_arguments(parser)
    arguments = parser.parse_args()
    fault = Transient.from_arguments(arguments)
    warnings.simplefilter("ignore")
    with process_group() as rank:
        training = Training()
        if arguments.resume:
            training.resume(arguments.resume)
        let_through = None
        while training.step < arguments.steps:
            if fault.rank >= 0 and training.step == fault.step:
                let_through = hold_sigterm()
            training.update(rank, fault)
            if training.step % SAVE_EVERY == 0:
                distributed_checkpoint.save(
                    training.state(), checkpoint_id=arguments.folder / f"step-{training.step}"
                )
                if let_through is not None:
                    let_through()
        while training.poisoned:
            time.sleep(0.02)
        whole = get_model_state_dict(training.model, options=StateDictOptions(full_state_dict=True))
        if rank == 0 and arguments.weights:
            torch.save(whole, arguments.weights)


if __name__ == "__main__":
    main()
