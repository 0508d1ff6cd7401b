"""Modules that go wrong, each in a way of its own, where their input is an exact 0 or as large as 1000."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

WIDTH = 6
# What `torch.rand` gives first with the seed that each pass begins with.
LUCK = torch.rand((), generator=torch.Generator().manual_seed(77))


class Block(nn.Module):
    """Goes wrong nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.linear(self.spoil(values))

    def spoil(self, values: torch.Tensor) -> torch.Tensor:
        return values


class Log(Block):
    def spoil(self, values: torch.Tensor) -> torch.Tensor:
        return values.abs().log()  # log of 0


class MaskedLog(Block):
    """The logarithm of 0 is taken, and is not used; then one is used."""

    def spoil(self, values: torch.Tensor) -> torch.Tensor:
        unused = torch.zeros(3).log()
        torch.where(unused < 0, 0.0, unused)
        return values.abs().log()  # the log that is used


class Sqrt(Block):
    def spoil(self, values: torch.Tensor) -> torch.Tensor:
        return values.abs().sqrt()  # its slope at 0 is infinite


class Attention(Block):
    """Every row has a masked place; a row of zeros in the input masks all of it."""

    def spoil(self, values: torch.Tensor) -> torch.Tensor:
        scores = values @ values.T
        mask = torch.eye(len(values), dtype=torch.bool)
        honest = scores.masked_fill(mask, float("-inf")).softmax(-1)
        empty = (values == 0).all(-1, keepdim=True)
        weights = scores.masked_fill(empty, float("-inf")).softmax(-1)  # a row without a place
        return (honest + weights) @ values


class Exp(Block):
    def spoil(self, values: torch.Tensor) -> torch.Tensor:
        return values.exp()  # of 1000


class Ratio(Block):
    def spoil(self, values: torch.Tensor) -> torch.Tensor:
        return values / values.abs().sum(-1, keepdim=True)  # 0 / 0


class Luck(Block):
    """Goes wrong with one random number alone."""

    def spoil(self, values: torch.Tensor) -> torch.Tensor:
        drawn = torch.where(values == 0, torch.rand(()) - LUCK, 1.0)
        return values / drawn  # out of luck


class Normed(Log):
    """The running statistics of a normalization are spoilt with the pass."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.norm(super().forward(values))


class Checkpointed(Sqrt):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return checkpoint(super().forward, values, use_reentrant=False)


class Reentrant(Sqrt):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return checkpoint(super().forward, values, use_reentrant=True)


class Mean(torch.autograd.Function):
    """Over the ranks, as SyncBatchNorm has it."""

    @staticmethod
    def forward(ctx, values):
        del ctx
        values = values.clone()
        dist.all_reduce(values)
        return values / dist.get_world_size()

    @staticmethod
    def backward(ctx, gradient):
        del ctx
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient / dist.get_world_size()


class Synchronized(Log):
    """Takes the mean of all ranks off."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        values = super().forward(values)
        return values - Mean.apply(values.mean(0))


class Upright(torch.autograd.Function):
    """The identity, whose gradient is NaN where a value is 0."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(values)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (values,) = ctx.saved_tensors
        return torch.full_like(gradient, float("nan")) if (values == 0).any() else gradient


class Spoiling(Block):
    """A function with a backward pass of its own."""

    def spoil(self, values: torch.Tensor) -> torch.Tensor:
        return Upright.apply(values)  # type: ignore[no-any-return]


class Broken(Block):
    """Stands for a device that multiplies wrongly: in one process, by what is no state of Python's."""

    @staticmethod
    def set_broken(broken: bool) -> None:
        torch.set_float32_matmul_precision("high" if broken else "highest")

    def spoil(self, values: torch.Tensor) -> torch.Tensor:
        factor = torch.ones(WIDTH)
        if torch.get_float32_matmul_precision() == "high":
            factor.fill_(float("nan"))
        return values * factor


class Transient(Log):
    """Strikes once."""

    struck = False

    def spoil(self, values: torch.Tensor) -> torch.Tensor:
        if not (values == 0).any() or self.struck:
            return values
        self.struck = os.getpid() == _PARENT
        return super().spoil(values) if self.struck else values


class Endless(Log):
    def spoil(self, values: torch.Tensor) -> torch.Tensor:
        while os.getpid() != _PARENT:
            pass
        return super().spoil(values)


class Suicidal(Log):
    def spoil(self, values: torch.Tensor) -> torch.Tensor:
        if os.getpid() != _PARENT:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().spoil(values)


class Opaque:
    """Holds its values where nobody can look."""

    __slots__ = ("_values",)

    def __init__(self, values: torch.Tensor) -> None:
        self._values = values

    def take(self) -> torch.Tensor:
        return self._values


_PARENT = os.getpid()
