"""What is likely to be behind an incident, and what to do about it: a ranked guess with its reason. Pure.

Each rule looks at one kind of evidence, and gives nothing when it has none: better "unknown" than a guess
out of the blue.
"""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradwatch.collector.model import Cause, Guess, Judgement, LikelyKind
from gradwatch.collector.observations import UpdateEvidence, Value
from gradwatch.collector.operators import (
    DOMAIN,
    EDGE_AT_ZERO,
    EXPONENTIAL,
    NORMALISING,
    SUMMING,
    bare_name,
    holds,
)
from gradwatch.collector.overflow import HALF, LARGEST, Power, dtype_of, fits_float32, power_of, top_of
from gradwatch.collector.words import is_part, number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradwatch.collector.model import Operator, Sighting
    from gradwatch.collector.observations import Flight, FlightStep

# Growth by this factor within the recorder's memory is no noise.
_GROWTH = 100.0
# A value above this part of the dtype's maximum has no room left.
_NEAR_MAXIMUM = 1e-2
# A learning rate that has become so many times as large, where all ranks are bad; and in one process, where
# nothing else speaks against the batch.
_RAISED, _RAISED_FAR = 1.5, 10.0
# No optimizer learns at such a rate.
_NO_RATE = 1e3
# A loss that has grown so, from no less than the smallest that counts; and one next to which an infinity
# is no wonder.
_LOSS_GROWTH, _SMALLEST_LOSS = 1e6, 1e-3
_HUGE_LOSS = 1e15
# Other ranks that repeat the pass and do not agree: with them at least three know it.
_OTHERS = 2
# A scale that sinks so many times in a row is not trying out the range any more.
_HALVED = 10
# Below it a rank does not excuse an overflow.
_LOWEST_SCALE = 1.0


@dataclass(frozen=True, slots=True)
class Case:
    """What is known of an incident.

    Attributes:
        all_at_once: every rank was bad in the first round.
        single: there is one rank only.
        tie: several ranks share the first position.
        finite_on: other ranks that have repeated the pass, and to whom it gave finite gradients.
        by_clean_pass: that the replay repeated the pass is shown by a clean pass only, replayed likewise.
        flight: of the first rank.
    """

    cause: Cause | None
    first: Sighting
    all_at_once: bool
    judgement: Judgement | None
    flight: Flight | None
    single: bool = False
    tie: bool = False
    finite_on: tuple[int, ...] = ()
    by_clean_pass: bool = False

    @property
    def everywhere(self) -> bool:
        """Whether no rank is known that was not bad."""
        return self.single or self.all_at_once


def likely(case: Case) -> tuple[Guess, ...]:
    """The guesses that there is evidence for, the likeliest first; one that says so if there is none."""
    found = {rule: guess for rule in _RULES if (guess := rule(case)) is not None}
    guesses = list(found.values())
    if _EXPLAINS & found.keys():
        # What the data or an operator explains is no device's, nor the first weights'.
        guesses = [guess for guess in guesses if guess.kind not in _UNEXPLAINED]
    unique = {guess.kind: guess for guess in reversed(guesses)}
    return tuple(guess for guess in guesses if unique[guess.kind] is guess) or (
        _perhaps_domain(case) or _unknown(case),
    )


def _data(case: Case) -> Guess | None:
    if case.cause is not Cause.INPUT or is_part(case.first):
        return None
    samples = "" if case.first.batch is None else f" (tagged {case.first.batch:.80})"
    return Guess(
        LikelyKind.BAD_DATA,
        "the batch held non-finite numbers before the model saw it",
        f"Check that batch{samples} in the data pipeline, and refuse samples that are not finite.",
    )


def _started_so(case: Case) -> Guess | None:
    """Weights that no update had touched."""
    first = case.first
    initial = first.update is not None and first.update.initial
    begun = first.step if first.model_step is None else first.model_step
    # Weights that had been seen finite have become bad since.
    if case.cause is not Cause.PARAMETER or not (initial or (begun == 0 and first.finite_step is None)):
        return None
    return Guess(
        LikelyKind.INITIALISATION,
        "the weights were not finite before the first update: as they were initialised, or loaded",
        f"Check how {first.parameter or 'each of them'} is given its first values.",
    )


def _device(case: Case) -> Guess | None:
    """Proof only: the pass was repeated, and came out otherwise."""
    first = case.first
    if case.tie or case.cause not in _ARISEN:
        return None
    where = f"{first.device_id or first.device} of node {first.node}"
    if case.judgement is Judgement.ONLY_THERE and len(case.finite_on) >= _OTHERS:
        return Guess(
            LikelyKind.DEVICE,
            f"replayed on rank {first.rank} it went bad again, and {len(case.finite_on)} other ranks, given "
            "the same inputs and weights, repeated the pass and stayed finite",
            f"Take {where} out of the job and test its memory and arithmetic.",
        )
    if case.judgement is Judgement.TRANSIENT:
        compared = "a clean pass, replayed likewise," if case.by_clean_pass else "all else"
        return Guess(
            LikelyKind.DEVICE,
            f"replayed with the same weights, inputs and random numbers it stayed finite, and {compared} "
            "came out equal to the bit, so it was no fault of the data or the code",
            f"Watch whether {where} does it again; if it does, take it out.",
        )
    return None


