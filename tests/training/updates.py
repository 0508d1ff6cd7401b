"""Trainings of two ranks, one after the other, in which weights go bad: by an update, otherwise, or not.

usage: python -m tests.training.updates CASE...

Each case has a model of its own. What it does at step BAD_STEP, or before the first, is its name in CASES.
"""

from __future__ import annotations

import gc
import sys
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradwatch.agent import watch

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS = 6
BAD_STEP = 3
NAN = float("nan")


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def batch(step: int, salt: int = 0) -> torch.Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(100 * step + 7 * dist.get_rank() + salt))


def loop(
    module: nn.Module,
    make: Callable[[Any], Any] = lambda parameters: torch.optim.SGD(parameters, lr=0.01),
    *,
    inputs: Callable[[int, torch.Tensor], torch.Tensor] = lambda _, values: values,
    between: Callable[[int, Any, Any], None] = lambda *_: None,
    after: Callable[[int, Any, Any], None] = lambda *_: None,
    reduced: bool = True,
) -> None:
    """The loop that everybody writes, with something between the backward pass and the update."""
    model = DistributedDataParallel(module)
    optimizer = make(model.parameters())
    for step in range(STEPS):
        optimizer.zero_grad()
        values = inputs(step, batch(step))
        if reduced:
            model(values).pow(2).mean().backward()
        else:
            with model.no_sync():
                model(values).pow(2).mean().backward()
        between(step, model, optimizer)
        optimizer.step()
        after(step, model, optimizer)


# ---------------------------------------------------------------- by an update


def normalised() -> None:
    def divide(step: int, model: Any, _: Any) -> None:
        for one in model.parameters():
            one.grad.div_(0.0 if step == BAD_STEP and one.dim() == 2 else 1.0 + one.grad.norm())

    loop(net(), between=divide)


def exchanged() -> None:
    def exchange(step: int, model: Any, _: Any) -> None:
        bias = model.module[2].bias
        bias.grad = bias.grad * (NAN if step == BAD_STEP else 1.0)

    loop(net(), between=exchange)


def closure() -> None:
    model = DistributedDataParallel(net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(STEPS):

        def forward_backward(step: int = step) -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(batch(step)).pow(2).mean()
            loss.backward()
            model.module[0].bias.grad.mul_(NAN if step == BAD_STEP else 1.0)
            return loss

        optimizer.step(forward_backward)


def epsilon() -> None:
    module = nn.Sequential(nn.Embedding(20, 4), nn.Flatten(), nn.Linear(8, 3)).half()
    rows = torch.tensor([[0, 1], [2, 3]])
    loop(
        module,
        lambda parameters: torch.optim.Adam(parameters, lr=1e-3, eps=1e-8),
        inputs=lambda *_: rows,
    )


def state() -> None:
    def spoil(step: int, model: Any, optimizer: Any) -> None:
        if step == BAD_STEP:
            optimizer.state[model.module[2].weight]["momentum_buffer"][0, 0] = float("inf")

    loop(net(), lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9), between=spoil)


# ---------------------------------------------------------------- by something else


def overwritten() -> None:
    def overwrite(step: int, model: Any, _: Any) -> None:
        if step == BAD_STEP:
            with torch.no_grad():
                model.module[2].weight[0] = NAN

    loop(net(), torch.optim.Adam, after=overwrite)


def poisoned_checkpoint() -> None:
    def load(step: int, model: Any, optimizer: Any) -> None:
        if step == BAD_STEP:
            known = optimizer.state_dict()
            known["state"][2]["momentum_buffer"] = torch.full((3, 8), NAN)
            optimizer.load_state_dict(known)
            weights = {name: value.clone() for name, value in model.module.state_dict().items()}
            weights["2.weight"][0] = NAN
            model.module.load_state_dict(weights)

    loop(net(), lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9), after=load)


def bad_batch() -> None:
    def spoil(step: int, values: torch.Tensor) -> torch.Tensor:
        return values * NAN if step == BAD_STEP and dist.get_rank() == 1 else values

    loop(net(), torch.optim.Adam, inputs=spoil)


def uninitialised() -> None:
    module = net()
    with torch.no_grad():
        module[2].bias[1] = NAN
    loop(module)


# ---------------------------------------------------------------- by nothing: nothing is to be said


def loaded_later() -> None:
    module = net()
    good = {name: value.clone() for name, value in module.state_dict().items()}
    with torch.no_grad():
        module[2].bias[1] = NAN
    model = DistributedDataParallel(module)
    model.module.load_state_dict(good)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(batch(step)).pow(2).mean().backward()
        optimizer.step()


