"""What no wrapped model owns: named by the script's variables, or said not to be looked at."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from gradwatch.agent.probe.owners import names_of
from gradwatch.agent.probe.variables import names_of_variables
from tests.ranks import REPOSITORY

SCRIPT = """
import os, torch, torch.distributed as dist
from torch import nn
os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT='0', RANK='0', WORLD_SIZE='1')
dist.init_process_group('gloo')
model = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
head = nn.Linear(2, 2)
def train(*more, steps=3, bad=False):
    optimizer = torch.optim.SGD([*model.parameters(), *more], lr=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(torch.ones(1, 2)).sum() + head(torch.ones(1, 2)).sum() * (float('nan') if bad else 1.0)
        loss.backward()
        optimizer.step()
"""
SHARDED = """
from torch.distributed.tensor import Replicate, distribute_tensor
mesh = dist.init_device_mesh('cpu', (1,))
sharded = nn.Parameter(distribute_tensor(torch.ones(2, 2), mesh, [Replicate()]))
"""
SWAP = "torch.utils.swap_tensors(head.weight, nn.Parameter(torch.ones(2, 2)))\n"


def run(tmp_path, script):
    """The records of its journal."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("GRADWATCH_")}
    env |= {"GRADWATCH_SPOOL": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT + script + "dist.destroy_process_group()"],
        env=env,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for path in tmp_path.glob("rank*.jsonl") for line in path.read_text().splitlines()]
    records = [json.loads(line) for line in lines]
    assert not any("fault" in record for record in records), records
    return records


def of_kind(records, kind):
    return [record[kind] for record in records if kind in record]


def test_a_job_whose_models_own_all_has_no_model_but_these(tmp_path):
    records = run(tmp_path, "train()\n")
    assert [one["wrapper"] for one in of_kind(records, "model")] == ["DistributedDataParallel"]
    assert not of_kind(records, "unwatched")


def test_a_bare_head_is_looked_at_also_when_its_tensors_are_swapped(tmp_path):
    records = run(tmp_path, f"train(*head.parameters())\n{SWAP}train(*head.parameters(), bad=True)\n")
    assert [one["wrapper"] for one in of_kind(records, "model")] == ["DistributedDataParallel", ""]
    first = of_kind(records, "nonfinite")[0]
    # The hook of the other one has gone with the tensor that it was swapped with.
    assert [one["parameter"] for one in first["gradients"]] == ["head.bias"]
    assert (first["root"], first["step"], first["source"]) == (1, 3, "gradient")


def test_what_is_not_looked_at_is_said_by_name_at_the_first_step(tmp_path):
    records = run(tmp_path, f"{SHARDED}train(sharded)\n")
    (said,) = of_kind(records, "unwatched")
    assert "SGD updates parameters that no watched model owns" in said["reason"]
    assert "parameter 2 of group 0" in said["reason"]
    assert "sharded tensor" in said["reason"]


# ---------------------------------------------------------------- names


def test_modules_are_called_as_the_script_calls_them():
    head, tail = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    optimizers = [torch.optim.SGD([head.weight, tail.weight], lr=0.1)]
    names = names_of(optimizers, [head.weight, tail.weight], ())
    assert [info.name for _, info in names.parameters] == ["head.weight", "tail.weight"]
    assert names.module_class == "Linear, Linear 2"


class Trainer:
    def __init__(self):
        self.critic = nn.Linear(1, 1)

    def names(self):
        return names_of_variables([self.critic])


def test_also_as_an_attribute_of_the_object_that_trains():
    trainer = Trainer()
    assert trainer.names() == {id(trainer.critic): "critic"}


def test_a_copy_of_local_variables_that_the_script_keeps_is_left_as_it_is():
    head = nn.Linear(1, 1)
    mine = locals()
    assert names_of_variables([head]) == {id(head): "head"}
    assert mine["head"] is head


@pytest.mark.parametrize("nothing", [[], [object()]])
def test_what_has_no_variable_has_no_name(nothing):
    wanted, nothing = nothing, None
    assert names_of_variables([*wanted]) == {}
