"""The autopsy: which operator, where in the code, and whether it goes bad again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.training import autopsy
from tests.training.autopsy import CASES


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What each rank journalled of replays, by case."""
    folder = tmp_path_factory.mktemp("autopsy")
    spool = folder / "spool"
    spool.mkdir()
    results = run_ranks("tests.training.autopsy", 2, [str(folder / "told")], spool=spool)
    assert not any(result.output for result in results), results[0].output + results[1].output
    by_rank = []
    for journal in sorted(spool.glob("rank*.jsonl")):
        records = [json.loads(line) for line in journal.read_text().splitlines()]
        autopsies = [record["autopsy"] for record in records if "autopsy" in record]
        by_rank.append([[one for one in autopsies if one["root"] == root] for root in range(len(CASES))])
    return by_rank


@pytest.mark.parametrize("name", CASES)
def test_the_operator_is_named(told, name):
    _, said = CASES[name]
    (record,) = [one for one in told[1][[*CASES].index(name)] if one["of_rank"] == 1]
    assert record["replay"] == said.get("replay", "REPLAY_REPRODUCED")
    assert said.get("reason", "") in record.get("reason", "")
    for field in ("phase", "operator", "module"):
        assert record.get(field) == said.get(field), field
    assert said.get("at", "") in record.get("code", "")
    if "at" in said:
        source, _, line = record["source"].partition(":")
        assert source == "tests/training/autopsy.py"
        lines = Path(autopsy.__file__).read_text().splitlines()
        assert lines[int(line) - 1].strip() == record["code"]
