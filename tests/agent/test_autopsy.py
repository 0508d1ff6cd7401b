"""The autopsy: which operator, where in the code, and whether it goes bad again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.training import autopsy, autopsy_blocks
from tests.training.autopsy import CASES

LINES = {
    f"tests/training/{Path(module.__file__).name}": Path(module.__file__).read_text().splitlines()
    for module in (autopsy, autopsy_blocks)
}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What each rank journalled of replays, by case."""
    folder = tmp_path_factory.mktemp("autopsy")
    spool = folder / "spool"
    spool.mkdir()
    results = run_ranks("tests.training.autopsy", 2, [str(folder / "told")], spool=spool)
    assert not any("gradwatch:" in result.output for result in results), results[0].output
    by_rank = []
    for journal in sorted(spool.glob("rank*.jsonl")):
        records = [json.loads(line) for line in journal.read_text().splitlines()]
        assert not any("fault" in record for record in records)
        autopsies = [record["autopsy"] for record in records if "autopsy" in record]
        by_rank.append([[one for one in autopsies if one["root"] == root] for root in range(len(CASES))])
    replayed = [one["round"] for of_case in by_rank[1] for one in of_case if one["nbytes"]]
    watermarks = json.loads((folder / "told.1").read_text())
    assert set(watermarks) <= set(replayed), "held back until the replay is written down"
    assert len(watermarks) > len(CASES) // 2
    assert not any((spool / "capsules").iterdir()), "whoever laid a capsule down has cleared it away"
    return by_rank


@pytest.mark.parametrize("name", CASES)
def test_the_operator_is_named(told, name):
    _, said = CASES[name]
    of_case = told[1][[*CASES].index(name)]
    expected = said.get("replay", "REPLAY_REPRODUCED")
    assert [one["replay"] for one in of_case] == [expected] * (expected is not None)
    for record in of_case:
        assert record["of_rank"] == 1
        assert record["microbatch"] == said.get("microbatch", 0)
        assert said.get("reason", "") in record.get("reason", "")
        if "missing" in said:
            assert any(said["missing"] in one for one in record["missing"])
        for field in ("phase", "operator", "module"):
            assert record.get(field) == said.get(field), field
        assert said.get("at", "") in record.get("code", "")
        if "source" in record:
            source, _, line = record["source"].partition(":")
            assert LINES[source][int(line) - 1].strip() == record["code"]


@pytest.mark.parametrize("name", CASES)
def test_another_rank_replays_it(told, name):
    _, said = CASES[name]
    of_case = told[0][[*CASES].index(name)]
    expected = said.get("other", "REPLAY_REPRODUCED")
    assert [one["replay"] for one in of_case] == [expected] * (expected is not None)
    for record in of_case:
        # Bad itself, it has replayed its own.
        assert record["of_rank"] == (0 if expected == "REPLAY_RECEIVED" else 1)
        if expected == "REPLAY_REPRODUCED":
            assert record.get("operator") == said.get("operator")


def test_the_range_of_what_went_in(told):
    (ratio,) = told[1][[*CASES].index("ratio")]
    numerator, denominator = ratio["inputs"]
    assert denominator["min"] == 0.0
    assert denominator["shape"] == [4, 1]
    assert numerator["nonfinite"] == denominator["nonfinite"] == 0
    (softmax,) = told[1][[*CASES].index("attention")]
    assert softmax["inputs"][0]["nonfinite"] == 4
    assert softmax["value"] == "VALUE_NAN"
