"""The guard under Lightning, which runs forward and backward inside `optimizer.step(closure)`."""

from __future__ import annotations

import json

import torch

from tests.agent.test_bitwise import same_bits
from tests.agent.test_guard import POLICY
from tests.ranks import run_ranks

FAULT = ["--bad-rank", "1", "--bad-step", "6"]


def test_a_guarded_lightning_run_has_the_weights_of_a_run_without_that_update(tmp_path):
    spool = tmp_path / "spool"
    spool.mkdir()

    def train(name, *arguments, **options):
        output = ["--folder", str(tmp_path / name), "--weights", str(tmp_path / f"{name}.pt")]
        run_ranks("tests.training.with_lightning", 2, [*output, "--epochs", "2", *arguments], **options)
        return torch.load(tmp_path / f"{name}.pt")

    by_hand = train("hand", *FAULT, "--by-hand")
    guarded = train("guarded", *FAULT, spool=spool, GRADWATCH_GUARD=POLICY)
    assert same_bits(by_hand, guarded)
    assert all(weight.isfinite().all() for weight in guarded.values())
    for journal in spool.glob("rank*.jsonl"):
        records = [json.loads(line) for line in journal.read_text().splitlines()]
        assert [record["skipped"]["step"] for record in records if "skipped" in record] == [6]
        assert not any("fault" in record for record in records)
