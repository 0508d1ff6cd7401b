"""Train with a transient NaN, and either have the update skipped or not call `step()` by hand.

usage: python -m tests.training.guarded OUTPUT BY_HAND CASE…

BY_HAND is `yes` for the run to compare with: it leaves out `optimizer.step()` for the bad updates.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from tests.training.group import process_group

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS = 14
BAD = {4: 1, 8: 0, 9: 1}  # step: rank


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.sometimes = nn.Linear(12, 12)
        self.last = nn.Linear(12, 3)

    def forward(self, inputs: torch.Tensor, *, skip: bool) -> torch.Tensor:
        hidden = self.first(inputs).tanh()
        return self.last(hidden if skip else hidden + self.sometimes(hidden).tanh())


def device_look() -> None:
    """Have the probe look at this CPU as at a device."""
    if os.environ.get("GRADWATCH_SPOOL"):
        from gradwatch.agent.probe.model import WatchedModel

        class Passed:
            def record(self) -> None: ...

            def query(self) -> bool:
                return True

            def synchronize(self) -> None: ...

        WatchedModel._choose_look = lambda self, device, parameters: self._device_look(
            device, parameters, Passed
        )


def train(
    rank: int,
    *,
    by_hand: bool,
    make: Callable[[Any], torch.optim.Optimizer],
    to_none: bool = True,
    unused: bool = False,
    closure: bool = False,
    register: Callable[[Any], Any] | None = None,
    on_device: bool = False,
    micro: int = 1,
    scaled: bool | None = None,
    split: bool = False,
    own_check: bool = False,
    too_large: bool = False,
) -> Any:
    """One case.

    Args:
        scaled: step through a GradScaler that is enabled, or disabled; None for none.
        split: two optimizers, half of the parameters each.
        own_check: the script throws bad gradients away itself.
        too_large: bad gradients are finite, and their squares are not.
    """
    if on_device:
        device_look()
    torch.manual_seed(1)
    ddp = DistributedDataParallel(
        Net(), find_unused_parameters=unused, bucket_cap_mb=0.0005 if not register else 25
    )
    state = register(ddp) if register else None
    parameters = list(ddp.parameters())
    half = len(parameters) // 2
    optimizers = [make(parameters[:half]), make(parameters[half:])] if split else [make(parameters)]
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3, enabled=bool(scaled))
    for step in range(STEPS):
        bad = step in BAD

        def forward_backward(step: int = step) -> torch.Tensor:
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=to_none)
            for part in range(micro):
                torch.manual_seed(1000 * step + 10 * part + rank)
                inputs = torch.randn(5, 6)
                spoilt = BAD.get(step) == rank and part == micro - 1
                if spoilt and not too_large:
                    inputs[2, 1] = float("nan")
                loss = ddp(inputs, skip=unused and (step + rank) % 2 == 0).pow(2).mean()
                if spoilt and too_large:
                    loss = loss * 1e25
                scaler.scale(loss).backward()
            return loss

        if closure and not (bad and by_hand):
            optimizers[0].step(forward_backward)
            continue
        forward_backward()
        if bad and scaled and by_hand:
            scaler.unscale_(optimizers[0])
            scaler.update()
        elif not (bad and (by_hand or own_check)):
            for optimizer in optimizers:
                scaler.step(optimizer) if scaled is not None else optimizer.step()
            scaler.update()
        elif state is not None:
            # What a careful hand does about the compression's memory.
            for error in state.error_dict.values():
                error.zero_()
            state.p_memory_dict.clear()
            state.q_memory_dict.clear()
    return {
        "weights": ddp.state_dict(),
        "state": [optimizer.state[p] for optimizer in optimizers for p in optimizer.state],
        "scaler": scaler.state_dict(),
    }


def power_sgd(ddp: Any) -> Any:
    state = powerSGD_hook.PowerSGDState(
        process_group=None, matrix_approximation_rank=1, start_powerSGD_iter=2, min_compression_rate=0.5
    )
    ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    return state


def fp16(ddp: Any) -> None:
    ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, foreach=False),
    "adam-foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "adam-fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, foreach=False),
    "sgd-foreach": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, foreach=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, fused=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01, foreach=False),
    "nadam-foreach": lambda p: torch.optim.NAdam(p, lr=0.01, foreach=True),
}
CASES: dict[str, dict[str, Any]] = {}
for name, make in OPTIMIZERS.items():
    for to_none in (True, False):
        CASES[f"{name}-none={to_none}"] = {"make": make, "to_none": to_none}
    CASES[f"{name}-unused"] = {"make": make, "unused": True, "to_none": False}
# A GradScaler skips by itself, and the guard leaves it to that.
LEFT_ALONE = [f"scaler-{name}" for name in ("adam", "adam-fused", "adamw-foreach", "sgd-fused", "nadam")]
for name in LEFT_ALONE:
    CASES[name] = {"make": OPTIMIZERS[name.removeprefix("scaler-")], "scaled": True}
CASES["scaler-unused"] = {"make": OPTIMIZERS["adam"], "scaled": True, "unused": True, "to_none": False}
TOO_LARGE: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    **{name: OPTIMIZERS[name] for name in ("adam", "adam-fused", "adamw-foreach", "nadam")},
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
}
for name, make in TOO_LARGE.items():
    CASES[f"too-large-{name}"] = {"make": make, "too_large": True, "to_none": False}
    CASES[f"too-large-scaled-{name}"] = {"make": make, "too_large": True, "scaled": True}
CASES["too-large-closure"] = {"make": OPTIMIZERS["adam"], "too_large": True, "closure": True}
CASES["too-large-two"] = {"make": OPTIMIZERS["adam"], "too_large": True, "split": True}
CASES["own-check"] = {"make": OPTIMIZERS["adam"], "own_check": True}
LEFT_ALONE += ["scaler-unused", "own-check"]
CASES["scaler-disabled"] = {"make": OPTIMIZERS["adamw"], "scaled": False}
CASES["two-optimizers"] = {"make": OPTIMIZERS["adam"], "split": True}
CASES["two-fused-optimizers"] = {"make": OPTIMIZERS["adam-fused"], "split": True}
CASES["closure"] = {"make": OPTIMIZERS["adam"], "closure": True}
CASES["accumulated"] = {"make": OPTIMIZERS["adam"], "micro": 3}
CASES["fp16-compression"] = {"make": OPTIMIZERS["adam"], "register": fp16}
CASES["powersgd"] = {"make": OPTIMIZERS["sgd-momentum"], "register": power_sgd}
for name in ("adam-fused", "adam", "sgd-fused", "nadam"):
    CASES[f"device-{name}"] = {"make": OPTIMIZERS[name], "on_device": True}
CASES["device-powersgd"] = {"make": OPTIMIZERS["sgd-fused"], "register": power_sgd, "on_device": True}


def main(output: str, by_hand: bool, names: list[str]) -> None:
    with process_group() as rank:
        results = {name: train(rank, by_hand=by_hand, **CASES[name]) for name in names or CASES}
        if rank == dist.get_world_size() - 1:
            torch.save(results, Path(output))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "yes", sys.argv[3:])