def clipped() -> None:
    def clip(_: int, model: Any, __: Any) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        nn.utils.clip_grad_value_(model.parameters(), 0.05)

    loop(net(), between=clip)


# ---------------------------------------------------------------- gradients that nobody has reduced


def penalty() -> None:
    def second(step: int, model: Any, _: Any) -> None:
        bad = step == BAD_STEP and dist.get_rank() == 1
        # The root of 0 has no derivative.
        length = model.module[2].weight.mul(0.0 if bad else 1.0).pow(2).sum().sqrt()
        (0.01 * length).backward()

    loop(net(), between=second)


def by_hand() -> None:
    def average(_: int, model: Any, __: Any) -> None:
        for one in model.parameters():
            dist.all_reduce(one.grad)
            one.grad.div_(2)

    def spoil(step: int, values: torch.Tensor) -> torch.Tensor:
        return values * NAN if step == BAD_STEP and dist.get_rank() == 1 else values

    loop(net(), inputs=spoil, between=average, reduced=False)


def bare_head() -> None:
    backbone, head, spare = DistributedDataParallel(net()), nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters(), *spare.parameters()])
    for step in range(STEPS):
        optimizer.zero_grad()
        features = backbone(batch(step))
        given = features.detach()
        if step == BAD_STEP and dist.get_rank() == 1:
            given = given * NAN
        loss = features.pow(2).mean() + head(given).pow(2).mean() + spare(features.detach()).pow(2).mean()
        loss.backward()
        for one in (*head.parameters(), *spare.parameters()):
            dist.all_reduce(one.grad)
            one.grad.div_(2)
        optimizer.step()


def wrapped_later() -> None:
    backbone, head = DistributedDataParallel(net()), nn.Linear(3, 2)
    head_optimizer = torch.optim.SGD(head.parameters(), lr=0.01)
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.01)
    (backbone(batch(0)).mean() + head(torch.ones(1, 3)).mean()).backward()
    optimizer.step()
    model = DistributedDataParallel(head)
    for step in range(STEPS):
        head_optimizer.zero_grad()
        bad = step == BAD_STEP and dist.get_rank() == 1
        model(torch.full((2, 3), NAN if bad else 1.0)).pow(2).mean().backward()
        head_optimizer.step()


def two_optimizers() -> None:
    module = nn.Sequential(nn.Embedding(9, 6, sparse=True), net())
    model = DistributedDataParallel(module)
    optimizers = [
        torch.optim.SparseAdam(list(module[0].parameters()), lr=0.01),
        torch.optim.AdamW(module[1].parameters(), lr=0.01),
    ]
    for step in range(STEPS):
        for optimizer in optimizers:
            optimizer.zero_grad()
        output = model(torch.arange(4) + step % 3)
        if step == BAD_STEP and dist.get_rank() == 1:
            output = output * NAN
        output.pow(2).mean().backward()
        for optimizer in optimizers:
            optimizer.step()


def one_rank_edits() -> None:
    def edit(step: int, model: Any, _: Any) -> None:
        bad = step == BAD_STEP and dist.get_rank() == 1
        model.module[0].weight.grad.mul_(NAN if bad else 1.0)

    loop(net(), between=edit)


def each_rank_edits_another() -> None:
    """One optimizer for each parameter: the ranks edit gradients of the second and of the third."""
    model = DistributedDataParallel(net())
    optimizers = [torch.optim.SGD([one], lr=0.01) for one in model.parameters()]
    for step in range(STEPS):
        model.zero_grad()
        model(batch(step)).pow(2).mean().backward()
        edited = (model.module[0].bias, model.module[2].weight)[dist.get_rank()]
        edited.grad.mul_(NAN if step == BAD_STEP else 1.0)
        for optimizer in optimizers:
            optimizer.step()


CASES = {
    case.__name__: case
    for case in (
        *(normalised, exchanged, closure, epsilon, state),
        *(overwritten, poisoned_checkpoint, bad_batch, uninitialised),
        *(loaded_later, clipped),
        *(penalty, by_hand, bare_head, wrapped_later, two_optimizers, one_rank_edits),
        each_rank_edits_another,
    )
}


def main() -> None:
    dist.init_process_group("gloo")
    watched = watch()
    for name in sys.argv[1:]:
        watched.set_step(0)
        watched.tag(batch=name)
        CASES[name]()
        gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
