"""When is a gradient, finite still, far beyond what it usually is."""

from __future__ import annotations

import math
import random

import pytest
import torch

from gradwatch.agent.probe.early_warning import Limits, alarms, grown
from gradwatch.agent.probe.parameters import ParameterInfo
from gradwatch.agent.probe.recorder import BYTES, ROUNDS, TOLD, Recorder, RoundFacts

LIMITS = Limits()
STEADY = [1.0, 2.0, 1.5, 0.8, 1.1, 1.3, 2.2, 0.9, 1.0, 1.7]
CLIMB = [1.0] * 8 + [30.0, 100.0, 400.0, 900.0]


@pytest.mark.parametrize(
    ("before", "now", "warns"),
    [
        # A leap: a thousand times the median, and a hundred times all that there was.
        (STEADY, 5e3, True),
        (STEADY, 500.0, False),
        # It has been that large before.
        ([*STEADY, 200.0], 5e3, False),
        # Too little is known, as in the first steps.
        (STEADY[:7], 1e9, False),
        # A steady climb, though each round is but a few times the one before.
        (CLIMB, 2e3, True),
        ([*CLIMB[:-1], 90.0], 2e3, False),
        # What was not finite takes no part, and poisons nothing.
        ([math.nan, math.inf, *STEADY], 5e3, True),
        ([math.nan, math.inf, *STEADY], 500.0, False),
        ([math.nan] * 10, 5e3, False),
        # A parameter whose gradient is usually zero.
        ([0.0] * 20 + STEADY, 5e3, False),
        ([0.0, *STEADY], 5e3, True),
        # One that varies by itself as much.
        ([10.0 ** (7 * place % 5) for place in range(20)], 5e6, False),
        # Over at once: there is nothing to warn of.
        (STEADY, math.inf, False),
        (STEADY, math.nan, False),
    ],
)
def test_when_it_warns(before, now, warns):
    history = torch.tensor(before, dtype=torch.float64).unsqueeze(1)
    growth = grown(history, torch.tensor([now], dtype=torch.float64), LIMITS)
    assert (growth is not None) == warns
    if growth is not None:
        assert growth.places == [0]
        assert growth.usual == pytest.approx(
            sorted(one for one in before if 0 < one < math.inf)[
                (len([one for one in before if 0 < one < math.inf]) - 1) // 2
            ]
        )
        # What is looked at first does not hide it.
        assert now > alarms(history, LIMITS)[0]


def test_one_small_parameter_that_grows_alone_is_no_explosion():
    history = torch.tensor([[1.0, 1e-9]] * 10, dtype=torch.float64)
    assert grown(history, torch.tensor([1.0, 1e-4], dtype=torch.float64), LIMITS) is None
    assert grown(history, torch.tensor([50.0, 1e-4], dtype=torch.float64), LIMITS) is None
    assert grown(history, torch.tensor([1e4, 1e-4], dtype=torch.float64), LIMITS).places == [1, 0]


def info(name="a.weight"):
    return ParameterInfo(name, "a", "Linear", (2, 2), "float32")


def play(magnitudes, scales=None):
    """The rounds in which a recorder warns."""
    recorder = Recorder(0, {7: info()})
    warned = []
    for round_, magnitude in enumerate(magnitudes):
        recorder.add(
            RoundFacts(round_, round_, loss_scale=scales[round_] if scales else None), {7: magnitude}
        )
        warning = recorder.exploding()
        if warning is not None:
            warned.append(warning["round"])
    return warned


def test_it_warns_once_until_all_is_normal_again():
    assert play([1.0] * 20 + [1e5] * 10 + [1.0] * 20 + [1e8]) == [20, 50]


def test_a_small_gradient_warns_though_others_are_much_larger():
    recorder = Recorder(0, {1: info("a"), 2: info("b")})
    for round_ in range(21):
        # The largest grows, too: it takes that for a warning.
        grown_now = round_ == 20
        recorder.add(RoundFacts(round_, round_), {1: 1e6 if grown_now else 1e-4, 2: 1e3})
        warning = recorder.exploding()
    assert warning["parameter"] == "a"


