"""A child that is forked from a watched process trains in silence, and leaves the journal alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from gradwatch.agent.probe.settings import Settings
from gradwatch.agent.probe.watcher import SINGLE, Watcher
from tests.ranks import REPOSITORY

TRAIN = """
import multiprocessing, os, sys, torch
from torch import nn
model = nn.Linear(2, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
def train(factor):
    optimizer.zero_grad()
    (model(torch.ones(1, 2)).sum() * factor).backward()
    optimizer.step()
train(1.0)
"""
CHILDREN = {
    "that ends by itself": """
pid = os.fork()
if pid == 0:
    train(float("nan"))
    sys.exit(3)
status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
""",
    "of multiprocessing": """
def child():
    train(float("nan"))
    sys.exit(3)
process = multiprocessing.get_context("fork").Process(target=child)
process.start()
process.join()
status = process.exitcode
""",
}
GOES_ON = """
assert status == 3, status
train(1.0)
train(float("nan"))
"""


@pytest.mark.parametrize("child", CHILDREN)
def test_a_forked_child_says_nothing_and_the_parent_is_watched_on(child, tmp_path):
    env = {key: value for key, value in os.environ.items() if not key.startswith("GRADWATCH_")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "GRADWATCH_SPOOL": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", TRAIN + CHILDREN[child] + GOES_ON],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "gradwatch:" not in done.stderr
    (journal,) = tmp_path.glob("rank*.jsonl")
    records = [json.loads(line) for line in journal.read_text().splitlines()]
    assert [one["seq"] for one in records] == [*range(len(records))]
    assert [one["nonfinite"]["step"] for one in records if "nonfinite" in one] == [2]
    (progress,) = tmp_path.glob("rank*.progress")
    told = json.loads(progress.read_text())
    assert told["step"] == 3
    assert not told.get("dropped")


def test_the_end_of_a_forked_child_is_not_that_of_the_training(tmp_path):
    watcher = Watcher(Settings.from_environment({"GRADWATCH_SPOOL": str(tmp_path)}))
    assert watcher.admit(torch.device("cpu"), SINGLE)
    pid = os.fork()
    if pid == 0:
        # Whatever the end does would begin here.
        watcher.remove_gone = lambda: os._exit(1)
        watcher.finish()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    watcher.finish()
