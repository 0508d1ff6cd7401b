"""Checkpoints of every layout, as their writers leave them, and ways to damage them."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

NAN = float("nan")
INF = float("inf")
# Long enough ago that a damaged checkpoint is torn and not in flight.
LONG_AGO = 10_000.0


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


def trained(steps: int = 3, network: nn.Module | None = None):
    torch.manual_seed(0)
    network = model() if network is None else network
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    for _ in range(steps):
        network(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return network, optimizer


def plant(tensor: torch.Tensor, value: float = NAN, count: int = 1) -> None:
    with torch.no_grad():
        tensor.view(-1)[:count] = value


def save(path: Path, network, optimizer, **more) -> Path:
    torch.save({"model": network.state_dict(), "optimizer": optimizer.state_dict(), **more}, path)
    return path


def lightning(path: Path, network, optimizer, *, best_score: float = 0.5, step: int = 300) -> Path:
    """What `Trainer.save_checkpoint` writes, keys and nesting as in Lightning 2."""
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    torch.save(
        {
            "epoch": 3,
            "global_step": step,
            "pytorch-lightning_version": "2.5.0",
            "state_dict": {f"net.{key}": value for key, value in network.state_dict().items()},
            "loops": {
                "fit_loop": {"epoch_progress": {"total": {"ready": 3}}, "_results": torch.tensor([NAN, NAN])}
            },
            "callbacks": {
                "ModelCheckpoint{'monitor': 'val'}": {
                    "best_model_score": torch.tensor(best_score),
                    "kth_value": torch.tensor([INF, NAN]),
                    "best_k_models": {"a.ckpt": torch.tensor(INF)},
                }
            },
            "optimizer_states": [optimizer.state_dict()],
            "lr_schedulers": [scheduler.state_dict()],
            "hyper_parameters": {"lr": 1e-3, "weights": torch.tensor([INF, 1.0])},
        },
        path,
    )
    return path


def hf(folder: Path, network, optimizer, *, step: int, shards: int = 1, safe: bool = True) -> Path:
    """What the Hugging Face Trainer writes into checkpoint-N, sharded if `shards` > 1."""
    folder.mkdir(parents=True)
    state = network.state_dict()
    suffix = "safetensors" if safe else "bin"
    stem = "model" if safe else "pytorch_model"
    keys = list(state)
    weight_map = {}
    for shard in range(shards):
        name = f"{stem}.{suffix}" if shards == 1 else f"{stem}-{shard + 1:05}-of-{shards:05}.{suffix}"
        part = {key: state[key] for key in keys[shard::shards]}
        weight_map |= dict.fromkeys(part, name)
        if safe:
            safetensors.torch.save_file(part, folder / name, metadata={"format": "pt"})
        else:
            torch.save(part, folder / name)
    if shards > 1:
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    torch.save(torch.optim.lr_scheduler.StepLR(optimizer, 10).state_dict(), folder / "scheduler.pt")
    import random

    import numpy as np

    rng = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}  # noqa: NPY002
    torch.save(rng, folder / "rng_state.pth")
    torch.save(Arguments(), folder / "training_args.bin")
    state_of_trainer = {
        "global_step": step,
        "best_metric": NAN,
        "log_history": [{"loss": 0.0, "grad_norm": NAN}],
    }
    (folder / "trainer_state.json").write_text(json.dumps(state_of_trainer))
    return folder


class Arguments:
    """Stands for transformers.TrainingArguments, which no scan can import."""

    def __init__(self) -> None:
        self.output_dir = Path("out")
        self.learning_rate = NAN


def dcp(folder: Path, network, optimizer, **more) -> Path:
    import torch.distributed.checkpoint as distributed_checkpoint

    state = {"model": network.state_dict(), "optim": optimizer.state_dict(), **more}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        distributed_checkpoint.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def truncate(path: Path, by: int) -> None:
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size - by)


def age(path: Path, seconds: float = LONG_AGO) -> Path:
    """Let all of a checkpoint have been written some time ago, in the order it was written in."""
    files = [path] if path.is_file() else [inner for inner in path.rglob("*") if inner.is_file()]
    for file in files:
        status = file.stat()
        shifted = int(status.st_mtime_ns - seconds * 1e9)
        os.utime(file, ns=(shifted, shifted))
    return path


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target
