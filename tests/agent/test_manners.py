"""The probe's manners in real trainings of two ranks: whatever goes wrong in it stays in it."""

from __future__ import annotations

import json

import pytest
import torch

from tests.agent.test_bitwise import same_bits
from tests.ranks import run_ranks

MODULE = "tests.training.scenarios"


def run(name, tmp_path, **environment):
    """Run a scenario watched; its results by rank, its records by rank, its weights."""
    spool = tmp_path / "spool"
    spool.mkdir()
    results = run_ranks(MODULE, 2, [name, str(tmp_path / "with")], spool=spool, **environment)
    records = {}
    for path in sorted(spool.glob("rank*.jsonl")):
        rank = int(path.name[4:9])
        # What does not end like a record was cut short by a full disk.
        whole = [line for line in path.read_text().splitlines() if line.endswith("}}")]
        records.setdefault(rank, []).append([json.loads(line) for line in whole])
    return results, records, torch.load(tmp_path / "with", weights_only=False)


def weights_without_us(name, tmp_path, **environment):
    run_ranks(MODULE, 2, [name, str(tmp_path / "without")], **environment)
    return torch.load(tmp_path / "without", weights_only=False)


def progress(tmp_path, rank):
    (path,) = (tmp_path / "spool").glob(f"rank{rank:05d}*.progress")
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def healthy_weights(tmp_path_factory):
    return weights_without_us("broken_none", tmp_path_factory.mktemp("healthy"))


@pytest.mark.parametrize(
    "where", ["passes", "scan", "reduced", "round", "steps", "attach", "identify", "journal"]
)
def test_an_exception_inside_is_logged_once_and_the_training_is_as_ever(where, tmp_path, healthy_weights):
    results, _records, weights = run(f"broken_{where}", tmp_path)
    for result in results:
        said = [line for line in result.output.splitlines() if line.startswith("gradwatch:")]
        assert len(said) == 1
        assert f"planted in {where}" in said[0]
        assert "the training goes on" in said[0]
    assert same_bits(weights, healthy_weights)
    if where in {"passes", "scan", "reduced", "round", "steps"}:
        assert progress(tmp_path, 0)["faults"] == {"scan" if where == "round" else where: 1}


def test_a_full_disk_is_said_once_and_counted(tmp_path):
    results, records, weights = run("full_disk", tmp_path)
    for rank, result in enumerate(results):
        said = [line for line in result.output.splitlines() if line.startswith("gradwatch:")]
        assert len(said) == 1
        assert "could not be written" in said[0]
        told = progress(tmp_path, rank)
        # The line that was torn; and those for which not a byte was left.
        assert told["dropped"]["disk_full"] == 1
        assert set(told["dropped"]) <= {"disk_full", "write_failed"}
        assert told["journal_records"] == len(records[rank][0])
    assert all(tensor.isnan().any() for tensor in weights.values()), "the NaN is the training's own affair"


def test_a_second_process_of_the_same_rank_is_counted_and_writes_no_events(tmp_path):
    _results, records, _weights = run("second_process", tmp_path)
    for rank in (0, 1):
        hellos = [journal[0]["hello"] for journal in records[rank]]
        assert sorted(hello["duplicate_claim"] for hello in hellos) == [False, True]
        (second,) = (journal for journal in records[rank] if journal[0]["hello"]["duplicate_claim"])
        assert len(second) == 1


def test_a_deep_copied_model_is_watched(tmp_path):
    _results, records, _weights = run("deepcopied", tmp_path)
    bad = [record["nonfinite"] for record in records[1][0] if "nonfinite" in record]
    assert bad[0]["step"] == 4
    assert bad[0]["gradients"][0]["parameter"] == "2.bias"
    assert bad[0]["root"] == 1, "the copy is the second wrapped model of the process"


def test_a_forked_child_changes_nothing(tmp_path):
    _results, records, _weights = run("forked_child", tmp_path)
    assert [len(journals) for journals in records.values()] == [1, 1]
    assert progress(tmp_path, 0)["round"] == 6


@pytest.mark.parametrize("order", ["before", "after"])
def test_watch_composes_with_a_comm_hook_registered_before_and_after_it(order, tmp_path):
    off = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    _results, records, weights = run(f"explicit_{order}", tmp_path, **off)
    assert same_bits(weights, weights_without_us(f"explicit_{order}", tmp_path, **off))
    journal = records[1][0]
    assert next(record["checkpoint"] for record in journal if "checkpoint" in record) == {
        "path": "/somewhere/ckpt",
        "step": 1000,
        "declared": True,
    }
    bad = next(record["nonfinite"] for record in journal if "nonfinite" in record)
    assert bad["step"] == 1004, "set_step(1000) before the first of the steps"
    assert json.loads(bad["batch"]) == ["a", 7]
    assert not any(
        "nonfinite" in record and record["nonfinite"]["round"] == bad["round"] for record in records[0][0]
    )


def test_of_two_models_in_one_process_the_bad_one_is_named(tmp_path):
    _results, records, _weights = run("two_models", tmp_path)
    bad = next(record["nonfinite"] for record in records[1][0] if "nonfinite" in record)
    assert (bad["root"], bad["step"], bad["round"]) == (1, 3, 6)
    assert not any("nonfinite" in record and record["nonfinite"]["round"] < 8 for record in records[0][0])


def test_what_is_read_out_late_is_told_as_of_its_own_time(tmp_path):
    _results, records, weights = run("device_look", tmp_path)
    assert same_bits(weights, weights_without_us("device_look", tmp_path))
    bad = next(record["nonfinite"] for record in records[1][0] if "nonfinite" in record)
    assert (bad["step"], bad["round"]) == (9, 9)
    first = bad["gradients"][0]
    assert (first["parameter"], first["value"], first["backward_position"]) == ("2.bias", "VALUE_NAN", 0)
    assert "count" not in first
    for rank in (0, 1):
        told = progress(tmp_path, rank)
        assert (told["round"], told["reduced_round"], told["last_bad_round"]) == (12, 12, 11)
        assert (told["faults"], told["dropped"]) == ({}, {})
    clean = [record["nonfinite"]["round"] for record in records[0][0] if "nonfinite" in record]
    assert min(clean) == 10, "rank 0 was clean until the update"