def _explosion(case: Case) -> Guess | None:
    """A learning rate that cannot be meant, or a loss next to the end of the range."""
    if not case.everywhere:
        return None
    rates = _rates(case)
    if rates and rates[-1] >= _NO_RATE:
        return _no_rate(rates[-1])
    losses = [] if case.flight is None else _losses(case.flight)
    finite = [loss for loss in losses if math.isfinite(loss)]
    if not finite or abs(finite[-1]) < _HUGE_LOSS:
        return None
    then = "" if math.isfinite(losses[-1]) else f", and was {number(losses[-1])} then"
    return Guess(
        LikelyKind.EXPLODING_GRADIENTS,
        f"the loss had grown to {finite[-1]:.3g}{then}",
        "Clip the gradients, or lower the learning rate.",
    )


def _epsilon(case: Case) -> Guess | None:
    """An optimizer whose epsilon is nothing in the dtype of its state."""
    update = case.first.update
    if update is None or update.evidence is not UpdateEvidence.EPSILON:
        return None
    eps = "" if update.eps is None else f" of {update.eps:.3g}"
    return Guess(
        LikelyKind.PRECISION,
        f"the optimizer's eps{eps} is 0 in the dtype of the weights",
        "Keep the weights in fp32, and compute in the shorter dtype under autocast; or raise eps.",
    )


def _rate(case: Case) -> Guess | None:
    """An update by a learning rate that is no number."""
    update = case.first.update
    if update is None or update.evidence is not UpdateEvidence.LEARNING_RATE:
        return None
    return Guess(
        LikelyKind.HYPERPARAMETERS,
        f"the learning rate of {update.optimizer or 'the optimizer'} was not finite",
        "Look at the schedule: a warm-up or a cycle of no steps divides by 0.",
    )


def _collapse(case: Case) -> Guess | None:
    """A GradScaler has halved its scale for as long as could be excused, or to nothing: it did not help."""
    if case.flight is None:
        return None
    scales = [step.loss_scale for step in case.flight.steps if step.loss_scale is not None]
    halved = 0
    for before, after in itertools.pairwise(reversed(scales)):
        if after <= before:
            break
        halved += 1
    if halved >= _HALVED:
        sunk = f"had been lowered {halved} times in a row, to {scales[-1]:.3g}"
    elif scales and scales[-1] < _LOWEST_SCALE:
        sunk = f"has sunk to {scales[-1]:.3g}, which makes gradients smaller"
    else:
        return None
    return Guess(
        LikelyKind.PRECISION,
        f"the loss scale {sunk}, and gradients still overflow",
        "It is not the scale: find the operator that leaves the range of fp16, and compute it in fp32.",
    )


def _domain(case: Case) -> Guess | None:
    operator, name = _operator(case)
    name = name.removesuffix("_backward")
    if operator is None or not (name in DOMAIN or _is_at_zero(operator, name)):
        return None
    return _at_edge(operator)


def _perhaps_domain(case: Case) -> Guess | None:
    """A power whose exponent is not known."""
    operator, name = _operator(case)
    if operator is None or name != "pow" or power_of(operator) is not Power.MAYBE_EDGE:
        return None
    return _at_edge(operator)


def _at_edge(operator: Operator) -> Guess:
    return Guess(
        LikelyKind.DOMAIN,
        f"what {operator.name} was given is at the edge of what it is defined for",
        "Keep its input away from that edge: add a small epsilon or clamp it.",
    )


def _is_at_zero(operator: Operator, name: str) -> bool:
    """Whether zero is within the range of the input that must not be zero."""
    if name == "pow":
        return power_of(operator) is Power.EDGE
    place = EDGE_AT_ZERO.get(name)
    if place is None or place >= len(operator.inputs):
        return False
    return holds(operator.inputs[place], 0.0)


def _power(case: Case) -> Guess | None:
    """A power of finite numbers that its dtype cannot hold."""
    operator, name = _operator(case)
    if operator is None or name != "pow" or power_of(operator) is not Power.OVERFLOW:
        return None
    what = f"what {operator.name} gives of finite numbers"
    return _too_large(operator, name, what)


