"""The catalogue of faults for rehearsals, that reads as a sentence: `inject.log_of_zero(rank=1, step=3, …)`.

They act on what the training itself has, its data, weights, modules, loss and gradients, and know nothing of
Gradwatch. The training asks a fault whether it is due, and then at each point of the step what it does there.
"""

from __future__ import annotations

import contextlib
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.utils.hooks import RemovableHandle

EVERY_RANK = -1
# The highest bit of the exponent of an fp32 number.
EXPONENT_BIT = 30


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Something that goes wrong on one rank, in one step.

    Attributes:
        rank: EVERY_RANK for all.
        microbatch: the ordinal of the backward pass within the step.
    """

    rank: int
    step: int
    microbatch: int = 0

    def is_due(self, *, rank: int, step: int, microbatch: int = 0) -> bool:
        """Whether it strikes now."""
        return self.rank in {rank, EVERY_RANK} and (self.step, self.microbatch) == (step, microbatch)

    def in_batch(self, batch: torch.Tensor) -> torch.Tensor:
        """What becomes of the data of the micro-batch that it strikes; the data are left as they are."""
        return batch

    def in_weights(self, model: nn.Module) -> None:
        """Change the weights before the forward pass that it strikes."""

    @contextlib.contextmanager
    def in_modules(self, model: nn.Module) -> Iterator[None]:
        """Be in force within the model during the forward and backward pass that it strikes."""
        del model
        yield

    @contextlib.contextmanager
    def in_forward(self) -> Iterator[None]:
        """Be in force during the forward pass that it strikes."""
        yield

    @contextlib.contextmanager
    def in_backward(self) -> Iterator[None]:
        """Be in force during the backward pass that it strikes."""
        yield

    def in_distance(self, difference: torch.Tensor) -> torch.Tensor:
        """What becomes of a difference whose length the loss takes."""
        return difference

    def in_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """What becomes of the loss."""
        return loss

    def in_gradients(self, model: nn.Module) -> None:
        """Change the gradients between the backward pass and the update."""

    def in_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Change the optimizer before the update that ends the step."""


NO_FAULT = Fault(rank=0, step=0)


@dataclass(frozen=True)
class GradientFault:
    """A gradient that goes bad on one rank in one step, and in no other parameter.

    Attributes:
        elements: how many of its elements, at most as many as it has.
        offset: the first of them, in flat order; wraps around.
    """

    rank: int
    step: int
    parameter: str
    value: float
    elements: int = 1
    offset: int = 0

    def arm(self, parameter: torch.Tensor, *, rank: int, step: int) -> RemovableHandle | None:
        """Put the fault into the next backward pass of `parameter`, if rank and step are its own."""
        if (rank, step) != (self.rank, self.step):
            return None
        return parameter.register_hook(self.spoil)

    def spoil(self, gradient: torch.Tensor) -> torch.Tensor:
        """A copy of the gradient with the fault in it."""
        spoilt = gradient.clone()
        flat = spoilt.view(-1)
        for element in range(min(self.elements, flat.numel())):
            flat[(self.offset + element) % flat.numel()] = self.value
        return spoilt


@dataclass(frozen=True, kw_only=True)
class SpoiltGradient(Fault):
    """An element of a parameter's gradient is `value`, on one rank or on several."""

    parameter: str
    value: float
    also_on: tuple[int, ...] = ()
    element: int = 0

    def is_due(self, *, rank: int, step: int, microbatch: int = 0) -> bool:
        if rank in self.also_on:
            rank = self.rank
        return super().is_due(rank=rank, step=step, microbatch=microbatch)

    @contextlib.contextmanager
    def in_modules(self, model: nn.Module) -> Iterator[None]:
        fault = GradientFault(self.rank, self.step, self.parameter, self.value, offset=self.element)
        handle = model.get_parameter(self.parameter).register_hook(fault.spoil)
        yield
        handle.remove()


