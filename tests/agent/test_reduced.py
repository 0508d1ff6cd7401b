"""What magnitudes tell: what only the reduction made non-finite, and how it came to a bad round."""

from __future__ import annotations

import json

import pytest
import torch

from tests.ranks import run_ranks
from tests.training.magnitudes import CASES, CHECK_EVERY, EXPLODING_STEPS, STEPS, TOO_FAST_FROM


@pytest.fixture(scope="module", params=["host", "device"])
def told(request, tmp_path_factory):
    """What each rank journalled, and its last progress."""
    spool = tmp_path_factory.mktemp("spool")
    every = {"GRADWATCH_REPLICA_CHECK_EVERY": str(CHECK_EVERY)}
    results = run_ranks("tests.training.magnitudes", 2, [request.param], spool=spool, **every)
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


def test_a_gradient_that_is_too_large_for_the_second_moment_is_said(told, request):
    case = "too large for Adam"
    if request.node.callspec.params["told"] == "device":
        pytest.skip("on a device without a guard it is not looked at")
    local = []
    for records in told:
        assert steps(records, case, "optimizer_state") == [3], "once per stretch, and not when it is clipped"
        (one,) = said(records, case, "optimizer_state")
        assert (one["optimizer"], one["skipped"], one["dtype"]) == ("Adam", False, "float32")
        assert one["parameters_total"] == 4
        assert (
            one["magnitude"] > one["limit"] == pytest.approx((torch.finfo(torch.float32).max / 0.001) ** 0.5)
        )
        assert said(records, case, "flight")[0]["round"] == one["round"]
        local.append(one["local_magnitude"])
    # Each tells its own share in it.
    assert local[0] < 1
    assert local[1] > 1e20


def test_a_model_that_has_gone_bad_hides_nothing_of_another_one(told, request):
    if request.node.callspec.params["told"] == "device":
        pytest.skip("on a device without a guard it is not looked at")
    for records in told:
        (one,) = said(records, "too large for Adam, beside a bad model", "optimizer_state")
        assert one["magnitude"] > one["limit"]


def test_a_parameter_that_differs_between_ranks_is_spelt_by_the_sums_that_differ(told):
    case = "diverging replica"
    ours, theirs = (said(records, case, "checksum") for records in told)
    assert [one["step"] for one in ours] == [one["step"] for one in theirs]
    assert len(ours) == (STEPS - 1) // CHECK_EVERY
    assert ours[0] == theirs[0]
    assert ours[0]["parameters"] == 12
    differ = [
        place
        for place, pair in enumerate(zip(ours[1]["sums"], theirs[1]["sums"], strict=True))
        if pair[0] != pair[1]
    ]
    # 1 + the bits of 8, the ordinal of "4.weight".
    assert differ == [0, 1 + 3]
    for records in told:
        assert said(records, "too large for Adam", "checksum")


def test_a_run_that_diverges_is_warned_of_before_its_first_bad_gradient(told):
    for records in told:
        (warning,) = said(records, "exploding", "exploding")
        bad = said(records, "exploding", "nonfinite")[0]
        (flight,) = said(records, "exploding", "flight")
        first = STEPS * [*CASES].index("exploding")
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
    bad_kinds = {"nonfinite", "reduced", "optimizer_state"}
    for records in told:
        bodies = [
            (kind, body) for record in records for kind, body in record.items() if isinstance(body, dict)
        ]
        for place, (kind, body) in enumerate(bodies):
            if kind == "flight":
                before = [(one["root"], one["round"]) for name, one in bodies[:place] if name in bad_kinds]
                assert before[-1] == (body["root"], body["round"])
