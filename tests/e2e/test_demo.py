"""`gradwatch demo`: the whole path, with a verdict that must be what was planted."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from gradwatch.cli.demo import faults, shards
from gradwatch.cli.demo.faults import Fault
from gradwatch.cli.demo.run import Outcome
from tests.cli.command import gradwatch
from tests.ranks import REPOSITORY


@pytest.mark.e2e
def test_the_demo_names_what_it_planted():
    result = gradwatch("demo", "--json", "--seed", 11)
    assert result.returncode == 0, result.stderr
    planted = faults.plant(11)
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
        "demo", "--json", "--seed", 3, "--fault", "recurring-nan", "--policy", policy, timeout=800
    )
    assert result.returncode == 0, result.stderr
    assert result.json["finite"]
    report = result.json["report"]
    assert {one["outcome"] for one in report["decisions"] if one["action"] == "rollback"} == {"performed"}
    first, *_ = result.json["report"]["incidents"]
    assert "The guard skipped the update" in " ".join(first["verdict"])
    assert report["generations"] >= 2


def test_one_bit_of_one_shard_is_damaged(tmp_path):
    planted = faults.plant(5)
    shards.write(tmp_path, planted, 5)
    size = 4 + shards.LENGTH + 1
    for rank in range(faults.RANKS):
        data = (tmp_path / f"shard-{rank}.bin").read_bytes()[12:]
        weights = [struct.unpack_from("<f", data, offset)[0] for offset in range(0, len(data), size)]
        odd = [index for index, weight in enumerate(weights) if weight != 1.0]
        assert odd == ([planted.step * faults.BATCH + planted.sample] if rank == planted.rank else [])
        assert all(weights[index] == float("inf") for index in odd)


def test_seeds_plant_in_different_places():
    assert len({(faults.plant(seed).rank, faults.plant(seed).step) for seed in range(40)}) > 20


@pytest.mark.e2e
def test_a_rank_whose_statistics_spread_a_nan_is_named_alone():
    result = gradwatch("demo", "--json", "--seed", 4, "--fault", "shared-statistics")
    assert result.returncode == 0, result.stderr
    incident = result.json["incident"]
    assert (incident["first"]["rank"], len(incident["origins"])) == (faults.plant(4).rank, 1)


@pytest.mark.e2e
def test_the_operator_of_a_broken_forward_pass_is_named():
    result = gradwatch("demo", "--json", "--seed", 6, "--fault", "log-of-zero")
    assert result.returncode == 0, result.stderr
    incident = result.json["incident"]
    assert incident["first"]["operator"] == "aten.log.default"
    # Every rank breaks on that batch.
    assert incident["judgement"] == "deterministic"


def test_a_policy_goes_with_faults_of_the_data_only():
    policy = REPOSITORY / "examples" / "demo-policy.yaml"
    result = gradwatch("demo", "--fault", "two-ranks", "--policy", policy)
    assert result.returncode == 2
    assert "faults of the data only" in result.stderr


def test_each_fault_says_what_it_is():
    says = {fault.says for fault in Fault}
    assert len(says) == len(Fault)
    assert not any(text.endswith(".") for text in says)


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (Fault.FLIPPED_BIT, "rank 2, step 9, parameter head.weight, cause input."),
        (Fault.TWO_RANKS, "ranks 2 and 3, step 9, parameter head.weight, cause backward."),
        (Fault.OVERFLOW_IN_THE_SUM, "all ranks, step 9, cause reduction."),
    ],
)
def test_what_was_planted_is_a_sentence(fault, sentence):
    assert faults.Planted(rank=2, step=9, sample=0, fault=fault).sentence == sentence


def at(rank: int | None, parameter: str | None = "head.weight", **fields: Any) -> dict[str, Any]:
    """An incident as the report has it: at step 9, of four ranks."""
    known: dict[str, Any] = {"step": 9, "cause": "input", "tie": False, "clean_ranks": [0, 1, 3]}
    first = None if rank is None else {"rank": rank, "parameter": parameter, **fields.pop("first", {})}
    return {**known, "first": first, **fields}


LOG = {"operator": "aten.log.default"}


@pytest.mark.parametrize(
    ("fault", "incident", "right"),
    [
        (Fault.FLIPPED_BIT, at(2), True),
        (Fault.FLIPPED_BIT, None, False),
        (Fault.FLIPPED_BIT, at(1), False),
        (Fault.FLIPPED_BIT, at(2, step=10), False),
        (Fault.FLIPPED_BIT, at(2, "norm.weight"), False),
        (Fault.FLIPPED_BIT, at(2, cause="forward"), False),
        (Fault.FLIPPED_BIT, at(None), False),
        (Fault.FLIPPED_BIT, at(2, clean_ranks=[0, 1]), False),
        (Fault.FLIPPED_BIT, at(2, tie=True), False),
        (Fault.MICRO_BATCH, at(2, first={"microbatch": 2}), True),
        (Fault.MICRO_BATCH, at(2, first={"microbatch": 1}), False),
        (Fault.LOG_OF_ZERO, at(2, cause="forward", first=LOG), True),
        (Fault.LOG_OF_ZERO, at(2, cause="forward"), False),
        (Fault.TWO_RANKS, at(2, cause="backward", tie=True, clean_ranks=[0, 1]), True),
        (Fault.TWO_RANKS, at(2, cause="backward", tie=False, clean_ranks=[0, 1]), False),
        # Seen one step after it is planted.
        (Fault.LEARNING_RATE, at(0, cause="forward", tie=True, clean_ranks=[], step=10), True),
        (Fault.LEARNING_RATE, at(0, cause="forward", tie=True, clean_ranks=[]), False),
        # Seen when the replicas are compared.
        (Fault.DIVERGED_REPLICA, at(2, "blocks.1.up.weight", cause="replica_divergence", step=10), True),
        (Fault.DIVERGED_REPLICA, at(2, "blocks.1.up.weight", cause="replica_divergence"), False),
        (Fault.OVERFLOW_IN_THE_SUM, at(None, cause="reduction", clean_ranks=[]), True),
        (Fault.OVERFLOW_IN_THE_SUM, at(2, cause="reduction"), False),
        (Fault.LOSS_SCALE, None, True),
        (Fault.LOSS_SCALE, at(2), False),
    ],
)
def test_a_wrong_verdict_is_not_passed_off_as_right(fault, incident, right):
    planted = faults.Planted(rank=2, step=9, sample=0, fault=fault)
    report = {"incidents": [] if incident is None else [incident]}
    assert Outcome(planted, incident, report, "", []).correct is right