@dataclass(frozen=True, kw_only=True)
class SpoiltBatch(Fault):
    """One value of the data is another one: `value`, or with `flips` its own with one bit flipped."""

    element: int
    value: float = float("nan")
    flips: bool = False

    def in_batch(self, batch: torch.Tensor) -> torch.Tensor:
        spoilt = batch.clone()
        flat = spoilt.view(-1)
        place = self.element % flat.numel()
        # Of 1.0 the flipped bit makes +Inf.
        flat[place] = flipped(1.0) if self.flips else self.value
        return spoilt


@dataclass(frozen=True, kw_only=True)
class SpoiltWeight(Fault):
    """One weight is `value`, or with `flips` its own with one bit flipped, or it is moved by `by`."""

    parameter: str
    element: int
    value: float = float("nan")
    flips: bool = False
    by: float = 0.0

    def in_weights(self, model: nn.Module) -> None:
        parameter: torch.Tensor = model.get_parameter(self.parameter)
        if isinstance(parameter, DTensor):
            # This rank's own shard of it.
            parameter = parameter.to_local()
        with torch.no_grad():
            flat = parameter.view(-1)
            place = self.element % flat.numel()
            own = float(flat[place])
            if self.flips:
                flat[place] = flipped(own)
            else:
                flat[place] = own + self.by if self.by else self.value


