"""The catalogue of faults at random places: what is done to a small model, and what must be said of it."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.faults import Fault, inject
from tests.training.breakable import BLOCKS, LENGTH, Breakable

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

REPLICA_CHECK_EVERY = 5
NAN = float("nan")
HALF = 0.5
# The smallest world: of two ranks that differ, none is shown to be right.
SMALLEST = 2
# How often the model has them computed in that pass, and in no other one.
FORWARD_OPERATORS = {"aten.addmm.default": 8, "aten.tanh.default": 2, "aten._softmax.default": 2}
BACKWARD_OPERATORS = {
    "aten.mm.default": 15,
    "aten.tanh_backward.default": 2,
    "aten._softmax_backward_data.default": 2,
}


@dataclass(frozen=True)
class Case:
    """A model to be trained, and what must be said of it.

    Attributes:
        expected: fields of the incident, and of its `first`; None for no incident.
        after: steps that follow the one with the fault.
        shown_after: so many steps after the fault is planted it is seen.
        summed: gradients are summed up by a hook that divides them afterwards.
        sharded: by FSDP2, rather than replicated by DDP.
        shape: of the training, by its name in `trainings`.
        parameter: that such a training is about.
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
    shape: str = "Replicated"
    parameter: str | None = None


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


def began_with(parameter: str) -> dict[str, Any]:
    """What must be said of a weight: its own name. The gradient that arrived first is another one's."""
    return began_in("parameter", parameter=parameter, microbatch=None)


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
    return Case(fault, began_in("forward", **everyone(place)), after=1, shown_after=1)


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
    return Case(fault, began_with(fault.parameter))


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
    expected: dict[str, Any] = {
        "cause": "reduction",
        "phase": None,
        "rank": None,
        "origins": [],
        "tie": False,
    }
    return Case(fault, expected, summed=True)


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


def everyone(place: Place) -> dict[str, Any]:
    """What must be said where all ranks are alike."""
    return {"origins": list(range(place.world_size)), "tie": True}


def divided_gradient(place: Place) -> Case:
    fault = inject.gradient_divided_by_zero(step=place.step, parameter=place.parameter())
    expected = began_in("update", parameter=fault.parameter, microbatch=None, **everyone(place))
    return Case(fault, expected, adam=place.draw.random() < HALF)


def vanishing_epsilon(place: Place) -> Case:
    fault = inject.vanishing_epsilon(step=place.step)
    # All weights have such elements. They are looked at once a gradient is bad.
    expected = began_in("update", parameter="embed.weight", microbatch=None, **everyone(place))
    return Case(fault, expected, shape="Half", shown_after=1, after=1)


def broken_device(place: Place, *, backward: bool) -> Case:
    draw = place.draw
    operators = BACKWARD_OPERATORS if backward else FORWARD_OPERATORS
    operator = draw.choice([*operators])
    stays = draw.random() < HALF
    fault = inject.broken_device(
        **place.at,
        operator=operator,
        # In the first column: of what a causal mask hides no gradient comes back.
        element=place.element() * LENGTH,
        # One that stays has been so before the pass.
        call=0 if stays else draw.randrange(operators[operator]),
        stays=stays,
        backward=backward,
    )
    expected = began_in("backward" if backward else "forward")
    if not stays:
        return Case(fault, expected | {"judgement": "transient", "found": True})
    # Of two ranks that disagree, none has the majority.
    known = {"device": False} if place.world_size == SMALLEST else {"found": True}
    return Case(fault, expected | {"judgement": "only_there", "operator": operator, **known})


def mask_on_purpose(place: Place) -> Case:
    make = place.draw.choice([log_of_zero, sqrt_of_zero, nan_in_the_data, bad_loss, bad_gradient])
    return dataclasses.replace(make(place), shape="WithMask")


def two_optimizers(place: Place) -> Case:
    make = place.draw.choice([log_of_zero, sqrt_of_zero, nan_in_the_data, bad_loss, bad_gradient])
    # All ranks are bad in the steps that follow, by the update.
    return dataclasses.replace(make(place), shape="TwoOptimizers", after=2)


def two_paces(place: Place) -> Case:
    fault = inject.distance_of_zero(**place.at)
    # The critic's update of that step is over by then.
    return Case(fault, began_in("loss"), shape="Pace", shown_after=1, after=3)


def penalty_on_a_weight(place: Place) -> Case:
    fault = inject.distance_of_zero(**place.at)
    expected = began_in("loss", operator="aten.sqrt")
    return Case(fault, expected, shape="Penalised", parameter=place.parameter())


def gradient_penalty(place: Place) -> Case:
    # Operators of the model have derivatives that may be bad as well, so the phase is not known.
    return Case(inject.distance_of_zero(**place.at), {}, shape="GradientPenalty")


def loss_inside(place: Place) -> Case:
    fault = inject.sqrt_of_zero(**place.at, module="distance")
    expected = began_in("backward", operator="aten.div.Tensor", module="distance")
    return Case(fault, expected, shape="WithLoss")


def bare_head(place: Place) -> Case:
    return Case(inject.distance_of_zero(**place.at), {}, shape="BareHead")


def second_backward(place: Place) -> Case:
    parameter = place.parameter()
    fault = inject.distance_of_zero(**place.at)
    return Case(fault, {"parameter": parameter}, shape="SecondBackward", parameter=parameter)


def clean(place: Place) -> Case:
    draw = place.draw
    return Case(micro_batches=draw.choice([1, 2]), adam=draw.random() < 0.5)


def clean_mask(place: Place) -> Case:
    return dataclasses.replace(clean(place), shape="WithMask")


def scaler_overflow(place: Place) -> Case:
    return Case(inject.scaler_overflow(**place.at), scaler=True)


def scaler_overflow_with_mask(place: Place) -> Case:
    return dataclasses.replace(scaler_overflow(place), shape="WithMask")


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
    "broken device, forward": functools.partial(broken_device, backward=False),
    "broken device, backward": functools.partial(broken_device, backward=True),
    "update, gradient": divided_gradient,
    "update, eps": vanishing_epsilon,
    "mask of -inf": mask_on_purpose,
    "two optimizers": two_optimizers,
    "GAN pace": two_paces,
    "penalty on a weight": penalty_on_a_weight,
    "double backward": gradient_penalty,
    "loss inside": loss_inside,
    "bare head": bare_head,
    "second backward": second_backward,
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
    # The forward pass gathers it, and all ranks are bad at once; whose shard it is is known.
    return Case(fault, began_with(fault.parameter), sharded=True)


def sharded(make: Callable[[Place], Case]) -> Callable[[Place], Case]:
    """The same for a model that FSDP2 shards."""

    return lambda place: dataclasses.replace(make(place), sharded=True)


SHARDED = {f"{name}, FSDP2": sharded(REPLICATED[name]) for name in SHARDABLE}
SHARDED |= {"poisoned shard, FSDP2": poisoned_shard}
CLASSES = {**REPLICATED, **SHARDED}
CLEAN: dict[str, Callable[[Place], Case]] = {
    "clean": clean,
    "clean, FSDP2": sharded(clean),
    "clean, mask of -inf": clean_mask,
    "scaler overflow": scaler_overflow,
    "scaler overflow, FSDP2": sharded(scaler_overflow),
    "scaler overflow, mask of -inf": scaler_overflow_with_mask,
}
