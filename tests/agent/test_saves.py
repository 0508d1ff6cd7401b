"""The beginning of every save is told, with the step under way, and nothing else of it changes."""

from __future__ import annotations

import json

import pytest
import torch

from gradwatch.agent.probe.saves import MAX_NAMELESS, Saves
from tests.agent.test_bitwise import same_bits
from tests.ranks import run_ranks

MODULE = "tests.training.saving"


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A watched run's saves by rank as (step, path relative to its folder), in order; and both weights."""
    tmp = tmp_path_factory.mktemp("saves")
    spool = tmp / "spool"
    spool.mkdir()
    results = run_ranks(MODULE, 2, [str(tmp / "with")], spool=spool)
    run_ranks(MODULE, 2, [str(tmp / "without")])
    saves = []
    for rank in (0, 1):
        (journal,) = spool.glob(f"rank{rank:05d}-*.jsonl")
        records = [json.loads(line) for line in journal.read_text().splitlines()]
        assert not any("fault" in record for record in records)
        bodies = [record["checkpoint"] for record in records if "checkpoint" in record]
        assert not any(body.get("declared") for body in bodies)
        prefix = str(tmp / "with") + "/"
        assert all(body["path"].startswith(prefix) or not body["path"] for body in bodies)
        saves.append([(body["step"], body["path"].removeprefix(prefix)) for body in bodies])
    weights = [torch.load(tmp / name / "weights.pt") for name in ("with", "without")]
    return saves, weights, results


def test_each_save_is_told_once_with_the_step_at_its_start(told):
    saves, _, _ = told
    for rank in (0, 1):
        assert saves[rank][:10] == [
            (0, f"step0-rank{rank}.pt"),
            (1, ""),
            (1, f"open{rank}.pt"),
            (2, "dcp2"),
            (2, "dcp2-old"),
            (3, "dcp3"),  # and nothing of what its thread writes while the next step is under way
            (4, f"step4-rank{rank}.safetensors"),
            (4, f"model4-rank{rank}.safetensors"),
            (5, ""),  # to a number, which torch refuses
            *([(6, "weights.pt")] if rank == 0 else []),
        ]


def test_the_training_and_its_errors_are_as_ever(told):
    _, (watched, alone), results = told
    assert same_bits(watched, alone)
    for result in results:
        assert "refused:" in result.output
        assert "gradwatch:" not in result.output


def test_a_script_that_saves_in_every_step_does_not_fill_the_spool():
    saves = Saves()
    told = sum(saves.is_new("", step) for step in range(2 * MAX_NAMELESS))
    assert told == MAX_NAMELESS
    assert saves.is_new("/ckpts/step_1.pt", 2 * MAX_NAMELESS)
    assert not saves.is_new("/ckpts/step_1.pt", 2 * MAX_NAMELESS)
    assert saves.is_new("/ckpts/step_1.pt", 2 * MAX_NAMELESS + 1)
