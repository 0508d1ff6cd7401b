"""DistributedDataParallel among its neighbours: a fault on rank 1 in the last step of each case.

usage: python -m tests.training.neighbours OUTPUT host|device

Each case runs under the guard, so that one case does not spoil another. Before all of it each rank trains by
itself, as if it were alone. OUTPUT gets what rank 0 has to say, as JSON.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from gradwatch.agent import watch
from tests.training.group import process_group
from tests.training.late import late_device_look
from tests.training.phases import NAN, Spoil

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS = 3
BAD_STEP = STEPS - 1


@dataclasses.dataclass
class Case:
    """One of the cases, in one rank."""

    rank: int
    name: str
    watched: Any
    notes: dict[str, Any]

    def bad(self, step: int) -> bool:
        """Whether this rank has the fault in that step."""
        return self.rank == 1 and step == BAD_STEP


@dataclasses.dataclass
class Batch:
    tokens: torch.Tensor
    more: list[dict[str, torch.Tensor]]


def values_of(case: Case, step: int, width: int = 6) -> torch.Tensor:
    return torch.randn(4, width, generator=torch.Generator().manual_seed(10 * step + case.rank))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def wrap(module: nn.Module, **options: Any) -> DistributedDataParallel:
    return DistributedDataParallel(module, **options)


def spoil(values: torch.Tensor, bad: bool) -> torch.Tensor:
    return Spoil.apply(values) if bad else values


def train(
    case: Case,
    module: Any,
    forward: Callable[[int], Any],
    *,
    optimizer: Any = None,
    before: Callable[[], Any] = lambda: None,
) -> None:
    """The usual loop, of one optimizer."""
    optimizer = optimizer or torch.optim.SGD(module.parameters(), lr=0.01)
    for step in range(STEPS):
        case.watched.tag(batch=case.name)
        optimizer.zero_grad()
        forward(step).backward()
        before()
        optimizer.step()


class Parts(nn.Module):
    """A model of which each part is something special."""

    def __init__(self, **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, call: Callable[[Any], Any]) -> Any:
        return call(self)


def together(case: Case) -> None:
    """Two models in one backward pass, one inside of the other, each with an optimizer of its own."""
    one = wrap(Parts(first=nn.Linear(6, 6), last=nn.Linear(3, 16)), bucket_cap_mb=0.0001)
    other = wrap(mlp(), bucket_cap_mb=0.0001)
    optimizers = [torch.optim.SGD(ddp.parameters(), lr=0.01) for ddp in (one, other)]
    for step in range(STEPS):
        case.watched.tag(batch=case.name)
        values = values_of(case, step)
        made = one(lambda parts, values=values: parts.last(other(parts.first(values))))
        spoil(made, case.bad(step)).pow(2).mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def frozen(case: Case) -> None:
    module = mlp()
    module[2].weight.requires_grad_(requires_grad=False)
    ddp = wrap(module)
    train(case, ddp, lambda step: spoil(ddp(values_of(case, step)), case.bad(step)).sum())


def unused(case: Case) -> None:
    ddp = wrap(Parts(used=mlp(), rarely=nn.Linear(3, 3)), find_unused_parameters=True)

    def forward(step: int) -> Any:
        def call(parts: Any) -> Any:
            made = parts.used(values_of(case, step))
            return spoil(parts.rarely(made) if step == BAD_STEP else made, case.bad(step)).sum()

        return ddp(call)

    train(case, ddp, forward)


def tied(case: Case) -> None:
    """One weight in two places: the gradient arrives once."""
    table, head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    head.weight = table.weight
    ddp = wrap(Parts(table=table, middle=nn.Linear(4, 4), head=head))

    def forward(step: int) -> Any:
        def call(parts: Any) -> Any:
            hidden = parts.middle(parts.table(torch.arange(5)))
            return parts.head(spoil(hidden, case.bad(step))).pow(2).mean()

        return ddp(call)

    train(case, ddp, forward)


def sparse(case: Case) -> None:
    ddp = wrap(Parts(table=nn.Embedding(5, 4, sparse=True), head=nn.Linear(4, 2)))

    def forward(step: int) -> Any:
        def call(parts: Any) -> Any:
            return parts.head(spoil(parts.table(torch.tensor([1, 3])), case.bad(step))).pow(2).mean()

        return ddp(call)

    train(case, ddp, forward)


def complex_(case: Case) -> None:
    turn = nn.Parameter(torch.ones(6, dtype=torch.complex64))
    ddp = wrap(Parts(turn=turn, head=nn.Linear(6, 2)))

    def forward(step: int) -> Any:
        def call(parts: Any) -> Any:
            turned = spoil((values_of(case, step) * parts.turn).abs(), case.bad(step))
            return parts.head(turned).pow(2).mean()

        return ddp(call)

    train(case, ddp, forward)


def empty(case: Case) -> None:
    ddp = wrap(Parts(nothing=nn.Parameter(torch.ones(0, 3)), head=nn.Linear(6, 2)))

    def forward(step: int) -> Any:
        def call(parts: Any) -> Any:
            made = parts.head(values_of(case, step)) + parts.nothing.sum()
            return spoil(made, case.bad(step)).pow(2).mean()

        return ddp(call)

    train(case, ddp, forward)


def joined(case: Case) -> None:
    """Rank 1 has more batches than rank 0, and the fault in the last of them."""
    ddp = wrap(mlp())
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01)
    with ddp.join():
        for step in range(STEPS if case.rank == 1 else STEPS - 1):
            case.watched.tag(batch=case.name)
            optimizer.zero_grad()
            spoil(ddp(values_of(case, step)), case.bad(step)).sum().backward()
            optimizer.step()


def checkpointed(case: Case, *, reentrant: bool) -> None:
    module = Parts(first=nn.Linear(6, 6), inner=mlp())
    ddp = wrap(module)

    def forward(step: int) -> Any:
        def call(parts: Any) -> Any:
            def body(values: torch.Tensor) -> torch.Tensor:
                return spoil(parts.inner(values), case.bad(step))

            hidden = checkpoint(body, parts.first(values_of(case, step)), use_reentrant=reentrant)
            return hidden.pow(2).mean()

        return ddp(call)

    train(case, ddp, forward)


def compiled(case: Case, *, outside: bool) -> None:
    def run() -> None:
        ddp: Any = wrap(mlp() if outside else torch.compile(mlp(), backend="aot_eager"))
        module = torch.compile(ddp, backend="aot_eager") if outside else ddp
        train(case, ddp, lambda step: spoil(module(values_of(case, step)), case.bad(step)).sum())

    run()
    # Else what was compiled is kept, and its model is the first one for good.
    torch.compiler.reset()
    gc.collect()


def zero(case: Case) -> None:
    """Twice: the second time it is the guard that leaves the bad update out."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns when it is imported

    ends = []
    for by_hand in (True, False):
        torch.manual_seed(3)
        ddp = wrap(mlp())
        optimizer = ZeroRedundancyOptimizer(ddp.parameters(), torch.optim.Adam, lr=0.01)
        for step in range(STEPS + 1):
            case.watched.tag(batch=case.name)
            optimizer.zero_grad()
            bad = case.bad(step) and not by_hand
            spoil(ddp(values_of(case, step)), bad).sum().backward()
            if not (by_hand and step == BAD_STEP):
                optimizer.step()
        ends.append([weight.detach().clone() for weight in ddp.parameters()])
    case.notes["zero_equal"] = all(torch.equal(*pair) for pair in zip(*ends, strict=True))