def test_a_new_normal_is_normal():
    assert play([1.0] * 20 + [1e5] * 100 + [1e10]) == [20, 120]


def test_a_growing_loss_scale_is_no_growth():
    scales = [2.0**place for place in range(40)]
    assert play(scales, scales) == []
    assert play(scales) != []


def test_noise_over_many_rounds_is_no_explosion():
    draw = random.Random(3)
    assert play([10 ** draw.gauss(0, 0.5) for _ in range(5000)]) == []


@pytest.mark.parametrize(
    ("magnitudes", "loss_scale", "largest"),
    [
        ({1: 2.0, 2: 8.0}, None, 8.0),
        ({1: 2.0, 2: 8.0}, 4.0, 2.0),
        ({1: 2.0, 2: math.inf}, None, None),
        ({1: 2.0, 2: math.nan}, None, None),
        ({}, None, 0.0),
    ],
)
def test_the_largest_of_the_newest_round(magnitudes, loss_scale, largest):
    recorder = Recorder(0, {1: info("a"), 2: info("b")})
    assert recorder.largest() is None
    recorder.add(RoundFacts(0, 0), {1: 1e9})
    recorder.add(RoundFacts(1, 1, loss_scale=loss_scale), magnitudes)
    assert recorder.largest() == largest


def test_memory_is_bounded_however_many_parameters_there_are():
    infos = {key: info(f"layer{key}.weight") for key in range(200_000)}
    recorder = Recorder(0, infos)
    assert recorder.nbytes < 1.5 * BYTES
    for round_ in range(10):
        recorder.add(RoundFacts(round_, round_), dict.fromkeys(infos, 1.0))
        assert recorder.exploding() is None
    flight = recorder.flight()
    assert (len(flight["parameters"]), len(flight["steps"])) == (TOLD, BYTES // 8 // 200_000)
    recorder = Recorder(0, {})
    recorder.add(RoundFacts(0, 0), {})
    assert (recorder.exploding(), recorder.flight()) == (None, None)


def test_a_flight_tells_the_bad_ones_and_those_that_grew_most_in_the_order_of_the_model():
    infos = {key: info(f"layer{key}.weight") for key in range(40)}
    recorder = Recorder(3, infos)
    for round_ in range(50):
        recorder.add(RoundFacts(round_, round_ + 5, loss=0.5, learning_rate=0.1), dict.fromkeys(infos, 1.0))
    last = dict.fromkeys(infos, 1.0) | {35: math.nan, 20: 9.0, 39: 8.0} | {38: 0.0}
    recorder.add(RoundFacts(50, 55, loss=math.inf), last)
    flight = recorder.flight()
    assert (flight["root"], flight["round"], flight["step"], flight["dtype"]) == (3, 50, 55, "float32")
    assert flight["dtype_max"] == torch.finfo(torch.float32).max
    assert len(flight["steps"]) == ROUNDS
    assert [step["round"] for step in flight["steps"]] == [*range(50 - ROUNDS + 1, 51)]
    names = flight["parameters"]
    assert len(names) == TOLD
    assert names[-2:] == ["layer35.weight", "layer39.weight"]
    assert "layer20.weight" in names
    assert "layer38.weight" not in names
    assert flight["steps"][0] == {
        "round": 19,
        "step": 24,
        "loss": 0.5,
        "learning_rate": 0.1,
        "magnitude": 1.0,
        "magnitudes": [1.0] * TOLD,
    }
    newest = flight["steps"][-1]
    assert math.isnan(newest["magnitude"])
    assert math.isnan(newest["magnitudes"][-2])
    assert newest["magnitudes"][-1] == 8.0
    assert "learning_rate" not in newest
