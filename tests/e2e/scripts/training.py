"""What the scripts of this folder share: a small model, and data that is bad where the environment says.

Nothing here has heard of gradwatch. The damage is in the input, as it would be in real life: it
passes through the forward pass into the loss, so the last layer's gradient is the first bad one.

    BAD_RANK, BAD_STEPS ("3,7")   where the input holds a NaN
    STEPS, PAUSE                  how many steps, and seconds between them
    FAIL                          "first_attempt": rank 0 fails at step 2, unless torchrun has restarted it
"""

import os
import sys
import time

import torch
import torch.distributed as dist
from torch import nn

BAD_STEPS = [int(step) for step in os.environ.get("BAD_STEPS", "").split(",") if step]


def new_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 4, bias=False))


def train(model, optimizer, rank: int, backward=lambda loss: loss.backward()) -> None:
    bad_rank = int(os.environ.get("BAD_RANK", "-1"))
    for step in range(int(os.environ.get("STEPS", "12"))):
        x = torch.randn(4, 8)
        if rank == bad_rank and step in BAD_STEPS:
            x[1, 3] = float("nan")
        optimizer.zero_grad()
        backward(model(x).square().mean())
        fail(rank, step)
        optimizer.step()
        time.sleep(float(os.environ.get("PAUSE", "0")))


def fail(rank: int, step: int) -> None:
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if os.environ.get("FAIL") == "first_attempt" and rank == 0 and step == 2 and not restarted:
        sys.exit(3)


def tell_modules(rank: int) -> None:
    """Print what no watched process may have loaded."""
    loaded = sorted(name for name in ("grpc", "google.protobuf") if name in sys.modules)
    # One write: torchrun runs Python unbuffered, and print would write the newline by itself.
    sys.stdout.write(f"rank {rank} loaded {loaded}\n")


def group() -> int:
    dist.init_process_group("gloo")
    return dist.get_rank()
