"""Train models of several kinds, let them go, and see whether they are freed at once.

usage: python -m tests.training.lifetimes OUTPUT
"""

from __future__ import annotations

import gc
import json
import sys
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.training.group import process_group

if TYPE_CHECKING:
    from collections.abc import Callable


class Settings:
    """A plain object that a model keeps."""

    def __init__(self) -> None:
        self.scale, self.log = 1.0, []


class Net(nn.Module):
    """Keeps settings, and another thing that may be bad."""

    def __init__(self, *, bad: bool = False) -> None:
        super().__init__()
        self.settings, self.linear, self.calls = Settings(), nn.Linear(4, 4), 0
        self.bad = bad

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        given = self.linear(values) * self.settings.scale
        return given * float("nan") if self.bad and self.calls == 2 else given


def steps(model: nn.Module, count: int = 3) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()


def plain() -> nn.Module:
    model = DistributedDataParallel(Net())
    steps(model)
    return model


def gone_bad() -> nn.Module:
    model = DistributedDataParallel(Net(bad=True))
    steps(model)
    return model


def never_gone_back_through() -> nn.Module:
    model = DistributedDataParallel(Net())
    for _ in range(3):
        model(torch.ones(2, 4))
    return model


def hooked() -> nn.Module:
    model = DistributedDataParallel(Net())
    seen: list[Any] = []
    model.module.register_forward_hook(lambda module, _, given: seen.append(given.detach().mean()))
    steps(model)
    return model


def around_the_output() -> nn.Module:
    model = DistributedDataParallel(Net())
    loss = model(torch.ones(2, 4)).sum() + (model.module.linear.weight * 0).sum().sqrt()
    loss.backward()
    return model


KINDS: list[Callable[[], nn.Module]] = [
    plain,
    gone_bad,
    never_gone_back_through,
    hooked,
    around_the_output,
]


def freed(train: Callable[[], nn.Module]) -> bool:
    """Whether a weight of a model is gone once nobody of the script's has the model any more."""
    model = train()
    weight = weakref.ref(next(model.parameters()))
    del model
    # Once for the wrapper, which tells us, and once for what that lets go.
    gc.collect()
    gc.collect()
    return weight() is None


def main(output: Path) -> None:
    with process_group():
        output.write_text(json.dumps({train.__name__: freed(train) for train in KINDS}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
