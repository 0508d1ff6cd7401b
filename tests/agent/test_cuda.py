"""On a device: no synchronisation of the host, the same weights, and the bad gradient named."""

from __future__ import annotations

import json

import pytest
import torch

from tests.agent.test_bitwise import same_bits
from tests.ranks import run_ranks

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")


@on_cuda
def test_watching_never_synchronises_and_changes_no_bit(tmp_path):
    spool = tmp_path / "spool"
    spool.mkdir()
    run_ranks("tests.training.cuda", 1, [str(tmp_path / "without")])
    run_ranks("tests.training.cuda", 1, [str(tmp_path / "with")], spool=spool)
    assert same_bits(torch.load(tmp_path / "without"), torch.load(tmp_path / "with"))
    (progress,) = spool.glob("*.progress")
    told = json.loads(progress.read_text())
    assert (told["round"], told["reduced_round"], told["faults"], told["dropped"]) == (60, 60, {}, {})


@on_cuda
def test_a_bad_gradient_on_the_device_is_read_out_and_named(tmp_path):
    spool = tmp_path / "spool"
    spool.mkdir()
    run_ranks("tests.training.cuda", 1, [str(tmp_path / "with"), "--bad-step", "30"], spool=spool)
    (journal,) = spool.glob("*.jsonl")
    records = [json.loads(line) for line in journal.read_text().splitlines()]
    bad = next(record["nonfinite"] for record in records if "nonfinite" in record)
    assert (bad["step"], bad["round"]) == (30, 30)
    assert bad["gradients"][0]["parameter"] == "2.bias"
    assert bad["gradients"][0]["backward_position"] == 0


@on_cuda
def test_the_guard_skips_on_the_device_and_nobody_waits(tmp_path):
    spool = tmp_path / "spool"
    spool.mkdir()
    policy = '{"on_nonfinite": "skip_step"}'
    run_ranks(
        "tests.training.cuda",
        1,
        [str(tmp_path / "with"), "--bad-step", "30"],
        spool=spool,
        GRADWATCH_GUARD=policy,
    )
    assert all(weight.isfinite().all() for weight in torch.load(tmp_path / "with").values())
    (journal,) = spool.glob("*.jsonl")
    records = [json.loads(line) for line in journal.read_text().splitlines()]
    skipped = [record["skipped"] for record in records if "skipped" in record]
    assert [(one["step"], one["round"], one["consecutive"]) for one in skipped] == [(30, 30, 1)]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=on_cuda)])
def test_a_bad_pass_is_replayed_on_the_device_and_the_training_goes_on_as_if_it_was_not(tmp_path, device):
    spool = tmp_path / "spool"
    spool.mkdir()
    policy = '{"on_nonfinite": "skip_step", "read_out": "every_step"}'
    script = ["--bad-step", "30", "--log", "--device", device]
    run_ranks(
        "tests.training.cuda", 1, [str(tmp_path / "with"), *script], spool=spool, GRADWATCH_GUARD=policy
    )
    (journal,) = spool.glob("*.jsonl")
    records = [json.loads(line) for line in journal.read_text().splitlines()]
    (told,) = [record["autopsy"] for record in records if "autopsy" in record]
    assert (told["replay"], told["operator"], told["module"], told["step"]) == (
        "REPLAY_REPRODUCED",
        "aten.log.default",
        "1",
        30,
    )
    assert told["code"].endswith("# log of 0")
    assert not any("fault" in record for record in records)
    other = tmp_path / "other"
    other.mkdir()
    off = {"GRADWATCH_GUARD": policy, "GRADWATCH_AUTOPSY": "off"}
    run_ranks("tests.training.cuda", 1, [str(tmp_path / "without"), *script], spool=other, **off)
    assert same_bits(torch.load(tmp_path / "without"), torch.load(tmp_path / "with"))