def clipped(case: Case) -> None:
    ddp = wrap(mlp())

    def forward(step: int) -> Any:
        hidden = ddp.module[0](values_of(case, step))
        del hidden
        return spoil_first(ddp, values_of(case, step), case.bad(step))

    train(case, ddp, forward, before=lambda: nn.utils.clip_grad_norm_(ddp.parameters(), 1.0))


def spoil_first(ddp: Any, values: torch.Tensor, bad: bool) -> torch.Tensor:
    """A fault in the first layer's gradient alone."""
    handle = ddp.module[0].weight.register_hook(lambda one: one * NAN) if bad else None
    loss = ddp(values).pow(2).mean()
    if handle is not None:
        loss.register_hook(lambda _: None)
    return loss


class Statistics(torch.autograd.Function):
    """The mean over all ranks, forward and backward, as in SyncBatchNorm."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        del ctx
        mean = values.mean(0)
        dist.all_reduce(mean)
        return mean / dist.get_world_size()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        del ctx
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return (gradient / dist.get_world_size() / 4).expand(4, -1)


def spread(case: Case) -> None:
    """A collective of the forward pass makes every rank bad in the same round."""
    ddp = wrap(Parts(first=nn.Linear(6, 6), last=nn.Linear(6, 2)))

    def forward(step: int) -> Any:
        values = values_of(case, step)
        if case.bad(step):
            values[0, 0] = NAN

        class Normed:
            def __init__(self, values: torch.Tensor) -> None:
                self.values = values

            def __call__(self, parts: Any) -> Any:
                hidden = parts.first(self.values)
                return parts.last(hidden - Statistics.apply(hidden)).pow(2).mean()

        return ddp(Normed(values))

    train(case, ddp, forward)


def untrainable(case: Case) -> None:
    """DDP refuses it; the next model is watched."""
    module = nn.Linear(2, 2)
    module.requires_grad_(requires_grad=False)
    try:
        wrap(module)
    except RuntimeError as error:
        case.notes["untrainable"] = str(error)


class Reader(nn.Module):
    """Takes tokens in a dataclass, and gives no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(5, 4), nn.Linear(4, 2)
        self.loss: torch.Tensor | None = None

    def forward(self, batch: Batch, *, bad: bool) -> str:
        hidden = self.table(batch.tokens) + batch.more[0]["shift"]
        self.loss = spoil(self.head(hidden), bad).pow(2).mean()
        return "see .loss"


