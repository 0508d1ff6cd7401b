"""A DDP script that Gradwatch can send back to a checkpoint. It knows nothing of Gradwatch.

    gradwatch run --job example --policy examples/policy.yaml -- torchrun --standalone --nproc-per-node 2 \\
        examples/resumable.py --folder /tmp/checkpoints --resume {resume}

What a rollback needs of a script: that it can go on from a checkpoint it is told of. To go on as if
nothing had happened, it also saves where it is in its data, and the random state of every rank. The
path comes in place of `{resume}`; the first time both words are left out. Instead, a script may read
GRADWATCH_RESUME_PATH.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

SAVE_EVERY = 10


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = DistributedDataParallel(
        nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Dropout(0.1), nn.Linear(32, 1))
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    torch.manual_seed(1 + rank)
    first = 0
    if arguments.resume:
        state = torch.load(arguments.resume, weights_only=True)
        model.module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"][rank])
        first = state["step"]

    for step in range(first, arguments.steps):
        # The step alone decides which samples come next.
        generator = torch.Generator().manual_seed(1000 * step + rank)
        inputs = torch.randn(16, 8, generator=generator)
        loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % SAVE_EVERY == 0:
            save(arguments.folder / f"step-{step + 1}.pt", model, optimizer, step + 1)
    if rank == 0:
        print(f"trained from step {first} to {arguments.steps}, loss {loss.item():.4f}")
    dist.destroy_process_group()


def save(path: Path, model: DistributedDataParallel, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Rank 0 writes one file, with the random states of all."""
    rng = [torch.empty(0)] * dist.get_world_size()
    dist.all_gather_object(rng, torch.get_rng_state())
    if dist.get_rank() == 0:
        state = {
            "model": model.module.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "rng": rng,
        }
        torch.save(state, path)


if __name__ == "__main__":
    main()
