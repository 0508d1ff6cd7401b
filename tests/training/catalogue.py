"""The catalogue of faults at random places: what is done to a small model, and what must be said of it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.faults import Fault, inject
from tests.training.breakable import BLOCKS, Breakable

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

REPLICA_CHECK_EVERY = 5
NAN = float("nan")


@dataclass(frozen=True)
class Case:
    """A model to be trained, and what must be said of it.

    Attributes:
        expected: fields of the incident, and of its `first`; None for no incident.
        after: steps that follow the one with the fault.
        shown_after: so many steps after the fault is planted it is seen.
        summed: gradients are summed up by a hook that divides them afterwards.
        sharded: by FSDP2, rather than replicated by DDP.
    """

    fault: Fault | None = None
    expected: dict[str, Any] | None = None
    micro_batches: int = 1
    after: int = 0
    shown_after: int = 0
    scaler: bool = False
    adam: bool = False
    summed: bool = False
    shared_statistics: bool = False
    sharded: bool = False


@dataclass
class Place:
    """Where a fault is to be: drawn, the same on all ranks."""

    draw: random.Random
    world_size: int
    step: int
    rank: int = field(init=False)
    block: str = field(init=False)

    def __post_init__(self) -> None:
        self.rank = self.draw.randrange(self.world_size)
        self.block = f"blocks.{self.draw.randrange(BLOCKS)}"

    @property
    def at(self) -> dict[str, int]:
        """The rank and the step."""
        return {"rank": self.rank, "step": self.step}

    def parameter(self) -> str:
        names = [name for name, _ in Breakable().named_parameters()]
        return self.draw.choice(names)

    def element(self) -> int:
        return self.draw.randrange(1 << 20)

    def value(self) -> float:
        return self.draw.choice([NAN, math.inf, -math.inf])


def began_in(phase: str, **fields: Any) -> dict[str, Any]:
    """What must be said of a fault that begins on one rank in a phase, which is then the cause as well."""
    return {"phase": phase, "cause": phase, **fields}


def bad_gradient(place: Place) -> Case:
    parameter = place.parameter()
    fault = inject.nonfinite_gradient(
        **place.at, parameter=parameter, value=place.value(), element=place.element()
    )
    return Case(fault, began_in("backward"))


def two_ranks(place: Place) -> Case:
    ranks = sorted(place.draw.sample(range(place.world_size), 2))
    fault = inject.nonfinite_on_two_ranks_at_once(
        ranks=(ranks[0], ranks[1]), step=place.step, parameter=place.parameter()
    )
    return Case(fault, began_in("backward", origins=ranks, tie=True))


def log_of_zero(place: Place) -> Case:
    module = f"{place.block}.log"
    fault = inject.log_of_zero(**place.at, module=module)
    return Case(fault, began_in("forward", operator="aten.log.default", module=module))


def sqrt_of_zero(place: Place) -> Case:
    module = f"{place.block}.root"
    fault = inject.sqrt_of_zero(**place.at, module=module)
    return Case(fault, began_in("backward", operator="aten.div.Tensor", module=module))


def masked_softmax(place: Place) -> Case:
    module = f"{place.block}.attention"
    fault = inject.fully_masked_softmax(**place.at, module=module)
    return Case(fault, began_in("forward", operator="aten._softmax.default", module=module))


def exploding_learning_rate(place: Place) -> Case:
    fault = inject.exploding_learning_rate(step=place.step, learning_rate=1e30)
    everyone = list(range(place.world_size))
    return Case(fault, began_in("forward", origins=everyone, tie=True), after=1, shown_after=1)


def nan_in_the_data(place: Place) -> Case:
    return Case(inject.nan_in_the_data(**place.at, element=place.element()), began_in("input"))


def bit_flip_in_the_data(place: Place) -> Case:
    return Case(inject.bit_flip_in_the_data(**place.at, element=place.element()), began_in("input"))


def bit_flip_in_a_weight(place: Place) -> Case:
    # Finite, and its square is not.
    fault = inject.bit_flip_in_a_weight(
        **place.at, parameter=f"{place.block}.mix.weight", element=place.element()
    )
    return Case(fault, began_in("forward", operator="aten.pow.Tensor_Scalar", module=f"{place.block}.root"))


def poisoned_weight(place: Place) -> Case:
    fault = inject.poisoned_weight(**place.at, parameter=place.parameter(), element=place.element())
    return Case(fault, began_in("parameter"))


def bad_loss(place: Place) -> Case:
    return Case(inject.sqrt_of_zero_in_the_loss(**place.at), began_in("loss"))


def third_micro_batch(place: Place) -> Case:
    at: dict[str, Any] = {**place.at, "microbatch": 2}
    module = f"{place.block}.log"
    fault, expected = place.draw.choice(
        [
            (inject.nan_in_the_data(**at, element=place.element()), began_in("input")),
            (
                inject.log_of_zero(**at, module=module),
                began_in("forward", operator="aten.log.default", module=module),
            ),
            (inject.sqrt_of_zero_in_the_loss(**at), began_in("loss")),
        ]
    )
    return Case(fault, expected | {"microbatch": 2}, micro_batches=4)


def overflow_in_the_sum(place: Place) -> Case:
    fault = inject.overflow_in_the_sum(step=place.step, parameter=place.parameter())
    return Case(fault, {"cause": "reduction", "rank": None, "origins": [], "tie": False}, summed=True)


def second_moment(place: Place) -> Case:
    fault = inject.overflow_of_the_second_moment(**place.at, parameter=place.parameter())
    return Case(fault, {"cause": "optimizer_state", "phase": None, "parameter": fault.parameter}, adam=True)


def shared_statistics(place: Place) -> Case:
    fault = inject.nan_in_the_data(**place.at, element=place.element())
    # Every rank is bad in that step; where it began was bad first.
    return Case(fault, began_in("input"), shared_statistics=True)


def diverged_replica(place: Place) -> Case:
    fault = inject.diverged_replica(**place.at, parameter=place.parameter(), element=place.element())
    expected: dict[str, Any] = {"cause": "replica_divergence", "phase": None, "parameter": fault.parameter}
    if place.world_size == 2:
        # It cannot be told which of two is the other one.
        expected |= {"origins": [0, 1], "tie": True}
    seen_after = -place.step % REPLICA_CHECK_EVERY
    return Case(fault, expected, after=seen_after, shown_after=seen_after)


def clean(place: Place) -> Case:
    draw = place.draw
    return Case(micro_batches=draw.choice([1, 2]), adam=draw.random() < 0.5)


def scaler_overflow(place: Place) -> Case:
    return Case(inject.scaler_overflow(**place.at), scaler=True)


REPLICATED: dict[str, Callable[[Place], Case]] = {
    "gradient": bad_gradient,
    "two ranks at once": two_ranks,
    "log of 0": log_of_zero,
    "sqrt of 0": sqrt_of_zero,
    "masked softmax": masked_softmax,
    "learning rate": exploding_learning_rate,
    "NaN in the data": nan_in_the_data,
    "bit flip, data": bit_flip_in_the_data,
    "bit flip, weight": bit_flip_in_a_weight,
    "poisoned weight": poisoned_weight,
    "loss": bad_loss,
    "third micro-batch": third_micro_batch,
    "overflow in the sum": overflow_in_the_sum,
    "second moment": second_moment,
    "shared statistics": shared_statistics,
    "diverged replica": diverged_replica,
}
# Where a gradient is changed by a hook, it is a replica's: hooks on FSDP2's shards never fire.
SHARDABLE = (
    "log of 0",
    "sqrt of 0",
    "masked softmax",
    "learning rate",
    "NaN in the data",
    "bit flip, data",
    "loss",
    "third micro-batch",
    "shared statistics",
)


def poisoned_shard(place: Place) -> Case:
    fault = inject.poisoned_weight(**place.at, parameter=f"{place.block}.mix.weight", element=place.element())
    # The forward pass gathers it: all ranks are bad at once.
    everyone = list(range(place.world_size))
    return Case(fault, began_in("parameter", origins=everyone, tie=True), sharded=True)


def sharded(make: Callable[[Place], Case]) -> Callable[[Place], Case]:
    """The same for a model that FSDP2 shards."""

    return lambda place: dataclasses.replace(make(place), sharded=True)


SHARDED = {f"{name}, FSDP2": sharded(REPLICATED[name]) for name in SHARDABLE}
SHARDED |= {"poisoned shard, FSDP2": poisoned_shard}
CLASSES = {**REPLICATED, **SHARDED}
CLEAN: dict[str, Callable[[Place], Case]] = {
    "clean": clean,
    "clean, FSDP2": sharded(clean),
    "scaler overflow": scaler_overflow,
    "scaler overflow, FSDP2": sharded(scaler_overflow),
}
