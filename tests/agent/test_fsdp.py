"""FSDP2: whose gradients were bad before the reduction scattered them, on real ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.ranks import run_ranks
from tests.training.fsdp import BAD_RANK, BAD_STEP, CASES, RANKS, SPOILT, STEPS

GUARD = json.dumps({"on_nonfinite": "skip_step"})


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """Where the watched ranks wrote their weights, and each one's records."""
    folder = tmp_path_factory.mktemp("fsdp")
    spool = folder / "spool"
    spool.mkdir()
    results = run_ranks("tests.training.fsdp", RANKS, [str(folder)], spool=spool, GRADWATCH_GUARD=GUARD)
    assert not any("gradwatch:" in result.output for result in results), results[0].output
    journals = [next(spool.glob(f"rank{rank:05d}-*.jsonl")) for rank in range(RANKS)]
    return folder, [[json.loads(line) for line in journal.read_text().splitlines()] for journal in journals]


def bad_steps(name):
    """A bad weight is there to stay."""
    return range(BAD_STEP, STEPS if name == "parameter" else BAD_STEP + 1)


def of(records, kind):
    return [record[kind] for record in records if kind in record]


def test_who_is_watched_says_by_which_framework(watched):
    for records in watched[1]:
        assert of(records, "hello")[0]["framework"] == "fsdp2"
        models = of(records, "model")[: len(CASES)]
        assert [model["wrapper"] for model in models] == ["FSDP2"] * len(CASES)
        assert {(model["group_size"], model["module_class"]) for model in models} == {(RANKS, "Net")}
    names = [parameter["name"] for parameter in of(watched[1][0], "model")[1]["parameters"]]
    assert SPOILT in names
    assert "<unknown>" not in names


def test_nobody_is_said_to_be_unwatched(watched):
    assert [of(records, "unwatched") for records in watched[1]] == [[]] * RANKS


def test_models_of_different_kinds_are_told_apart(watched):
    for records in watched[1]:
        models = of(records, "model")
        assert [model["root"] for model in models] == [*range(len(CASES) + 1)]
        assert models[-1]["wrapper"] == "DistributedDataParallel"


@pytest.mark.parametrize("name", CASES)
def test_its_maker_is_named(watched, name):
    place = [*CASES].index(name)
    said = CASES[name][2]
    for rank, records in enumerate(watched[1]):
        if rank == said.get("loss_on"):
            continue
        told = [record for record in of(records, "nonfinite") if record["root"] == place]
        if rank != BAD_RANK and not said.get("everywhere"):
            assert told == []
            continue
        assert told
        for record in told:
            assert record["step"] - place * STEPS in bad_steps(name)
            assert record["source"] == "fsdp-unsharded"
            assert record.get("phase") == said["phase"]
            assert record["microbatch"] == said.get("microbatch", 0)
        gradients = [gradient for record in told for gradient in record["gradients"]]
        assert all("backward_position" in gradient for gradient in gradients)
        if "only" in said:
            assert [gradient["parameter"] for gradient in gradients] == [said["only"]]
            assert gradients[0]["value"] == "VALUE_NAN"


@pytest.mark.parametrize("name", CASES)
def test_its_pass_is_replayed(watched, name):
    place = [*CASES].index(name)
    said = CASES[name][2]
    told = [[one for one in of(records, "autopsy") if one["root"] == place] for records in watched[1]]
    (own,) = told[BAD_RANK]
    if "loss_on" in said:
        (beside,) = told[said["loss_on"]]
        assert "the loss made it" in beside["reason"]
        told[said["loss_on"]] = []
    assert own["of_rank"] == BAD_RANK
    others = [one for rank, of_rank in enumerate(told) for one in of_rank if rank != BAD_RANK]
    if "reason" in said:
        assert said["reason"] in own["reason"]
        assert others == []
        return
    if "fails" in said:
        assert [one["replay"] for one in [own, *others]] == ["REPLAY_NOT_DONE"] * 2
        assert said["fails"] in own["reason"]
        return
    if said.get("everywhere"):
        assert [one["of_rank"] for one in others] == [rank for rank in range(RANKS) if rank != BAD_RANK]
    else:
        assert [one["of_rank"] for one in others] == [BAD_RANK], "one other rank has replayed it"
    for one in [own, *others]:
        assert one["replay"] == "REPLAY_REPRODUCED"
        assert one.get("operator") == said.get("operator")
        assert one["microbatch"] == said.get("microbatch", 0)
        if "missing" in said:
            assert said["missing"] in one["missing"][0]
            continue
        assert (one["module"], one["module_class"]) == ("blocks.1", "Block")
        source, _, line = one["source"].partition(":")
        assert Path(source).read_text().splitlines()[int(line) - 1].strip() == one["code"]


def test_nothing_of_the_parameters_is_left_on_the_disk(watched):
    assert not any((watched[0] / "spool" / "capsules").iterdir())


def test_every_rank_counts_the_same_rounds(watched):
    files = sorted((watched[0] / "spool").glob("*.progress"))
    told = [json.loads(path.read_text()) for path in files]
    assert [(one["round"], one["reduced_round"]) for one in told] == [(len(CASES) * STEPS,) * 2] * RANKS
    assert [one["faults"] for one in told] == [{}] * RANKS


def test_all_ranks_skip_the_same_updates(watched):
    expected = [place * STEPS + step for place, name in enumerate(CASES) for step in bad_steps(name)]
    for records in watched[1]:
        assert [skipped["step"] for skipped in of(records, "skipped")] == expected


def test_the_weights_are_to_the_bit_those_without_us(watched, tmp_path):
    run_ranks("tests.training.fsdp", RANKS, [str(tmp_path)])
    for rank in range(RANKS):
        with_us, without = torch.load(watched[0] / f"{rank}.pt"), torch.load(tmp_path / f"{rank}.pt")
        for name in CASES:
            assert len(with_us[name]) == len(without[name])
            for one, other in zip(with_us[name], without[name], strict=True):
                assert torch.equal(one.view(torch.int32), other.view(torch.int32)), (rank, name)
