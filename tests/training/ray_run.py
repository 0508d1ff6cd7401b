"""A Ray Train script: a small model under DDP, that saves every few steps, and may be struck.

usage: python -m tests.training.ray_run STORAGE [--steps N] [--strike STEP …] [--crash] [--weights FILE] …

STORAGE holds the run, and `began`: a line for each start of the train function on rank 0, with the step that
it goes on from, and the time. A fault strikes rank 1 once in each of these steps, whatever becomes of the
run; `--crash` is once, in the first step of the second start; `--crash-at` once in each of these steps, and
then `crashed-STEP` has the time.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_model
from torch import nn

SAVE_EVERY = 5


def once(marker: Path) -> bool:
    """Whether it has not been done before; the marker gets the time."""
    try:
        with marker.open("x") as file:
            file.write(f"{time.time()}\n")
    except FileExistsError:
        return False
    return True


def train(config: dict[str, Any]) -> None:
    folder = Path(config["storage"])
    rank = ray.train.get_context().get_world_rank()
    torch.manual_seed(0)
    model = prepare_model(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    first = 0
    if config["ask"]:
        from gradwatch.agent.integrations.ray import good_checkpoint

        checkpoint = good_checkpoint()
    else:
        checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as path:
            state = torch.load(Path(path) / "model.pt")
        model.module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"] + 1
    if rank == 0:
        with (folder / "began").open("a") as began:
            began.write(f"{first} {time.time()}\n")
    for step in range(first, config["steps"]):
        batch = torch.randn(4, 8, generator=torch.Generator().manual_seed(1000 * step + rank))
        if config["crash"] and rank == 0 and first and once(folder / "crashed"):
            raise RuntimeError("the second crash, before the next report")
        if step in config["crash_at"] and rank == 0 and once(folder / f"crashed-{step}"):
            raise RuntimeError("a crash")
        if step in config["strike"] and rank == 1 and once(folder / f"struck-{step}"):
            batch[0, 0] = float("nan")
        optimizer.zero_grad()
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        time.sleep(config["sleep"])
        if (step + 1) % config["save_every"] == 0:
            report(model, optimizer, step, rank)
    if rank == 0 and config["weights"]:
        torch.save(model.module.state_dict(), config["weights"])


def report(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, rank: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if rank == 0:
            state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(state, Path(folder) / "model.pt")
            checkpoint = Checkpoint.from_directory(folder)
        ray.train.report({"step": step}, checkpoint=checkpoint)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("storage", type=Path)
    parser.add_argument("--url", help="of the storage for Ray, in place of STORAGE")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save-every", type=int, default=SAVE_EVERY, help="steps")
    parser.add_argument("--strike", type=int, nargs="*", default=[])
    parser.add_argument("--crash-at", type=int, nargs="*", default=[])
    parser.add_argument("--crash", action="store_true")
    parser.add_argument("--weights")
    parser.add_argument("--sleep", type=float, default=0.0)
    parser.add_argument("--max-failures", type=int, default=3)
    parser.add_argument("--callback", action="store_true", help="say it in the script")
    parser.add_argument("--policy", help="of the callback")
    parser.add_argument("--ask", action="store_true", help="ask Gradwatch for the checkpoint, and not Ray")
    arguments = parser.parse_args()
    callbacks = None
    if arguments.callback:
        from gradwatch.agent.integrations.ray import WatchCallback

        callbacks = [WatchCallback(policy=arguments.policy, asks_for_checkpoint=arguments.ask)]
    trainer = TorchTrainer(
        train,
        train_loop_config=vars(arguments),
        scaling_config=ScalingConfig(num_workers=arguments.workers, placement_strategy="SPREAD"),
        run_config=RunConfig(
            name="run",
            storage_path=arguments.url or str(arguments.storage),
            callbacks=callbacks,
            failure_config=FailureConfig(max_failures=arguments.max_failures),
        ),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
