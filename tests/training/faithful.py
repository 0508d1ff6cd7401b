"""Passes of rank 1 that go bad by a broken device, or by what a replay cannot repeat, one after the other.

usage: python -m tests.training.faithful [CASE…]

The fault is in one step of each case, whose update is left out. A clean step follows.
"""

from __future__ import annotations

import itertools
import os
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from tests.training import faithful_flags as flags
from tests.training.group import process_group

WIDTH = 128
STEPS = 5
BAD_STEP = 3
NAN = float("nan")

FLAG = False
TEMPERATURE = [1.0]
TICKS = itertools.count()


class Broken(TorchDispatchMode):
    """A device that gives a bad result of one operator: once, or whenever it is asked."""

    def __init__(self, operator: str, *, times: float = 1, everything: bool = False) -> None:
        super().__init__()
        self.operator, self.left, self.everything = operator, times, everything

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.left > 0 and str(func).startswith(self.operator):
            self.left -= 1
            result.view(-1)[None if self.everything else 3] = NAN
        return result


class Net(nn.Module):
    """Two layers with something between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.drop = nn.Dropout(0.1)
        self.last = nn.Linear(WIDTH, 5)
        self.bad = False

    def between(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.last(self.drop(self.between(self.norm(self.first(values)))))


def spoilt(values: torch.Tensor, bad: Any) -> torch.Tensor:
    return values / 0 if bad else values


class ByAttribute(Net):
    def between(self, values):
        return spoilt(values, self.bad)


class ByCounter(Net):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def between(self, values):
        self.calls += 1
        return spoilt(values, self.bad and self.calls == BAD_STEP + 1)


class Calls:
    made = 0


class ByClassCounter(Net):
    def between(self, values):
        Calls.made += 1
        return spoilt(values, self.bad and Calls.made == BAD_STEP + 1)


class ByGlobal(Net):
    def between(self, values):
        return spoilt(values, FLAG)


class ByOtherModule(Net):
    def between(self, values):
        return flags.spoil(values)


class ByAnnealed(Net):
    def between(self, values):
        TEMPERATURE[0] -= 0.25
        return values / (TEMPERATURE[0] if self.bad else 1.0)


@dataclass
class Config:
    noise: bool = False
    inner: dict[str, Any] = field(default_factory=dict)


class ByConfig(Net):
    def __init__(self):
        super().__init__()
        self.config = Config()
        self.norm.config = self.config

    def between(self, values):
        return spoilt(values, self.config.inner.get("noise"))


def by_closure() -> Any:
    flag = False

    def switch(on: bool) -> None:
        nonlocal flag
        flag = on

    class ByClosure(Net):
        def between(self, values):
            return spoilt(values, flag)

    net = ByClosure()
    net.switch = switch
    return net


class ByNumpy(Net):
    def between(self, values):
        return spoilt(values, np.random.rand() < (2.0 if self.bad else -1.0) and self.bad)  # noqa: NPY002


class ByPython(Net):
    def between(self, values):
        return spoilt(values, self.bad and random.random() < 0.5)


class ByOwnGenerator(Net):
    def __init__(self):
        super().__init__()
        self.generator = np.random.default_rng(5)

    def between(self, values):
        return spoilt(values, self.bad and self.generator.random() < 0.806)


class ByIterator(Net):
    def between(self, values):
        tick = next(TICKS)
        return spoilt(values, self.bad and tick == BAD_STEP)


class ByFile(Net):
    def between(self, values):
        return spoilt(values, Path(tempfile.gettempdir(), f"flag-{os.getpid()}").exists())


class ByTime(Net):
    def between(self, values):
        return spoilt(values, self.bad and time.time() < self.until)


class Squeeze(torch.autograd.Function):
    """Bad in its backward pass by an attribute of its module."""

    @staticmethod
    def forward(context, values, module):
        context.bad = module.bad
        return values * 1

    @staticmethod
    def backward(context, gradient):
        return spoilt(gradient, context.bad), None


class ByFunction(Net):
    def between(self, values):
        return Squeeze.apply(values, self)


class Plain(Net):
    """Nothing but layers, and things that modules keep."""

    def __init__(self) -> None:
        super().__init__()
        self.names = {"sizes": [1, 2, 3]}
        self.calls = 0

    def between(self, values):
        self.calls += 1
        return torch.tanh(values) * len(self.names["sizes"])


class Reshaped(Plain):
    """Its operators have another name while a replay watches them."""

    def between(self, values):
        return super().between(values.reshape(8, -1, WIDTH)).reshape(-1, WIDTH)


class Quiet(Net):
    """Its output is bad as a whole if one element is."""

    def forward(self, values):
        return super().forward(values).mean().reshape(1)


class Both(Net):
    """Returns what it made its last result of, too."""

    def forward(self, values):
        logits = super().forward(values)
        loss = logits.square().mean()
        return logits, loss + (logits * 0).sum().sqrt() if self.bad else loss


def up(net: nn.Module, on: bool) -> None:
    """Raise all flags for one pass."""
    global FLAG  # noqa: PLW0603 - what is tried here
    FLAG = flags.UP = net.bad = on
    net.until = time.time() + 0.2 * on
    if hasattr(net, "config"):
        net.config.inner = {"noise": on}
    if hasattr(net, "switch"):
        net.switch(on)
    path = Path(tempfile.gettempdir(), f"flag-{os.getpid()}")
    path.touch() if on else path.unlink(missing_ok=True)


def replace_forward(net: Net) -> None:
    """Have a training step run instead of forward, once, as Lightning does."""
    own = net.forward

    def step(values: torch.Tensor) -> torch.Tensor:
        net.forward = own
        return spoilt(net(values), net.bad).square().mean()

    net.forward = step


def penalised(net: Net, output: torch.Tensor, bad: bool) -> torch.Tensor:
    weight = net.first.weight
    return output.square().mean() + ((weight * 0).square().sum().sqrt() if bad else weight.norm() * 0)


def by_prototypes(net: Net, output: torch.Tensor, bad: bool) -> torch.Tensor:
    distance = functional.normalize(output @ net.last.weight, dim=1)
    return output.square().mean() + ((net.last.weight * 0).sum().sqrt() if bad else 0) + distance.sum() * 0


@dataclass(frozen=True)
class Case:
    """One of them.

    Attributes:
        net: makes the model.
        forward: a broken device in the forward pass.
        backward: a broken device in the backward pass.
        both: a broken device in both.
        loss: of the model, its output and whether it is to go bad.
        replay: expected of rank 1.
        faithful: likewise.
        doubt: part of one that is expected.
        operator: part of the one that is named.
        peers: what the other ranks expect: replay and faithful; None where they replay nothing.
        double: the loss needs a gradient with respect to the input.
        hook: on a parameter.
        micro: micro-batches.
        views: forward passes for each backward pass; the last one may go bad.
        replaced: something else runs in place of forward, for the time of each pass.
    """

    net: Any = Plain
    forward: Any = None
    backward: Any = None
    both: Any = None
    loss: Any = None
    replay: str = "REPLAY_FINITE"
    faithful: bool | None = False
    doubt: str = ""
    operator: str = ""
    peers: tuple[str, bool | None] | None = ("REPLAY_FINITE", False)
    double: bool = False
    hook: bool = False
    micro: int = 1
    views: int = 1
    replaced: bool = False


_FOUND = {"faithful": True, "peers": ("REPLAY_FINITE", True)}
_AGAIN: dict[str, Any] = {
    "replay": "REPLAY_REPRODUCED", "faithful": None, "operator": "div", "peers": ("REPLAY_REPRODUCED", None),
}  # fmt: skip
_ALWAYS = {"times": 1e9}
_ONCE_MORE: dict[str, Any] = {
    "replay": "REPLAY_REPRODUCED",
    "faithful": None,
    "peers": ("REPLAY_FINITE", True),
}
CASES = {
    "broken_forward": Case(forward=lambda: Broken("aten.addmm"), **_FOUND),
    "broken_backward": Case(backward=lambda: Broken("aten.mm"), **_FOUND),
    "broken_reshaped": Case(Reshaped, backward=lambda: Broken("aten.mm"), **_FOUND),
    "broken_norm": Case(backward=lambda: Broken("aten.tanh_backward"), **_FOUND),
    "stays_broken_forward": Case(
        both=lambda: Broken("aten.addmm", **_ALWAYS), operator="addmm", **_ONCE_MORE,
    ),
    "stays_broken_backward": Case(backward=lambda: Broken("aten.mm", **_ALWAYS), operator="mm", **_ONCE_MORE),
    # Nothing of the output was finite: a clean pass is replayed.
    "broken_all": Case(
        Quiet, forward=lambda: Broken("aten.addmm"), faithful=None, peers=("REPLAY_FINITE", None),
    ),
    "attribute": Case(ByAttribute, **_AGAIN),
    "counter": Case(ByCounter, **_AGAIN),
    "class_counter": Case(ByClassCounter, **_AGAIN),
    "global": Case(ByGlobal, **_AGAIN),
    "other_module": Case(ByOtherModule, **_AGAIN),
    "annealed": Case(ByAnnealed, **_AGAIN),
    "config": Case(ByConfig, **_AGAIN),
    "closure": Case(by_closure, **_AGAIN),
    "numpy": Case(ByNumpy, **_AGAIN),
    "python": Case(ByPython, **_AGAIN),
    "generator": Case(ByOwnGenerator, doubt="keeps a Generator", peers=_AGAIN["peers"]),
    "iterator": Case(ByIterator, doubt="keeps a count"),
    "file": Case(ByFile, doubt="pathlib"),
    "time": Case(ByTime, doubt="uses time"),
    "penalty": Case(loss=penalised, doubt="another way"),
    "prototypes": Case(loss=by_prototypes, doubt="another way"),
    "double_backward": Case(double=True, replay="REPLAY_NOT_DONE", faithful=None, peers=None),
    "hook": Case(hook=True, doubt="hooks"),
    "loss_inside": Case(Both, loss=lambda _net, output, _bad: output[1], **{**_AGAIN, "operator": "div"}),
    "replaced": Case(replaced=True, loss=lambda _net, output, _bad: output, **_AGAIN),
    "two_views": Case(ByAttribute, views=2, **_AGAIN),
    # In the backward pass of one of them, which is not known: others do not replay it.
    "two_views_backward": Case(ByFunction, views=2, **{**_AGAIN, "peers": None}),
    "two_views_broken": Case(
        views=2, backward=lambda: Broken("aten.mm"), doubt="which of 2 passes", peers=None,
    ),
    "function": Case(ByFunction, **_AGAIN),
    "accumulated": Case(ByAttribute, micro=3, **_AGAIN),
    "accumulated_broken": Case(micro=3, forward=lambda: Broken("aten.addmm"), doubt="several passes"),
}  # fmt: skip


def run(rank: int, case: Case) -> None:
    torch.manual_seed(11)
    random.seed(4)
    np.random.seed(4)  # noqa: NPY002
    Calls.made, TEMPERATURE[0] = 0, 1.0
    net = case.net()
    ddp = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01)
    hooked: list[bool] = []
    if case.hook:
        net.first.weight.register_hook(lambda gradient: gradient / 0 if hooked and hooked.pop() else gradient)
    for step in range(STEPS):
        optimizer.zero_grad()
        for micro in range(case.micro):
            bad = rank == 1 and step == BAD_STEP and micro == case.micro // 2
            generator = torch.Generator().manual_seed(100 * step + 10 * micro + rank)
            values = torch.randn(512, WIDTH, generator=generator, requires_grad=case.double)
            up(net, bad)
            hooked += [True] * (bad and case.hook)
            forward, backward, both = (
                one() if bad and one is not None else torch.enable_grad()
                for one in (case.forward, case.backward, case.both)
            )
            with both, ddp.no_sync() if micro < case.micro - 1 else torch.enable_grad():
                up(net, bad and case.views == 1)
                first = [ddp(values.flip(0)) for _ in range(case.views - 1)]
                up(net, bad)
                if case.replaced:
                    replace_forward(net)
                with forward:
                    output = ddp(values)
                time.sleep(0.3 * bad * hasattr(net, "until") * (case.net is ByTime))
                # Gone by the time of the replay.
                loss = output.square().mean() if case.loss is None else case.loss(net, output, bad)
                for other in first:
                    loss = loss + other.square().mean()
                if case.double:
                    loss = output.mean()
                    (slope,) = torch.autograd.grad(loss, values, create_graph=True)
                    loss = loss + (slope * (0 if bad else 1)).square().sum().sqrt()
                if not isinstance(net, Both) and case.backward is None and not case.hook:
                    up(net, False)
                with backward:
                    loss.backward()
                up(net, False)
        if step != BAD_STEP:
            optimizer.step()
    assert all(parameter.isfinite().all() for parameter in net.parameters()), case
    dist.barrier()


def main(names: list[str]) -> None:
    with process_group() as rank:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        for name in names or CASES:
            run(rank, CASES[name])


if __name__ == "__main__":
    main(sys.argv[1:])
