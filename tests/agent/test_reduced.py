"""What magnitudes tell: what only the reduction made non-finite, and how it came to a bad round."""

from __future__ import annotations

import json

import pytest

from tests.ranks import run_ranks
from tests.training.magnitudes import CASES, EXPLODING_STEPS, STEPS, TOO_FAST_FROM


@pytest.fixture(scope="module", params=["host", "device"])
def told(request, tmp_path_factory):
    """What each rank journalled, and its last progress."""
    spool = tmp_path_factory.mktemp("spool")
    results = run_ranks("tests.training.magnitudes", 2, [request.param], spool=spool)
    assert not any("gradwatch:" in result.output for result in results), results[0].output
    return [
        [json.loads(line) for line in journal.read_text().splitlines()]
        for journal in sorted(spool.glob("rank*.jsonl"))
    ]


def said(records, case, kind):
    root = [*CASES].index(case)
    return [record[kind] for record in records if kind in record and record[kind]["root"] == root]


def steps(records, case, kind="reduced"):
    first = STEPS * [*CASES].index(case)
    return [record["round"] - first for record in said(records, case, kind)]


def test_what_the_reduction_made_is_said_by_every_rank_once_per_stretch(told):
    for records in told:
        assert steps(records, "in the reduction") == [2, 6]
        assert steps(records, "in the reduction, of one rank") == [2]
        assert not said(records, "in the reduction", "nonfinite")
        first = said(records, "in the reduction", "reduced")[0]
        assert first["gradients_total"] == len(first["gradients"]) == 4
        assert first["gradients"][0]["parameter"] == "0.weight"
        assert "backward_position" not in first["gradients"][0]
        assert "loss_scale_overflow" not in first


def test_the_rank_that_was_bad_before_the_reduction_says_so_and_no_more(told):
    case = "before the reduction"
    assert (steps(told[0], case, "nonfinite"), steps(told[0], case)) == ([], [3])
    assert (steps(told[1], case, "nonfinite"), steps(told[1], case)) == ([3], [])


def test_an_overflow_of_a_scaled_loss_is_excused(told):
    for records in told:
        (one,) = said(records, "of a scaled loss", "reduced")
        assert one["loss_scale_overflow"]
        assert not said(records, "of a scaled loss", "flight"), "it is no fault"


def test_a_run_that_diverges_is_warned_of_before_its_first_bad_gradient(told):
    for records in told:
        (warning,) = said(records, "exploding", "exploding")
        bad = said(records, "exploding", "nonfinite")[0]
        (flight,) = said(records, "exploding", "flight")
        first = STEPS * (len(CASES) - 1)
        assert TOO_FAST_FROM < warning["round"] - first < bad["round"] - first < EXPLODING_STEPS
        assert warning["magnitude"] > 1e3 * warning["usual"]
        assert warning["parameters_total"] >= 1
        assert warning["parameter"] in flight["parameters"]
        # How it came to it: layer by layer, with loss and learning rate.
        assert (flight["round"], flight["step"]) == (bad["round"], bad["step"])
        assert [step["round"] for step in flight["steps"]] == [*range(first, bad["round"] + 1)]
        assert len(flight["parameters"]) == 6
        assert all(len(step["magnitudes"]) == 6 for step in flight["steps"])
        assert flight["steps"][-1]["magnitude"] in ("NaN", "Infinity")
        warned = next(step for step in flight["steps"] if step["round"] == warning["round"])
        place = flight["parameters"].index(warning["parameter"])
        assert warned["magnitudes"][place] == pytest.approx(warning["magnitude"], rel=1e-4)
        assert flight["steps"][5]["loss"] < warned["loss"]
        rates = [step.get("learning_rate") for step in flight["steps"]]
        assert rates[10] == 1e-3
        assert rates[-1] == 2.0


def test_each_flight_comes_after_the_record_of_its_round(told):
    for records in told:
        for place, record in enumerate(records):
            if "flight" in record:
                before = [next(iter(one.keys() - {"seq", "at"})) for one in records[:place]]
                rounds = [
                    one[kind]["round"]
                    for one, kind in zip(records, before, strict=False)
                    if "nonf" in kind or kind == "reduced"
                ]
                assert record["flight"]["round"] == rounds[-1]
