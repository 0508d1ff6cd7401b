"""Ray clusters on this host, and runs of `tests/training/ray_run.py` on them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tests.ranks import REPOSITORY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

# Ray is to leave nothing in the user's home, and to ask nobody.
RAY = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Of old ones; later it is the only Train.
    "RAY_TRAIN_V2_ENABLED": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
}
# Ray then hears of a checkpoint before a decision can follow from what is in it.
POLLS_OFTEN = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.05"}
TRAINING = [sys.executable, "-m", "tests.training.ray_run"]


def bare_environment() -> dict[str, str]:
    """Without what would steer Ray or Gradwatch."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("GRADWATCH_", "RAY_"))}
    return env | RAY


@dataclass(frozen=True)
class RayCluster:
    """A cluster of two nodes.

    Attributes:
        address: for `RAY_ADDRESS`.
        kill_second_node: ends its raylet, and with that its workers.
    """

    address: str
    kill_second_node: Callable[[], None]


@contextlib.contextmanager
def ray_cluster(**env: str) -> Iterator[RayCluster]:
    """A cluster of two nodes, as long as the context lasts.

    Args:
        env: of its processes.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.training.ray_cluster"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env=bare_environment() | env,
    )
    assert process.stdout is not None
    try:
        yield RayCluster(process.stdout.readline().strip(), lambda: print(file=process.stdin, flush=True))
    finally:
        process.communicate(timeout=60)


def train(
    address: str, storage: Path, *script: object, launcher: Sequence[object] = (), **env: str
) -> subprocess.CompletedProcess[str]:
    """Run the training to its end; all that it said is in `stdout`.

    Args:
        address: of the cluster.
        storage: made here.
        script: the training's arguments.
        launcher: what comes before it in the command.
        env: of the driver.
    """
    storage.mkdir(parents=True)
    return subprocess.run(
        [*map(str, launcher), *TRAINING, str(storage), *map(str, script)],
        env=bare_environment() | {"RAY_ADDRESS": address} | env,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )


def poisoned(run: Path) -> list[str]:
    """The checkpoints that are registered in Ray and hold a value that is not finite.

    Args:
        run: the run's own folder on its storage.
    """
    known = json.loads((run / "checkpoint_manager_snapshot.json").read_text())["checkpoint_results"]
    names = [one["checkpoint_dir_name"] for one in known]
    states = {name: torch.load(run / name / "model.pt")["model"] for name in names}
    return [
        name for name, state in states.items() if not all(value.isfinite().all() for value in state.values())
    ]


def starts_of(storage: Path) -> list[tuple[int, float]]:
    """When the train function was started, and at which step it went on."""
    lines = (line.split() for line in (storage / "began").read_text().splitlines())
    return [(int(step), float(at)) for step, at in lines]
