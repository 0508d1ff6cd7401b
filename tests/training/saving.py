"""A training that saves in every way there is, between its steps.

usage: python -m tests.training.saving FOLDER

Paths in it are relative to FOLDER, which is the working directory of all saves.
"""

from __future__ import annotations

import inspect
import io
import multiprocessing
import os
import pickle
import sys
import warnings
from pathlib import Path

import torch

# A name that is bound before a model is wrapped, as transformers does.
from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.training.group import process_group


def main(folder: str) -> None:
    with process_group() as rank:
        here = Path(folder)
        here.mkdir(exist_ok=True)
        os.chdir(here)
        torch.save({"before": torch.ones(1)}, f"before{rank}.pt")  # nothing is wrapped yet
        torch.manual_seed(0)
        ddp = DistributedDataParallel(nn.Linear(4, 2))
        optimizer = torch.optim.Adam(ddp.parameters())
        plan = [torch_saves, nameless, distributed, asynchronous, safetensors_saves, manners]
        for step, save in enumerate(plan):
            save(ddp.module, rank)
            torch.manual_seed(10 * step + rank)
            optimizer.zero_grad()
            ddp(torch.randn(3, 4)).square().mean().backward()
            optimizer.step()
            for future in UNDER_WAY:
                future.result()
            UNDER_WAY.clear()
        if rank == 0:
            torch.save(ddp.module.state_dict(), f=Path("weights.pt"))


UNDER_WAY = []


def torch_saves(model: nn.Module, rank: int) -> None:
    for _ in range(2):
        torch.save(model.state_dict(), f"step0-rank{rank}.pt")


def nameless(model: nn.Module, rank: int) -> None:
    for _ in range(2):
        torch.save(model.state_dict(), io.BytesIO())
    with Path(f"open{rank}.pt").open("wb") as file:
        torch.save(model, file)


def distributed(model: nn.Module, _rank: int) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save({"model": model.state_dict()}, checkpoint_id="dcp2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save_state_dict({"model": model.state_dict()}, dcp.FileSystemWriter("dcp2-old"))


def asynchronous(model: nn.Module, _rank: int) -> None:
    import torch.distributed.checkpoint as dcp

    group = torch.distributed.new_group(backend="gloo")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer = dcp.FileSystemWriter("dcp3")
        UNDER_WAY.append(
            dcp.async_save({"m": model.state_dict()}, storage_writer=writer, process_group=group)
        )


def safetensors_saves(model: nn.Module, rank: int) -> None:
    import safetensors.torch

    save_file(model.state_dict(), f"step4-rank{rank}.safetensors")
    safetensors.torch.save_model(model, f"model4-rank{rank}.safetensors")


def manners(model: nn.Module, rank: int) -> None:
    import torch.distributed.checkpoint as dcp

    for function in (torch.save, dcp.save, save_file):
        assert pickle.loads(pickle.dumps(function)) is function
    assert "f" in inspect.signature(torch.save).parameters
    pickle.dumps(model)  # torch.save is what pickles a storage
    try:
        torch.save(model.state_dict(), 7)
    except AttributeError as error:
        print("refused:", error)
    else:
        raise AssertionError("a number is no file")
    child = multiprocessing.get_context("fork").Process(
        target=torch.save, args=(torch.ones(1), f"child{rank}.pt")
    )
    child.start()
    child.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