@dataclass(frozen=True, kw_only=True)
class SpoiltArgument(Fault):
    """What goes into one module is all `value`, in its argument number `argument`."""

    module: str
    value: float | bool
    argument: int = 0

    @contextlib.contextmanager
    def in_modules(self, model: nn.Module) -> Iterator[None]:
        def spoil(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            del module
            one = arguments[self.argument]
            # Stays in the graph, as a dead activation does.
            spoilt = one | True if one.dtype is torch.bool else torch.zeros_like(one) + one * self.value
            return (*arguments[: self.argument], spoilt, *arguments[self.argument + 1 :])

        handle = model.get_submodule(self.module).register_forward_pre_hook(spoil)
        yield
        handle.remove()


@dataclass(frozen=True, kw_only=True)
class SpoiltLoss(Fault):
    """The loss is the square root of a distance that is 0: finite, and its gradient is not."""

    def in_loss(self, loss: torch.Tensor) -> torch.Tensor:
        return (loss - loss).sqrt()


@dataclass(frozen=True, kw_only=True)
class ZeroDistance(Fault):
    """Two things are the same: the length of their difference is the root of 0, which has no derivative."""

    def in_distance(self, difference: torch.Tensor) -> torch.Tensor:
        return difference * 0.0


@dataclass(frozen=True, kw_only=True)
class DividedGradient(Fault):
    """A gradient is 0, and the script divides it by its own length."""

    parameter: str

    def in_gradients(self, model: nn.Module) -> None:
        gradient = model.get_parameter(self.parameter).grad
        assert gradient is not None
        gradient.zero_()
        gradient.div_(gradient.norm())


@dataclass(frozen=True, kw_only=True)
class VanishingEpsilon(Fault):
    """The optimizer's eps becomes `eps`, which is 0 in the dtype of its state."""

    eps: float

    def in_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            group["eps"] = self.eps


@dataclass(frozen=True, kw_only=True)
class BrokenDevice(Fault):
    """Whatever is computed by one operator comes out wrong in one element: once, or from now on each time.

    Attributes:
        operator: such as "aten.mm.default".
        call: of that operator in the pass, the first that comes out wrong.
        stays: it is wrong in each later call too, also in those of a replay.
        backward: it breaks in the backward pass rather than the forward pass.
    """

    operator: str
    value: float
    element: int
    call: int = 0
    stays: bool = False
    backward: bool = False

    @contextlib.contextmanager
    def in_modules(self, model: nn.Module) -> Iterator[None]:
        del model
        with self._unit() if self.stays else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def in_forward(self) -> Iterator[None]:
        with contextlib.nullcontext() if self.stays or self.backward else self._unit():
            yield

    @contextlib.contextmanager
    def in_backward(self) -> Iterator[None]:
        with self._unit() if self.backward and not self.stays else contextlib.nullcontext():
            yield

    def _unit(self) -> BrokenUnit:
        return BrokenUnit(self)


class BrokenUnit(TorchDispatchMode):
    """The part of a device that computes one operator, broken: no state of the program shows it."""

    def __init__(self, fault: BrokenDevice) -> None:
        super().__init__()
        self._fault = fault
        self._calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        if str(func) == self._fault.operator:
            self._calls += 1
            due = self._calls - 1 - self._fault.call
            if due >= 0 if self._fault.stays else due == 0:
                flat = result.view(-1)
                flat[self._fault.element % flat.numel()] = self._fault.value
        return result


@dataclass(frozen=True, kw_only=True)
class LargeLoss(Fault):
    """The loss is multiplied by `factor`, and finite still."""

    factor: float

    def in_loss(self, loss: torch.Tensor) -> torch.Tensor:
        return loss * self.factor


@dataclass(frozen=True, kw_only=True)
class LargeLearningRate(Fault):
    """The learning rate of the update is `learning_rate`: the weights explode, and the next step is lost."""

    learning_rate: float

    def in_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate


def flipped(value: float) -> float:
    """An fp32 number with the highest bit of its exponent flipped."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    (spoilt,) = struct.unpack("<f", struct.pack("<I", bits ^ (1 << EXPONENT_BIT)))
    return float(spoilt)


class inject:  # noqa: N801 - reads as a verb
    """The faults, by the sentence that names them."""

    @staticmethod
    def nonfinite_at(
        *,
        rank: int,
        step: int,
        parameter: str,
        value: float = float("nan"),
        elements: int = 1,
        offset: int = 0,
    ) -> GradientFault:
        """A gradient element of one parameter turns to `value` before it is accumulated."""
        return GradientFault(rank, step, parameter, value, elements, offset)

    @staticmethod
    def nonfinite_gradient(
        *, rank: int, step: int, parameter: str, value: float = float("nan"), element: int = 0
    ) -> SpoiltGradient:
        """An element of one parameter's gradient is `value`."""
        return SpoiltGradient(rank=rank, step=step, parameter=parameter, value=value, element=element)

    @staticmethod
    def nonfinite_on_two_ranks_at_once(
        *, ranks: tuple[int, int], step: int, parameter: str, value: float = float("nan")
    ) -> SpoiltGradient:
        """The same gradient turns to `value` on two ranks in the same step."""
        return SpoiltGradient(rank=ranks[0], also_on=(ranks[1],), step=step, parameter=parameter, value=value)

    @staticmethod
    def log_of_zero(*, rank: int, step: int, module: str, microbatch: int = 0) -> SpoiltArgument:
        """`module`, which takes a logarithm, is given zeros: -Inf in the forward pass."""
        return SpoiltArgument(rank=rank, step=step, microbatch=microbatch, module=module, value=0.0)

    @staticmethod
    def sqrt_of_zero(*, rank: int, step: int, module: str, microbatch: int = 0) -> SpoiltArgument:
        """`module`, which takes a square root, is given zeros: the backward pass divides by 0."""
        return SpoiltArgument(rank=rank, step=step, microbatch=microbatch, module=module, value=0.0)

    @staticmethod
    def fully_masked_softmax(*, rank: int, step: int, module: str) -> SpoiltArgument:
        """`module(scores, mask)` masks with -Inf what `mask` has set, which is everything now."""
        return SpoiltArgument(rank=rank, step=step, module=module, value=True, argument=1)

    @staticmethod
    def exploding_learning_rate(*, step: int, learning_rate: float = 1e20) -> LargeLearningRate:
        """The update of `step` is so large that the next step overflows, on every rank."""
        return LargeLearningRate(rank=EVERY_RANK, step=step, learning_rate=learning_rate)

    @staticmethod
    def nan_in_the_data(*, rank: int, step: int, element: int = 0, microbatch: int = 0) -> SpoiltBatch:
        """One number of a batch is NaN."""
        return SpoiltBatch(rank=rank, step=step, element=element, microbatch=microbatch)

    @staticmethod
    def bit_flip_in_the_data(*, rank: int, step: int, element: int = 0) -> SpoiltBatch:
        """One number of a batch was 1.0, and the highest bit of its exponent flips: Inf."""
        return SpoiltBatch(rank=rank, step=step, element=element, flips=True)

    @staticmethod
    def bit_flip_in_a_weight(*, rank: int, step: int, parameter: str, element: int = 0) -> SpoiltWeight:
        """The highest bit of a weight's exponent flips: if it was below 1, it is 2**128 times as large."""
        return SpoiltWeight(rank=rank, step=step, parameter=parameter, element=element, flips=True)

    @staticmethod
    def poisoned_weight(*, rank: int, step: int, parameter: str, element: int = 0) -> SpoiltWeight:
        """A weight is NaN before the step begins."""
        return SpoiltWeight(rank=rank, step=step, parameter=parameter, element=element)

    @staticmethod
    def diverged_replica(
        *, rank: int, step: int, parameter: str, element: int = 0, by: float = 1e-3
    ) -> SpoiltWeight:
        """A weight of one rank is not that of the others any more, and finite: nothing else shows it."""
        return SpoiltWeight(rank=rank, step=step, parameter=parameter, element=element, by=by)

    @staticmethod
    def sqrt_of_zero_in_the_loss(*, rank: int, step: int, microbatch: int = 0) -> SpoiltLoss:
        """The loss is the square root of 0: finite, and its gradient is not."""
        return SpoiltLoss(rank=rank, step=step, microbatch=microbatch)

    @staticmethod
    def overflow_in_the_sum(*, step: int, parameter: str, value: float = 3e38) -> SpoiltGradient:
        """A gradient is so large on every rank that it is finite on each, and their sum is not."""
        return SpoiltGradient(rank=EVERY_RANK, step=step, parameter=parameter, value=value)

    @staticmethod
    def overflow_of_the_second_moment(*, rank: int, step: int, parameter: str) -> SpoiltGradient:
        """A gradient is finite, before and after it is reduced, and its square is not."""
        return SpoiltGradient(rank=rank, step=step, parameter=parameter, value=1e30)

    @staticmethod
    def scaler_overflow(*, rank: int, step: int, factor: float = 1e30) -> LargeLoss:
        """The loss is finite, and not any more when a GradScaler multiplies it by its scale: no fault."""
        return LargeLoss(rank=rank, step=step, factor=factor)

    @staticmethod
    def distance_of_zero(*, rank: int, step: int) -> ZeroDistance:
        """A length that is part of the loss is the root of 0: finite, and its gradient is not."""
        return ZeroDistance(rank=rank, step=step)

    @staticmethod
    def gradient_divided_by_zero(*, step: int, parameter: str) -> DividedGradient:
        """The reduced gradient is divided by its own length, which is 0, on every rank."""
        return DividedGradient(rank=EVERY_RANK, step=step, parameter=parameter)

    @staticmethod
    def vanishing_epsilon(*, step: int, eps: float = 1e-8) -> VanishingEpsilon:
        """The eps of an optimizer in half precision rounds to 0, on every rank."""
        return VanishingEpsilon(rank=EVERY_RANK, step=step, eps=eps)

    @staticmethod
    def broken_device(
        *,
        rank: int,
        step: int,
        operator: str,
        element: int = 0,
        value: float = float("nan"),
        call: int = 0,
        stays: bool = False,
        backward: bool = False,
    ) -> BrokenDevice:
        """A device gives a wrong result of one operator, whatever the program: once, or from now on."""
        return BrokenDevice(
            rank=rank,
            step=step,
            operator=operator,
            element=element,
            value=value,
            call=call,
            stays=stays,
            backward=backward,
        )
