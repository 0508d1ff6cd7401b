"""`gradwatch demo`: the whole path, with a verdict that must be what was planted."""

from __future__ import annotations

import struct

import pytest

from gradwatch.cli.demo import shards
from gradwatch.cli.demo.run import Outcome
from tests.cli.command import gradwatch
from tests.ranks import REPOSITORY


@pytest.mark.e2e
def test_the_demo_names_what_it_planted():
    result = gradwatch("demo", "--json", "--seed", 11)
    assert result.returncode == 0, result.stderr
    planted = shards.plant(11)
    first = result.json["incident"]["first"]
    assert (first["rank"], first["step"], first["parameter"]) == (
        planted.rank,
        planted.step,
        planted.parameter,
    )
    assert any(line.startswith("gradwatch_incidents_total") for line in result.json["metrics"])


@pytest.mark.e2e
def test_under_its_policy_the_demo_skips_then_rolls_back_and_ends_finite():
    policy = REPOSITORY / "examples" / "demo-policy.yaml"
    result = gradwatch(
        "demo", "--json", "--seed", 3, "--fault", "recurring-nan", "--policy", policy, timeout=400
    )
    assert result.returncode == 0, result.stderr
    assert result.json["finite"]
    report = result.json["report"]
    assert {one["outcome"] for one in report["decisions"] if one["action"] == "rollback"} == {"performed"}
    first, *_ = result.json["report"]["incidents"]
    assert "The guard skipped the update" in " ".join(first["verdict"])
    assert report["generations"] >= 2


def test_one_bit_of_one_shard_is_damaged(tmp_path):
    planted = shards.plant(5)
    shards.write(tmp_path, planted, 5)
    size = 4 + shards.LENGTH + 1
    for rank in range(shards.RANKS):
        data = (tmp_path / f"shard-{rank}.bin").read_bytes()[12:]
        weights = [struct.unpack_from("<f", data, offset)[0] for offset in range(0, len(data), size)]
        odd = [index for index, weight in enumerate(weights) if weight != 1.0]
        assert odd == ([planted.step * shards.BATCH + planted.sample] if rank == planted.rank else [])
        assert all(weights[index] == float("inf") for index in odd)


def test_seeds_plant_in_different_places():
    assert len({(shards.plant(seed).rank, shards.plant(seed).step) for seed in range(40)}) > 20


PLANTED = shards.Planted(rank=2, step=9, sample=0)
RIGHT = {
    "first": {"rank": 2, "step": 9, "parameter": "head.weight"},
    "clean_ranks": [0, 1, 3],
    "tie": False,
}


@pytest.mark.parametrize(
    ("incident", "correct"),
    [
        (RIGHT, True),
        (None, False),
        ({**RIGHT, "first": {**RIGHT["first"], "rank": 1}}, False),
        ({**RIGHT, "first": {**RIGHT["first"], "step": 10}}, False),
        ({**RIGHT, "first": {**RIGHT["first"], "parameter": "norm.weight"}}, False),
        ({**RIGHT, "first": None}, False),
        ({**RIGHT, "clean_ranks": [0, 1]}, False),
        ({**RIGHT, "tie": True}, False),
    ],
)
def test_a_wrong_verdict_is_not_passed_off_as_right(incident, correct):
    report = {"incidents": [] if incident is None else [incident]}
    assert Outcome(PLANTED, incident, report, "", []).correct is correct