def no_tensor(case: Case) -> None:
    reader = Reader()
    ddp = wrap(reader, find_unused_parameters=False)

    def forward(step: int) -> Any:
        ddp(Batch(torch.arange(5), [{"shift": torch.ones(4)}]), bad=case.bad(step))
        return reader.loss

    train(case, ddp, forward)


class Logs(nn.Module):
    """Gives log 0 when it is told to."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, values: torch.Tensor, *, bad: bool) -> torch.Tensor:
        made = self.inner(values)
        return (made - made).log() if bad else made


def chain(case: Case, *, detach: bool, made: str) -> None:
    """One model's output is another one's input."""
    first, second = wrap(Logs(mlp())), wrap(nn.Linear(3, 2))
    optimizers = [torch.optim.SGD(ddp.parameters(), lr=0.01) for ddp in (first, second)]
    for step in range(STEPS):
        case.watched.tag(batch=case.name)
        for optimizer in optimizers:
            optimizer.zero_grad()
        values = values_of(case, step)
        if case.bad(step) and made == "input":
            values[0, 0] = NAN
        if case.bad(step) and made == "parameter":
            with torch.no_grad():
                first.module.inner[2].weight[0, 0] = NAN
        output = first(values, bad=case.bad(step) and made == "forward")
        if case.bad(step) and made == "script":
            output = output / 0 * 0
        if case.bad(step) and made == "in place":
            output.detach()[0, 0] = NAN
        second(output.detach() if detach else output).pow(2).mean().backward()
        if detach:
            first(values_of(case, step), bad=False).pow(2).mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    if made == "parameter":
        with torch.no_grad():
            first.module.inner[2].weight.zero_()


# Where the second model's input goes bad, and in which phase of the first that was.
CHAINED = {
    "input": "PHASE_INPUT",
    "parameter": "PHASE_PARAMETER",
    "forward": "PHASE_FORWARD",
    # Computed by the script from what was finite.
    "script": None,
    "in place": None,
}
# name: (case, the first of rank 1's records, of rank 0's): phase, parameter, backward position
CASES: dict[str, tuple[Callable[[Case], None], Any, Any]] = {
    "together": (together, ("PHASE_LOSS", "last.bias"), None),
    "frozen": (frozen, ("PHASE_LOSS", "2.bias"), None),
    "unused": (unused, ("PHASE_BACKWARD", "rarely.bias"), None),
    "tied": (tied, ("PHASE_BACKWARD", "middle.bias"), None),
    "sparse": (sparse, ("PHASE_BACKWARD", "table.weight"), None),
    "complex": (complex_, ("PHASE_BACKWARD", "turn"), None),
    "empty": (empty, ("PHASE_BACKWARD", "head.bias"), None),
    "joined": (joined, ("PHASE_LOSS", "2.bias"), None),
    "reentrant": (partial(checkpointed, reentrant=True), ("PHASE_BACKWARD", "inner.2.bias"), None),
    "recomputed": (partial(checkpointed, reentrant=False), ("PHASE_BACKWARD", "inner.2.bias"), None),
    "compiled-inside": (partial(compiled, outside=False), ("PHASE_LOSS", None), None),
    "compiled-outside": (partial(compiled, outside=True), ("PHASE_LOSS", None), None),
    "zero": (zero, ("PHASE_LOSS", "2.bias"), None),
    "clipped": (clipped, ("PHASE_BACKWARD", "0.weight"), None),
    # Each rank tells the truth about itself; where it came from has to be found by other means.
    "spread": (spread, ("PHASE_INPUT", "last.bias"), ("PHASE_FORWARD", "last.bias")),
    "untrainable": (untrainable, None, None),
    "no-tensor": (no_tensor, (None, "head.bias"), None),
    **{
        f"chain-{made}{'-detached' if detach else ''}": (
            partial(chain, detach=detach, made=made),
            (phase, "bias"),
            None,
        )
        for detach in (False, True)
        for made, phase in CHAINED.items()
        # Detached, it is like any other tensor that the script gives.
        if not (detach and made == "script")
    },
}


def alone() -> None:
    """Train before anybody has said that this is one of several."""
    size = os.environ.pop("WORLD_SIZE")
    module = mlp()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(torch.ones(1, 6)).sum().backward()
    optimizer.step()
    os.environ["WORLD_SIZE"] = size


def main(output: Path, look: str) -> None:
    if look == "device":
        late_device_look()
    alone()
    notes: dict[str, Any] = {}
    with process_group() as rank:
        for name, (run, _, _) in CASES.items():
            torch.manual_seed(5)
            run(Case(rank, name, watch(), notes))
            dist.barrier()
        if rank == 0:
            output.write_text(json.dumps(notes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
