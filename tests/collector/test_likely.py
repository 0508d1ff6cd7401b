"""What is likely to be behind an incident: what is known, and the guess that follows."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from gradwatch.collector import document
from gradwatch.collector import observations as obs
from gradwatch.collector.model import LikelyKind
from gradwatch.collector.observations import Phase
from tests.collector.bodies import GROWING, autopsy, bad_on, flight, reduced, told_of
from tests.collector.history import Told, nonfinite

NO_EDGE = [
    ("aten.pow.Tensor_Scalar", [(1.0, 3e30)]),
    ("aten.div.Tensor", [(0.0, 1.0), (1e-40, 1e-39)]),
    ("aten.native_layer_norm.default", [(1.0, 3e30)]),
]


EDGE = [
    ("aten.div.Tensor", [(0.0, 1.0), (0.0, 3.0)], LikelyKind.DOMAIN),
    ("aten.pow.Tensor_Scalar", [(-1.0, 2.0)], LikelyKind.DOMAIN),
    ("aten.log.default", [], LikelyKind.DOMAIN),
    ("aten.native_layer_norm.default", [(2.0, 2.0)], LikelyKind.SATURATION),
]


@pytest.mark.parametrize(
    ("operator", "ranges", "kind"), [*((*one, LikelyKind.UNKNOWN) for one in NO_EDGE), *EDGE]
)
def test_what_an_operator_was_given_tells_whether_it_is_at_an_edge(operator, ranges, kind):
    inputs = tuple(obs.OperatorInput("float32", (4,), low, high, 0) for low, high in ranges)
    told = bad_on(1, autopsy(1, 5, obs.Replay.REPRODUCED, operator=operator, inputs=inputs))
    guess = told.incident.verdict.likely[0]
    assert guess.kind is kind
    if kind is LikelyKind.UNKNOWN:
        # Nobody else has tried.
        assert "what differs in that process cannot be excluded" in told.incident.verdict.sentences[-1]


STEADY = [1.0, 1.1, 0.9, 1.0, 1.2, 1.0, 0.8, math.nan]


LIKELY = [
    (GROWING, None, LikelyKind.EXPLODING_GRADIENTS),
    (STEADY, None, LikelyKind.UNKNOWN),
    (STEADY, [0.1] * 6 + [1.0, 1.0], LikelyKind.HYPERPARAMETERS),
]


@pytest.mark.parametrize(("magnitudes", "rates", "kind"), LIKELY)
def test_the_course_of_the_gradients_tells_what_is_likely(magnitudes, rates, kind):
    told = Told().hellos(2)
    for rank in range(2):
        told.tell(*told_of(rank, 20, nonfinite(20, phase=obs.Phase.FORWARD), flight(20, magnitudes, rates)))
    verdict = told.incident.verdict
    assert verdict.likely[0].kind is kind
    described = document.incident(told.incident)
    assert described.flight.steps[-1].magnitude == "NaN"
    assert "NaN" in described.model_dump_json()


def test_a_loss_scale_that_has_collapsed_is_told():
    course = flight(20, [1.0] + [math.inf] * 17)
    steps = tuple(replace(step, loss_scale=65536.0 / 2**place) for place, step in enumerate(course.steps))
    told = Told().hellos(1)
    told.tell(*told_of(0, 20, nonfinite(20, phase=obs.Phase.BACKWARD), replace(course, steps=steps)))
    assert told.incident.verdict.sentences[-1].startswith(
        "Likely precision: the loss scale had been lowered 17 times in a row, to 0.5"
    )


def test_a_loss_scale_that_has_sunk_to_nothing_is_told():
    course = flight(20, [1.0, 1.0, math.inf, 1.0, math.inf])
    scales = (2.0, 2.0, 1.0, 1.0, 0.5)
    steps = tuple(replace(step, loss_scale=scale) for step, scale in zip(course.steps, scales, strict=True))
    told = Told().hellos(1)
    told.tell(*told_of(0, 20, nonfinite(20, phase=obs.Phase.BACKWARD), replace(course, steps=steps)))
    assert told.incident.verdict.sentences[-1].startswith(
        "Likely precision: the loss scale has sunk to 0.5, which makes gradients smaller, and gradients still"
    )


HALF = obs.OperatorInput("float16", (8, 8), -563.0, 521.0, 0)


NEGATIVE = obs.OperatorInput("float32", (4,), -0.99, -0.2, 0)


# What an operator was given and gave, and what is likely then.
BY_RANGE = [
    ("aten.bmm.default", [HALF, HALF], obs.Value.POSITIVE_INFINITY, LikelyKind.PRECISION),
    ("aten.mul.Tensor", [HALF, HALF], obs.Value.NEGATIVE_INFINITY, LikelyKind.PRECISION),
    (
        "aten.bmm.default",
        [replace(HALF, dtype="float32")] * 2,
        obs.Value.POSITIVE_INFINITY,
        LikelyKind.UNKNOWN,
    ),
    ("aten.bmm.default", [HALF, HALF], obs.Value.NAN, LikelyKind.UNKNOWN),
    ("aten.bmm.default", [replace(HALF, nonfinite=1), HALF], obs.Value.POSITIVE_INFINITY, LikelyKind.UNKNOWN),
    ("aten.pow.Tensor_Scalar", [NEGATIVE], obs.Value.NAN, LikelyKind.DOMAIN),
    ("aten.pow.Tensor_Scalar", [NEGATIVE], obs.Value.POSITIVE_INFINITY, LikelyKind.UNKNOWN),
]


def number(value: float) -> obs.OperatorInput:
    return obs.OperatorInput("int" if isinstance(value, int) else "float", (), value, value, 0)


FIFTH = obs.OperatorInput("float16", (6, 16), -45.4, 23.4, 0)
WIDE = replace(FIFTH, dtype="float32")
POSITIVE, ANY = replace(WIDE, min=0.5), obs.OperatorInput("float32", (6, 16), 0.5, 2.5, 0)
BY_EXPONENT = [
    # The fourth power of 45 is finite, and more than float16 can hold.
    ([FIFTH, number(4)], obs.Value.POSITIVE_INFINITY, LikelyKind.PRECISION),
    ([FIFTH, number(4.0)], obs.Value.NAN, LikelyKind.PRECISION),
    ([FIFTH, number(2)], obs.Value.POSITIVE_INFINITY, LikelyKind.UNKNOWN),
    ([FIFTH, number(40)], obs.Value.POSITIVE_INFINITY, LikelyKind.SATURATION),
    ([WIDE, number(40)], obs.Value.POSITIVE_INFINITY, LikelyKind.SATURATION),
    ([WIDE, number(4)], obs.Value.NAN, LikelyKind.UNKNOWN),
    ([replace(POSITIVE, min=1e-30), number(-2)], obs.Value.POSITIVE_INFINITY, LikelyKind.SATURATION),
    # Zero has no power below 0, and what is negative has whole ones only.
    ([WIDE, number(-1)], obs.Value.POSITIVE_INFINITY, LikelyKind.DOMAIN),
    ([replace(WIDE, min=0.0), number(-0.5)], obs.Value.POSITIVE_INFINITY, LikelyKind.DOMAIN),
    ([replace(WIDE, min=0.0), number(0.5)], obs.Value.POSITIVE_INFINITY, LikelyKind.UNKNOWN),
    ([WIDE, number(0.5)], obs.Value.NAN, LikelyKind.DOMAIN),
    ([WIDE, ANY], obs.Value.NAN, LikelyKind.DOMAIN),
    ([POSITIVE, ANY], obs.Value.NAN, LikelyKind.UNKNOWN),
    ([number(2.0), replace(ANY, max=200.0)], obs.Value.POSITIVE_INFINITY, LikelyKind.SATURATION),
]
BY_RANGE += [("aten.pow.Tensor_Scalar", *row) for row in BY_EXPONENT]


@pytest.mark.parametrize(
    ("name", "dtype", "top", "because"),
    [
        (
            "exp",
            "float16",
            14.2,
            "precision: aten.exp.default of 14.2 is more than float16 can hold, which ends",
        ),
        ("exp", "float16", 99.0, "saturation: aten.exp.default of 99 is more than float16 can hold. Bound"),
        ("exp2", "float16", 99.0, "precision: aten.exp2.default of 99 is more than float16 can hold, which"),
        ("exp", "float32", 99.0, "saturation: aten.exp.default of 99 is more than float32 can hold. Bound"),
        ("cosh", "float16", 3.0, "precision: aten.cosh.default of -20 is more than float16 can hold, which"),
    ],
)
def test_an_exponential_goes_by_the_dtype_of_what_it_was_given(name, dtype, top, because):
    given = obs.OperatorInput(dtype, (6, 16), -20.0, top, 0)
    found = autopsy(
        1, 5, obs.Replay.REPRODUCED, operator=f"aten.{name}.default", inputs=(given,), value=obs.Value.NAN
    )
    # The gradient's dtype is another one.
    assert f"Likely {because}" in text(bad_on(1, found))


@pytest.mark.parametrize(("name", "inputs", "value", "kind"), BY_RANGE)
def test_what_the_range_of_the_input_makes_likely(name, inputs, value, kind):
    found = replace(
        autopsy(1, 5, obs.Replay.REPRODUCED), operator=name, inputs=tuple(inputs), value=value, module=None
    )
    told = Told().hellos(2).tell(*told_of(1, 5, nonfinite(5, phase=obs.Phase.FORWARD), found), *told_of(0, 5))
    assert told.incident.verdict.likely[0].kind is kind


def on_one(*bodies: obs.Body) -> Told:
    return Told().hellos(2).tell(*told_of(0, 5, reduced(5)), *told_of(1, 5, *bodies))


def text(told: Told) -> str:
    return " ".join(document.incident(told.incident).verdict)


def course(losses: list[float], rates: list[float] | None = None) -> obs.Flight:
    known = flight(20, [1.0] * (len(losses) - 1) + [math.nan], rates)
    steps = tuple(replace(step, loss=loss) for step, loss in zip(known.steps, losses, strict=True))
    return replace(known, steps=steps)


CALM = [2.0, 1.0, 0.5, 0.4]


EXPLODING, HYPER, UNKNOWN = LikelyKind.EXPLODING_GRADIENTS, LikelyKind.HYPERPARAMETERS, LikelyKind.UNKNOWN


# The losses and learning rates of one process until it was bad, and what is likely.
COURSES = [
    ([2.0, 3e7, 4.9e19, math.inf], None, EXPLODING),
    ([2.0, 2e15, 3e17, math.nan], None, EXPLODING),
    ([2.0, 9.0, 4e3, 8e6], None, EXPLODING),
    (CALM, [1e30] * 4, HYPER),
    (CALM, [0.1, 0.1, 2e3, 2e3], HYPER),
    (CALM, [0.1, 0.1, 1.0, 1.0], HYPER),
    # The rate that comes with a round is that of the update before it: this one made the round bad.
    (CALM, [0.1, 0.1, 0.1, 2e3], HYPER),
    (CALM, [1e-3, 1e-3, 1e-3, 0.5], HYPER),
    # A loss that was near nothing has not exploded.
    ([1e-9, 1e-4, 1e-2, 0.5], None, UNKNOWN),
    ([2.0, 1.0, 0.5, math.inf], None, UNKNOWN),
    (CALM, [0.1, 0.1, 0.2, 0.3], UNKNOWN),
    (CALM, [1e-3] * 4, UNKNOWN),
]


@pytest.mark.parametrize(("losses", "rates", "kind"), COURSES)
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_run_that_explodes(losses, rates, kind, world_size):
    told = Told().hellos(world_size)
    for rank in range(world_size):
        bad = nonfinite(20, phase=Phase.BACKWARD, model_step=20)
        told.tell(*told_of(rank, 20, bad, course(losses, rates)))
    # Half as much again is told of all ranks, not of one process.
    expected = HYPER if rates == [0.1, 0.1, 0.2, 0.3] and world_size > 1 else kind
    assert told.incident.verdict.likely[0].kind is expected


def test_one_rank_of_several_does_not_explode_by_the_learning_rate():
    told = on_one(nonfinite(5, phase=Phase.BACKWARD), replace(course(CALM, [1e30] * 4), round=5))
    assert told.incident.verdict.likely[0].kind is LikelyKind.UNKNOWN


# The gradients and learning rates of the first of two ranks until it was bad, and what is likely: a rate
# that cannot be meant says nothing where it has long been so and nothing has changed.
RATES_OF_ONE = [
    ([1.07, 6.6, 2e5, 9e28, math.nan], [0.03, 0.9, 27.0, 810.0, 24300.0], HYPER),
    ([1.0, 1.0, 1.0, 1.0, math.nan], [0.1, 0.1, 0.1, 0.1, 3e20], HYPER),
    ([1.0, 1.0, 3e4, 9e5, math.nan], [3e3] * 5, HYPER),
    ([1.0, 1.0, 1.0, 1.0, math.nan], [3e3] * 5, UNKNOWN),
    ([1.0, 1.0, 1.0, 1.0, math.nan], [0.1, 0.1, 0.1, 0.1, 2.0], UNKNOWN),
]


@pytest.mark.parametrize(("magnitudes", "rates", "kind"), RATES_OF_ONE)
def test_a_rate_that_cannot_be_meant_is_named_where_one_rank_was_bad_first(magnitudes, rates, kind):
    told = on_one(nonfinite(5, phase=Phase.BACKWARD), flight(5, magnitudes, rates))
    assert told.incident.verdict.likely[0].kind is kind


def test_bad_data_comes_before_a_rate_that_cannot_be_meant():
    told = on_one(nonfinite(5, phase=Phase.INPUT), flight(5, [1.0] * 5, [0.1] * 4 + [3e20]))
    assert [guess.kind for guess in told.incident.verdict.likely] == [LikelyKind.BAD_DATA]


@pytest.mark.parametrize("by_rank", [0, 1])
def test_no_single_process_is_suspected_where_all_ranks_share_the_place(by_rank):
    told = Told().hellos(2)
    for rank in range(2):
        bad = [nonfinite(20, phase=Phase.FORWARD, model_step=20), flight(20, [1.0] * 5)]
        if rank == by_rank:
            bad.append(autopsy(0, 20, obs.Replay.REPRODUCED, operator="aten.addmm.default", inputs=()))
        told.tell(*told_of(rank, 20, *bad))
    assert told.incident.verdict.tie
    assert "that process" not in text(told)
    assert "that batch" not in text(told)
    assert "All ranks went bad in the same round, and replayed it went bad again. Look at what they" in text(
        told
    )


NORM = [obs.OperatorInput("float32", (4, 8), -2.0, 2.0, 0), obs.OperatorInput("float32", (8,), 1.0, 1.0, 0)]


EPS = obs.OperatorInput("float", (), 1e-5, 1e-5, 0)


MASKED = obs.OperatorInput("float32", (4, 8), -2.0, 2.0, 6)


CONSTANTS = [
    # A mask leaves something in each row, or it does not; and that may not be known.
    ("aten._softmax.default", [replace(MASKED, empty_rows=0)], LikelyKind.UNKNOWN),
    ("aten._softmax.default", [replace(MASKED, empty_rows=1)], LikelyKind.SATURATION),
    ("aten._softmax.default", [MASKED], LikelyKind.SATURATION),
    # A scale of ones, and an epsilon, are no input without spread.
    ("aten.native_layer_norm.default", [*NORM, EPS], LikelyKind.UNKNOWN),
    ("aten.native_layer_norm.default", [replace(NORM[0], min=3.0, max=3.0), EPS], LikelyKind.SATURATION),
    # A divisor that is the number 0 is one.
    ("aten.div.Tensor", [NORM[0], obs.OperatorInput("int", (), 0.0, 0.0, 0)], LikelyKind.DOMAIN),
    ("aten.div.Tensor", [obs.OperatorInput("float", (), 0.0, 0.0, 0), NORM[1]], LikelyKind.UNKNOWN),
]


@pytest.mark.parametrize(("operator", "inputs", "kind"), CONSTANTS)
def test_constants_among_what_an_operator_was_given(operator, inputs, kind):
    found = autopsy(1, 5, obs.Replay.REPRODUCED, operator=operator, inputs=tuple(inputs))
    told = on_one(nonfinite(5, phase=Phase.FORWARD), found)
    assert told.incident.verdict.likely[0].kind is kind
    assert "1e-05" not in text(told)
