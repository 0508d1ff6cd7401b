"""The shapes of a training step: what is wrapped, what the loss is made of, and who steps when.

A model of `breakable` each. A fault of the catalogue strikes at the points of a step that the shape has.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from tests.faults import NO_FAULT, Fault, LargeLearningRate
from tests.training.breakable import (
    BATCH,
    CLASSES,
    LENGTH,
    WIDTH,
    Breakable,
    LossInside,
    Masked,
    causal_mask,
    sum_then_divide,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.training.catalogue import Case

NAN = float("nan")
# In so many the gradients of all models have arrived.
STEPS_OF_ORDER = 2
# Of the gradient's second moments in half precision, at which none vanishes.
HALF_EPSILON = 1e-2


class FirstBad:
    """Which parameter's gradient is the first to arrive of those that are bad in a step.

    The order is that of the first steps. Later nothing is attached to the parameters: no replay can show that
    it has repeated a pass that user code looks into.
    """

    def __init__(self, *models: nn.Module) -> None:
        self.name: str | None = None
        self._order: dict[str, torch.Tensor] = {}
        self._handles: list[Any] = []
        for model in models:
            self.follow(model.named_parameters())

    def follow(self, parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, parameter in parameters:
            handle = parameter.register_post_accumulate_grad_hook(functools.partial(self._arrived, name))
            self._handles.append(handle)

    def _arrived(self, name: str, parameter: torch.Tensor) -> None:
        self._order.setdefault(name, parameter)

    def see(self, step: int) -> None:
        """The backward passes of a step are over."""
        if step >= STEPS_OF_ORDER:
            while self._handles:
                self._handles.pop().remove()
        if self.name is None:
            bad = (name for name, one in self._order.items() if is_bad(one.grad))
            self.name = next(bad, None)


class Replicated:
    """A model under DDP."""

    def __init__(self, case: Case, seed: int) -> None:
        torch.manual_seed(seed)
        self.case = case
        self.model = self.make()
        self.first_bad = FirstBad(self.model)
        self.run = DistributedDataParallel(self.model, bucket_cap_mb=0.0005)
        if case.summed:
            self.run.register_comm_hook(None, sum_then_divide)
        self.optimizers = self.make_optimizers()

    def make(self) -> Breakable:
        return Breakable(shared_statistics=self.case.shared_statistics)

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        return [optimizer_of(self.case, self.model.parameters())]

    def micro_batch(self, *, is_last: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if is_last else self.run.no_sync()

    def loss(self, fault: Fault, inputs: torch.Tensor) -> torch.Tensor:
        """Run the model, and have a loss."""
        del fault
        return self.run(inputs).square().mean()

    def backward(self, fault: Fault, loss: torch.Tensor) -> None:
        with fault.in_backward():
            loss.backward()

    def learn_of(self, fault: Fault, inputs: torch.Tensor) -> None:
        """Nothing to do: its gradients are seen as they come."""

    def after_backward(self, fault: Fault) -> None:
        """Between the backward pass and the update."""
        fault.in_gradients(self.model)

    def update(self, scaler: torch.amp.GradScaler, fault: Fault) -> None:
        """The update of each optimizer."""
        for optimizer in self.optimizers:
            fault.in_optimizer(optimizer)
            scaler.step(optimizer)
        scaler.update()

    def after_update(self, fault: Fault, step: int) -> None:
        """Between the update and the next step."""

    @property
    def weight(self) -> torch.Tensor:
        """The parameter that the case is about."""
        assert self.case.parameter is not None
        return self.model.get_parameter(self.case.parameter)


class Sharded(Replicated):
    """A model under FSDP2, whose gradients no hook sees: a twin that is not sharded has the same faults."""

    def __init__(self, case: Case, seed: int) -> None:
        torch.manual_seed(seed)
        self.case = case
        self.run = self.model = self.make()
        self._twin = copy.deepcopy(self.model)
        # Runs on one rank alone.
        self._twin.norm = nn.Identity()
        self.first_bad = FirstBad(self._twin)
        for block in self.model.blocks:
            fully_shard(block)
        self._root = fully_shard(self.model)
        self.optimizers = self.make_optimizers()

    def micro_batch(self, *, is_last: bool) -> contextlib.AbstractContextManager[None]:
        self._root.set_requires_gradient_sync(is_last)
        return contextlib.nullcontext()

    def learn_of(self, fault: Fault, inputs: torch.Tensor) -> None:
        """Run the twin on the micro-batch that a fault strikes."""
        if fault is NO_FAULT:
            return
        fault.in_weights(self._twin)
        with fault.in_modules(self._twin):
            loss = fault.in_loss(self._twin(inputs).square().mean())
            # Its own weights do not explode with the others'.
            (loss * NAN if isinstance(fault, LargeLearningRate) else loss).backward()
        self.first_bad.see(fault.step)


class WithMask(Replicated):
    """Infinities on purpose: a mask enters the model in each step, and what is not allowed leaves it."""

    def make(self) -> Breakable:
        return Masked()

    def loss(self, fault: Fault, inputs: torch.Tensor) -> torch.Tensor:
        del fault
        targets = torch.randint(1, CLASSES, (BATCH,))
        return functional.cross_entropy(self.run(inputs, causal_mask(LENGTH)), targets)


class TwoOptimizers(Replicated):
    """One for the blocks and one for all else, both in each step."""

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        inner = [*self.model.blocks.parameters()]
        outer = [*self.model.embed.parameters(), *self.model.head.parameters()]
        return [torch.optim.SGD(outer, lr=1e-3), torch.optim.AdamW(inner, lr=1e-3)]


class Half(Replicated):
    """In half precision, with an optimizer that divides by a second moment."""

    def make(self) -> Breakable:
        return super().make().half()

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(self.model.parameters(), lr=1e-3, eps=HALF_EPSILON)]

    def loss(self, fault: Fault, inputs: torch.Tensor) -> torch.Tensor:
        return 0.01 * super().loss(fault, inputs.half())


class Penalised(Replicated):
    """The length of a weight is part of the loss, and no forward pass sees that."""

    def loss(self, fault: Fault, inputs: torch.Tensor) -> torch.Tensor:
        return super().loss(fault, inputs) + 0.01 * length(fault.in_distance(self.weight))


class SecondBackward(Replicated):
    """That penalty has a backward pass of its own, after the reduction."""

    def after_backward(self, fault: Fault) -> None:
        (0.01 * length(fault.in_distance(self.weight))).backward()


class GradientPenalty(Replicated):
    """The length of a gradient is part of the loss."""

    def loss(self, fault: Fault, inputs: torch.Tensor) -> torch.Tensor:
        inputs.requires_grad_()
        made = self.run(inputs)
        (slope,) = torch.autograd.grad(made.sum(), inputs, create_graph=True)
        lengths = fault.in_distance(slope).square().sum((1, 2)).sqrt()
        return made.square().mean() + 0.1 * (lengths - 1.0).square().mean()


class WithLoss(Replicated):
    """The model gives its loss beside its output."""

    def make(self) -> Breakable:
        return LossInside()

    def loss(self, fault: Fault, inputs: torch.Tensor) -> torch.Tensor:
        del fault
        _, loss = self.run(inputs)
        return loss


class BareHead(Replicated):
    """A head that nothing wraps, whose gradients are averaged by hand."""

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        self.head = nn.Linear(CLASSES, 2)
        self.first_bad.follow(self.head.named_parameters(prefix="head"))
        return [optimizer_of(self.case, [*self.model.parameters(), *self.head.parameters()])]

    def loss(self, fault: Fault, inputs: torch.Tensor) -> torch.Tensor:
        features = self.run(inputs)
        scores = self.head(features.detach())
        return features.square().mean() + length(fault.in_distance(scores))

    def after_backward(self, fault: Fault) -> None:
        del fault
        for parameter in self.head.parameters():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


class Pace(Replicated):
    """A critic, which counts, and a generator that steps once after two of its steps."""

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        generator = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        self.first_bad.follow(generator.named_parameters())
        self.generator = DistributedDataParallel(generator)
        self.slow = torch.optim.Adam(generator.parameters(), lr=1e-3)
        return super().make_optimizers()

    def made(self) -> torch.Tensor:
        return self.generator(torch.randn(BATCH, LENGTH, WIDTH))

    def loss(self, fault: Fault, inputs: torch.Tensor) -> torch.Tensor:
        return super().loss(fault, inputs) - super().loss(fault, self.made().detach())

    def after_update(self, fault: Fault, step: int) -> None:
        assert self.case.fault is not None
        if (step - self.case.fault.step) % 2:
            return
        self.slow.zero_grad()
        made = self.made()
        self.model.requires_grad_(requires_grad=False)
        (self.run(made).square().mean() + 0.01 * length(fault.in_distance(made))).backward()
        self.model.requires_grad_(requires_grad=True)
        self.slow.step()


SHAPES: dict[str, type[Replicated]] = {
    shape.__name__: shape
    for shape in (
        Replicated,
        WithMask,
        TwoOptimizers,
        Half,
        Penalised,
        SecondBackward,
        GradientPenalty,
        WithLoss,
        BareHead,
        Pace,
    )
}


def is_bad(gradient: torch.Tensor | None) -> bool:
    return gradient is not None and not gradient.isfinite().all()


def length(difference: torch.Tensor) -> torch.Tensor:
    """Of the whole of it."""
    return difference.square().sum().sqrt()


def optimizer_of(case: Case, parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters) if case.adam else torch.optim.SGD(parameters, lr=1e-3)