def _too_large(operator: Operator, name: str, what: str) -> Guess:
    """Of finite numbers, more than their dtype can hold: it is the dtype's fault if float32 holds it."""
    dtype = dtype_of(operator)
    if dtype == HALF and fits_float32(operator, name):
        return Guess(
            LikelyKind.PRECISION,
            f"{what} is more than {HALF} can hold, which ends at {LARGEST[HALF]:.0f}",
            "Compute it in fp32 or bf16.",
        )
    return Guess(
        LikelyKind.SATURATION,
        f"{what} is more than {dtype or 'its dtype'} can hold",
        "Bound its input, or use the form that works on logarithms.",
    )


def _saturation(case: Case) -> Guess | None:
    operator, name = _operator(case)
    if operator is None:
        return None
    tensors = [one for one in operator.inputs if not one.is_number]
    forward = name.removesuffix("_data").removesuffix("_backward")
    if forward in NORMALISING:
        # A mask leaves infinities in most rows, and a finite element in each.
        masked = any(one.nonfinite if one.empty_rows is None else one.empty_rows for one in tensors)
        # Beside what is normalised there are a scale, a shift and, on the way back, the gradient.
        place = 0 if forward == name else 1
        flat = any(one.min is not None and one.min == one.max for one in tensors[place : place + 1])
        if not (masked or flat):
            return None
        why = "was given rows that are masked as a whole" if masked else "had no spread left to normalise by"
        remedy = (
            "See to it that every row keeps at least one position that is not masked."
            if masked
            else "Raise its epsilon, or find out why its input is constant."
        )
        return Guess(LikelyKind.SATURATION, f"{operator.name} {why}", remedy)
    if name in EXPONENTIAL:
        top = top_of(operator, name)
        got = "" if top is None else f" of {top:.3g}"
        return _too_large(operator, name, f"{operator.name}{got}")
    return None


def _no_rate(rate: float) -> Guess:
    return Guess(
        LikelyKind.HYPERPARAMETERS,
        f"the learning rate had come to {rate:.3g}",
        "Lower the learning rate, or look at the schedule that made it so large.",
    )


def _rate_of_all(case: Case) -> Guess | None:
    """A learning rate that cannot be meant, where one rank was bad before the others."""
    rates = _rates(case)
    if case.everywhere or case.cause in _BEFORE or not rates or rates[-1] < _NO_RATE:
        return None
    # Where nothing changes at such a rate, it is not what made one rank bad.
    rose = rates[-1] >= min(rates) * _RAISED_FAR
    return _no_rate(rates[-1]) if rose or _growth(case) is not None else None


def _hyperparameters(case: Case) -> Guess | None:
    rates = _rates(case)
    if not case.everywhere or len(rates) < 2:  # noqa: PLR2004 - a change needs two
        return None
    lowest, raised = min(rates), _RAISED if case.all_at_once else _RAISED_FAR
    if lowest <= 0 or rates[-1] < lowest * raised:
        return None
    who = "all ranks went bad at once" if case.all_at_once else "it went bad"
    return Guess(
        LikelyKind.HYPERPARAMETERS,
        f"{who} after the learning rate had gone from {lowest:.3g} to {rates[-1]:.3g}",
        "Lower the learning rate, or warm it up more slowly.",
    )


def _loss_growth(case: Case) -> Guess | None:
    if not case.everywhere or case.flight is None:
        return None
    finite = [abs(loss) for loss in _losses(case.flight) if math.isfinite(loss)]
    if not finite or finite[-1] < _LOSS_GROWTH * max(min(finite), _SMALLEST_LOSS):
        return None
    return Guess(
        LikelyKind.EXPLODING_GRADIENTS,
        f"the loss had grown from {min(finite):.3g} to {finite[-1]:.3g} within {len(finite)} steps",
        "Clip the gradients, or lower the learning rate.",
    )


def _short_of_range(case: Case) -> Guess | None:
    """Sums and products of finite fp16 numbers that are more than fp16 can hold."""
    operator, name = _operator(case)
    if operator is None or name not in SUMMING or operator.value is Value.NAN:
        return None
    tensors = [one for one in operator.inputs if not one.is_number]
    if not tensors or any(one.nonfinite or one.dtype != HALF for one in tensors):
        return None
    return Guess(
        LikelyKind.PRECISION,
        f"what {operator.name} gives of finite numbers is more than {HALF} can hold, "
        f"which ends at {LARGEST[HALF]:.0f}",
        "Scale its inputs down before it, or compute it in fp32 or bf16.",
    )


def _precision(case: Case) -> Guess | None:
    flight, steps = case.flight, _finite_steps(case)
    if flight is None or not steps or flight.dtype not in {HALF, "bfloat16"}:
        return None
    top = max((step.magnitude for step in steps if step.magnitude is not None), default=0.0)
    if top < flight.dtype_max * _NEAR_MAXIMUM:
        return None
    return Guess(
        LikelyKind.PRECISION,
        f"gradients had come to {top:.3g}, and {flight.dtype} ends at {flight.dtype_max:.3g}",
        "Compute that part in fp32, or lower the loss scale.",
    )


