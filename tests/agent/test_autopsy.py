"""The autopsy: which operator, where in the code, and whether it goes bad again."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.training import autopsy, autopsy_blocks
from tests.training.autopsy import CASES, MODES, REPRODUCED, names_in

LINES = {
    f"tests/training/{Path(module.__file__).name}": Path(module.__file__).read_text().splitlines()
    for module in (autopsy, autopsy_blocks)
}


IN_MODES = [(mode, name) for mode in MODES for name in names_in(mode) if mode != "too_late"]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Gives, for a mode, what each rank journalled of replays, by case."""
    return functools.cache(lambda mode: run_all(tmp_path_factory.mktemp(mode), mode))


def run_all(folder, mode):
    cases = names_in(mode)
    spool = folder / "spool"
    spool.mkdir()
    environment = MODES[mode].environment
    results = run_ranks("tests.training.autopsy", 2, [str(folder / "told"), mode], spool=spool, **environment)
    assert not any("gradwatch:" in result.output for result in results), results[0].output
    by_rank = []
    for journal in sorted(spool.glob("rank*.jsonl")):
        records = [json.loads(line) for line in journal.read_text().splitlines()]
        assert not any("fault" in record for record in records)
        autopsies = [record["autopsy"] for record in records if "autopsy" in record]
        by_rank.append(
            {name: [one for one in autopsies if one["root"] == root] for root, name in enumerate(cases)}
        )
    replayed = [one["round"] for of_case in by_rank[1].values() for one in of_case if one["nbytes"]]
    watermarks = json.loads((folder / "told.1").read_text())
    assert set(watermarks) <= set(replayed), "held back until the replay is written down"
    assert len(watermarks) > len(cases) // 2 or mode == "too_late"
    assert not any((spool / "capsules").iterdir()), "whoever laid a capsule down has cleared it away"
    return by_rank


@pytest.mark.parametrize(("mode", "name"), IN_MODES)
def test_the_operator_is_named(told, mode, name):
    _, said = CASES[name]
    records = told(mode)[1][name]
    expected = said.get("replay", REPRODUCED)
    assert [one["replay"] for one in records] == [expected] * (expected is not None)
    for record in records:
        assert record["of_rank"] == 1
        assert record["microbatch"] == said.get("microbatch", 0)
        assert said.get("reason", "") in record.get("reason", "")
        if "missing" in said:
            assert any(said["missing"] in one for one in record["missing"])
        for field in ("phase", "operator", "module"):
            told_there = said.get("on_host", {}) if mode == "host" else {}
            assert record.get(field) == told_there.get(field, said.get(field)), field
        assert said.get("at", "") in record.get("code", "")
        if "source" in record:
            source, _, line = record["source"].partition(":")
            assert LINES[source][int(line) - 1].strip() == record["code"]


@pytest.mark.parametrize(("mode", "name"), IN_MODES)
def test_another_rank_replays_it(told, mode, name):
    _, said = CASES[name]
    records = told(mode)[0][name]
    expected = said.get("other", REPRODUCED)
    assert [one["replay"] for one in records] == [expected] * (expected is not None)
    for record in records:
        # Bad itself, it has replayed its own.
        assert record["of_rank"] == (0 if expected == "REPLAY_RECEIVED" else 1)
        if expected == REPRODUCED and "operator" in said:
            assert record.get("operator") == said.get("operator")


def test_the_range_of_what_went_in(told):
    (ratio,) = told("host")[1]["ratio"]
    numerator, denominator = ratio["inputs"]
    assert denominator["min"] == 0.0
    assert denominator["shape"] == [4, 1]
    assert numerator["nonfinite"] == denominator["nonfinite"] == 0
    (softmax,) = told("host")[1]["attention"]
    assert softmax["inputs"][0]["nonfinite"] == 4
    assert softmax["value"] == "VALUE_NAN"


def test_when_another_update_has_been_applied_by_then_it_is_not_replayed(told):
    (record,) = told("too_late")[1]["log"]
    assert (record["replay"], record["reason"]) == (
        "REPLAY_NOT_DONE",
        "the parameters were changed in place since the forward pass began",
    )
    assert not told("too_late")[0]["log"]
