"""Trainings of one process without any process group, one after the other.

usage: python -m tests.training.single OUTPUT FAULT LOOK

FAULT is `none`, `guarded` (the guard skips the bad update), or `by-hand` (the script leaves it out). LOOK
is `host`, or `device` for a probe that looks at this CPU as at a device. OUTPUT gets weights and states, by
case.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradwatch.agent import watch
from tests.training.guarded import device_look
from tests.training.phases import NAN, Spoil

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS = 5
BAD_STEP = 3


class Net(nn.Module):
    def __init__(self, *, reentrant: bool | None = None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 6)
        self.turn = nn.Parameter(torch.ones(6, dtype=dtype))
        self.empty = nn.Parameter(torch.ones(0, 3))
        self.first = nn.Linear(6, 12)
        self.last = nn.Linear(12, 3)
        self.reentrant = reentrant

    def forward(self, values: torch.Tensor, *, spoil: bool = False) -> torch.Tensor:
        values = values + self.embedding(torch.arange(4)) + self.empty.sum()
        values = (values * self.turn).abs()
        if self.reentrant is None:
            return self._body(values, spoil)
        inside = checkpoint(self._body, values, spoil, use_reentrant=self.reentrant)
        return inside * 1.0

    def _body(self, values: torch.Tensor, spoil: bool) -> torch.Tensor:
        hidden = self.first(values).tanh()
        return self.last(Spoil.apply(hidden) if spoil else hidden)


@dataclass(frozen=True)
class Run:
    """How the cases are run.

    Attributes:
        faulty: with the fault.
        by_hand: and without the update that it would spoil.
    """

    faulty: bool
    by_hand: bool
    watched: Any

    def bad(self, step: int) -> bool:
        return self.faulty and step == BAD_STEP

    def skip(self, step: int) -> bool:
        return self.by_hand and step == BAD_STEP


def values_of(step: int, micro: int = 0) -> torch.Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(100 * step + micro))


def adam(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01, **{"foreach": False, **options})


def state_of(module: Any, *optimizers: Any) -> Any:
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    return {"weights": module.state_dict(), "states": states}


def plain(
    run: Run,
    name: str,
    *,
    net: Callable[[], nn.Module] = Net,
    make: Callable[[Any], Any] = adam,
    kind: str = "backward",
    micro: int = 1,
    bad_micro: int = 0,
    to_none: bool = True,
    clip: bool = False,
    closure: bool = False,
    scaled: bool = False,
    split: bool = False,
    explicit: bool = False,
) -> Any:
    """The loop that everybody writes."""
    torch.manual_seed(1)
    module = net()
    parameters = list(module.parameters())
    half = len(parameters) // 2
    optimizers = [make(parameters[:half]), make(parameters[half:])] if split else [make(parameters)]
    if explicit:
        watch(module, optimizers[0])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, enabled=scaled)
    for step in range(STEPS):

        def forward_backward(step: int = step) -> torch.Tensor:
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=to_none)
            for part in range(micro):
                run.watched.tag(batch=[name, part])
                bad = run.bad(step) and part == bad_micro
                values = values_of(step, part)
                if bad and kind == "input":
                    values[1, 2] = NAN
                if bad and kind == "parameter":
                    with torch.no_grad():
                        module.last.weight[0, 0] = NAN  # type: ignore[union-attr, operator]
                loss = module(values, spoil=bad and kind == "backward").pow(2).mean()
                scaler.scale(loss * (1e30 if bad and kind == "overflow" else 1.0)).backward()
            return loss

        if closure and not run.skip(step):
            optimizers[0].step(forward_backward)
            continue
        forward_backward()
        if clip:
            nn.utils.clip_grad_norm_(parameters, 1.0)
        if scaled or not run.skip(step):
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
        if run.bad(step) and kind == "parameter":
            with torch.no_grad():
                module.last.weight[0, 0] = 0.5  # type: ignore[union-attr, operator]
    return state_of(module, *optimizers)


def adversaries(run: Run, name: str, *, bad: str) -> Any:
    """Two models that train in turns; the gradients of the first linger while the second trains."""
    torch.manual_seed(1)
    generator, judge = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1))
    of_generator, of_judge = adam(generator.parameters()), adam(judge.parameters())
    for step in range(STEPS):
        values = values_of(step)
        for turn, optimizer in (("judge", of_judge), ("generator", of_generator)):
            run.watched.tag(batch=[name, turn])
            optimizer.zero_grad()
            faulty = run.bad(step) and turn == bad
            made = generator(values)
            if turn == "judge":
                made = made.detach()
            judged = judge(Spoil.apply(made) if faulty and turn == "generator" else made)
            (Spoil.apply(judged) if faulty and turn == "judge" else judged).mean().backward()
            if not (run.by_hand and faulty):
                optimizer.step()
    return state_of(nn.ModuleList([generator, judge]), of_generator, of_judge)


def by_name_of_none(run: Run, name: str) -> Any:
    """Parameters that belong to no module."""
    torch.manual_seed(1)
    parameters = [torch.randn(6, 3, requires_grad=True), torch.randn(3, requires_grad=True)]
    optimizer = adam(parameters)
    for step in range(STEPS):
        run.watched.tag(batch=[name, 0])
        optimizer.zero_grad()
        product = values_of(step) @ parameters[0]
        ((Spoil.apply(product) if run.bad(step) else product) + parameters[1]).pow(2).mean().backward()
        if not run.skip(step):
            optimizer.step()
    return {"weights": dict(enumerate(parameters))}


def assigned(run: Run, name: str) -> Any:
    """Gradients that no backward pass accumulates."""
    torch.manual_seed(1)
    module = nn.Linear(6, 3)
    optimizer = adam(module.parameters())
    for step in range(STEPS):
        run.watched.tag(batch=[name, 0])
        loss = module(values_of(step)).pow(2).mean()
        for one, gradient in zip(
            module.parameters(), torch.autograd.grad(loss, list(module.parameters())), strict=True
        ):
            one.grad = gradient
        if run.bad(step):
            module.bias.grad = torch.full_like(module.bias, NAN)
        if not run.skip(step):
            optimizer.step()
    return state_of(module, optimizer)


def copied(run: Run, name: str) -> Any:
    """Trained as a deep copy, and as what comes back from a file; a layer is unfrozen on the way."""
    torch.manual_seed(1)
    made = Net()
    made.first.weight.requires_grad_(requires_grad=False)
    torch.save(made, Path("/dev/null"))
    module, optimizer = copy.deepcopy((made, adam(made.parameters())))
    for step in range(STEPS):
        run.watched.tag(batch=[name, 0])
        if step == 1:
            module.first.weight.requires_grad_()
        optimizer.zero_grad()
        module(values_of(step), spoil=run.bad(step)).pow(2).mean().backward()
        if not run.skip(step):
            optimizer.step()
    return state_of(module, optimizer)


def fails(run: Run, name: str) -> Any:
    """A backward pass that raises is no pass."""
    torch.manual_seed(1)
    module = Net()
    optimizer = adam(module.parameters())
    for step in range(STEPS):
        run.watched.tag(batch=[name, 0])
        optimizer.zero_grad()
        handle = module.first.weight.register_hook(_raise)
        try:
            module(values_of(step)).sum().backward()
        except RuntimeError:
            handle.remove()
        optimizer.zero_grad()
        module(values_of(step), spoil=run.bad(step)).pow(2).mean().backward()
        if not run.skip(step):
            optimizer.step()
    return state_of(module, optimizer)


def _raise(_gradient: torch.Tensor) -> None:
    raise RuntimeError("a hook of the script's fails")


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, foreach=True)


CASES: dict[str, Callable[[Run, str], Any]] = {
    "backward": plain,
    "backward-kept": lambda run, name: plain(run, name, to_none=False),
    "input": lambda run, name: plain(run, name, kind="input", micro=3, bad_micro=1),
    "last-micro-batch": lambda run, name: plain(run, name, micro=3, bad_micro=2, make=sgd),
    "parameter": lambda run, name: plain(run, name, kind="parameter"),
    "overflow": lambda run, name: plain(run, name, kind="overflow", scaled=True),
    "scaled": lambda run, name: plain(run, name, scaled=True),
    "clipped": lambda run, name: plain(run, name, clip=True),
    "closure": lambda run, name: plain(run, name, closure=True, micro=2),
    "split": lambda run, name: plain(run, name, split=True, explicit=True),
    "fused": lambda run, name: plain(run, name, make=lambda given: adam(given, foreach=None, fused=True)),
    "complex": lambda run, name: plain(run, name, net=lambda: Net(dtype=torch.complex64)),
    "explicit": lambda run, name: plain(run, name, explicit=True),
    "compiled": lambda run, name: plain(run, name, net=lambda: torch.compile(Net(), backend="aot_eager")),
    "reentrant": lambda run, name: plain(run, name, net=lambda: Net(reentrant=True), micro=2, bad_micro=1),
    "recomputed": lambda run, name: plain(run, name, net=lambda: Net(reentrant=False)),
    "judge": lambda run, name: adversaries(run, name, bad="judge"),
    "generator": lambda run, name: adversaries(run, name, bad="generator"),
    "no-module": by_name_of_none,
    "assigned": assigned,
    "copied": copied,
    "fails": fails,
}


def main(output: Path, fault: str, look: str) -> None:
    torch.set_num_threads(1)
    if look == "device":
        device_look()
    run = Run(faulty=fault != "none", by_hand=fault == "by-hand", watched=watch())
    torch.save({name: case(run, name) for name, case in CASES.items()}, output)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