def _growth(case: Case) -> Guess | None:
    steps = _finite_steps(case)
    magnitudes = [step.magnitude for step in steps if step.magnitude]
    if len(magnitudes) < 4:  # noqa: PLR2004 - fewer are no course
        return None
    usual, last = statistics.median(magnitudes[: len(magnitudes) // 2]), magnitudes[-1]
    if last < usual * _GROWTH:
        return None
    return Guess(
        LikelyKind.EXPLODING_GRADIENTS,
        f"its largest gradient had grown from {usual:.3g} to {last:.3g} within {len(magnitudes)} steps",
        "Clip the gradients, or lower the learning rate.",
    )


def _beginning(case: Case) -> Guess | None:
    first = case.first
    begun = first.step if first.model_step is None else first.model_step
    if begun > 0 or case.cause not in {Cause.FORWARD, Cause.LOSS, Cause.BACKWARD} or not case.all_at_once:
        return None
    return Guess(
        LikelyKind.INITIALISATION,
        f"all ranks went bad at step {first.step}, before anything was learned",
        "Check how the weights are initialised and the inputs are scaled.",
    )


# The likeliest first.
_RULES = (
    _started_so,
    _data,
    _device,
    _epsilon,
    _rate,
    _collapse,
    _explosion,
    _domain,
    _saturation,
    _power,
    _rate_of_all,
    _hyperparameters,
    _short_of_range,
    _precision,
    _growth,
    _loss_growth,
    _beginning,
)
_ARISEN = {None, Cause.FORWARD, Cause.LOSS, Cause.BACKWARD}
# It was there before any operator ran: an operator only spread it.
_BEFORE = {Cause.INPUT, Cause.PARAMETER, Cause.UPDATE}
_MADE_AGAIN = {Judgement.DETERMINISTIC, Judgement.REPEATED_THERE, Judgement.ONLY_THERE}
_EXPLAINS = {_data, _domain, _saturation, _power}
_UNEXPLAINED = {LikelyKind.DEVICE, LikelyKind.INITIALISATION}


def _unknown(case: Case) -> Guess:
    shared = case.tie or case.all_at_once
    if shared and case.judgement in _MADE_AGAIN:
        who = "all ranks" if case.all_at_once else "several ranks"
        return Guess(
            LikelyKind.UNKNOWN,
            f"{who} went bad in the same round, and replayed it went bad again",
            "Look at what they share, such as the learning rate, the weights and the code.",
        )
    if case.judgement is Judgement.DETERMINISTIC:
        return Guess(
            LikelyKind.UNKNOWN,
            "replayed, it went bad on another rank too, so it is the data or the code that makes it",
            "Run that batch through the model by itself.",
        )
    if case.judgement is Judgement.REPEATED_THERE:
        return Guess(
            LikelyKind.UNKNOWN,
            "replayed on that rank it went bad again, and no other rank is known to have repeated the pass, "
            "so what differs in that process cannot be excluded",
            "Run that batch through the model by itself, elsewhere.",
        )
    if case.judgement is Judgement.ONLY_THERE:
        return Guess(
            LikelyKind.UNKNOWN,
            "replayed, it went bad again only on that rank: its hardware, or what differs in that process",
            "Run that batch through the model by itself, there and elsewhere.",
        )
    return Guess(LikelyKind.UNKNOWN, "there is no evidence for any one cause", "")


def _operator(case: Case) -> tuple[Operator | None, str]:
    """The operator in which it began, and its bare name."""
    operator = case.first.operator
    if operator is None or operator.name is None or case.cause in _BEFORE:
        return None, ""
    return operator, bare_name(operator)


def _rates(case: Case) -> list[float]:
    """The learning rates of the updates before the bad round, and of the one that made weights bad.

    With a round the recorder keeps the rate of the update before it: that of the bad round made it.
    """
    steps = () if case.flight is None else case.flight.steps
    rates = [step.learning_rate for step in steps if step.learning_rate is not None]
    if case.first.update is not None and case.first.update.learning_rate is not None:
        rates.append(case.first.update.learning_rate)
    return rates


def _losses(flight: Flight) -> list[float]:
    return [step.loss for step in flight.steps if step.loss is not None]


def _finite_steps(case: Case) -> Sequence[FlightStep]:
    """The steps before the bad one, as far as their gradients were finite."""
    if case.flight is None:
        return ()
    return [
        step
        for step in case.flight.steps
        if step.round < case.flight.round and (step.magnitude is None or math.isfinite(step.magnitude))
    ]
