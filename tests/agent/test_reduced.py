"""Gradients that are finite on a rank and not after the reduction: said once, with their names."""

from __future__ import annotations

import json

import pytest

from tests.ranks import run_ranks
from tests.training.magnitudes import CASES, STEPS


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
