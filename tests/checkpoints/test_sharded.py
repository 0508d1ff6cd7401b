"""Checkpoints of a model that is sharded over two real ranks."""

from __future__ import annotations

import pytest

from gradwatch.agent.checkpoints import find, listing
from gradwatch.agent.checkpoints.look import look
from gradwatch.agent.checkpoints.result import Completeness
from tests import ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("sharded")
    for result in ranks.run_ranks("tests.checkpoints.sharded", 2, [str(target)]):
        assert result.returncode == 0, result.output
    return target


def test_all_shards_of_a_dcp_folder_are_looked_at(folder):
    found = {candidate.path for candidate in find.find(listing.take(folder))}
    assert found == {"step-40", "rank0.pt", "rank1.pt"}
    result = look(folder / "step-40")
    assert (result.completeness, result.finite, result.unreadable) == (Completeness.COMPLETE, False, ())
    assert [(bad.section.value, bad.name, bad.count) for bad in result.nonfinite] == [
        ("parameters", "model.0.weight", 1),
        ("optimizer", "optim.state.0.weight.exp_avg_sq", 1),
    ]
    steps = {step.source.value: step.step for step in result.steps}
    assert steps == {"checkpoint": 40, "name": 40, "optimizer": 1}


def test_a_dcp_folder_without_one_ranks_shard_is_not_complete(folder):
    (folder / "step-40" / "__1_0.distcp").rename(folder / "away")
    try:
        result = look(folder / "step-40")
    finally:
        (folder / "away").rename(folder / "step-40" / "__1_0.distcp")
    assert result.completeness is Completeness.IN_FLIGHT
    assert "__1_0.distcp is missing" in result.reason


def test_a_rank_that_saves_dtensors_saves_its_own_shard(folder):
    assert look(folder / "rank0.pt").finite is True
    result = look(folder / "rank1.pt")
    assert [(bad.name, bad.count) for bad in result.nonfinite] == [("0.weight", 1)]
