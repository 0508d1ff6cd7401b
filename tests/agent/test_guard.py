"""The guard: a skipped update leaves the run as if `step()` had not been called, to the bit."""

from __future__ import annotations

import json

import pytest
import torch

from gradwatch.agent.probe.guard import GuardPolicy, SkipCount, Tally
from gradwatch.agent.probe.settings import Settings
from tests.agent.test_bitwise import same_bits
from tests.ranks import run_ranks
from tests.training.guarded import BAD, CASES, LEFT_ALONE

POLICY = '{"on_nonfinite": "skip_step", "max_consecutive": 2}'


def comparable(value):
    """Tuples and lists of a state as a dict, for `same_bits`."""
    if isinstance(value, list):
        return dict(enumerate(map(comparable, value)))
    return {key: comparable(item) for key, item in value.items()} if isinstance(value, dict) else value


def test_a_guarded_run_has_the_weights_of_a_run_without_those_updates(tmp_path):
    spool = tmp_path / "spool"
    spool.mkdir()
    run_ranks("tests.training.guarded", 2, [str(tmp_path / "hand"), "yes"])
    results = run_ranks(
        "tests.training.guarded", 2, [str(tmp_path / "guard"), "no"], spool=spool, GRADWATCH_GUARD=POLICY
    )
    assert not any("gradwatch:" in result.output for result in results), results[0].output
    by_hand = torch.load(tmp_path / "hand", weights_only=False)
    guarded = torch.load(tmp_path / "guard", weights_only=False)
    differing = [
        name for name in CASES if not same_bits(comparable(by_hand[name]), comparable(guarded[name]))
    ]
    assert differing == []
    assert all(tensor.isfinite().all() for case in guarded.values() for tensor in case["weights"].values())

    # Every rank skipped the same updates, and said so.
    said, too_large = [], []
    for journal in sorted(spool.glob("rank*.jsonl")):
        records = [json.loads(line) for line in journal.read_text().splitlines()]
        said.append([record["skipped"] for record in records if "skipped" in record])
        replays = [record["autopsy"]["replay"] for record in records if "autopsy" in record]
        assert "REPLAY_REPRODUCED" in replays, "bitwise equal across an autopsy, too"
        too_large.append([one["optimizer_state"] for one in records if "optimizer_state" in one])
    assert said[0] == said[1]
    assert len(said[0]) == len(BAD) * (len(CASES) - len(LEFT_ALONE))
    # Steps 4, 8 and 9 of each case: two in a row are the policy's limit.
    assert [skip["consecutive"] for skip in said[0][:3]] == [1, 1, 2]
    assert [skip["exhausted"] for skip in said[0][:3]] == [False, False, True]
    rounds = [skip["round"] for skip in said[0]]
    assert len(set(rounds)) == len(rounds), "each skip is of a round of its own"
    # Finite gradients that the second moment cannot keep: once per stretch, of each optimizer.
    of_round = [[(one["root"], one["round"], one["parameter"]) for one in told] for told in too_large]
    assert of_round[0] == of_round[1]
    assert {one["root"] for one in too_large[0]} == {
        root for root, name in enumerate(CASES) if name.startswith("too-large")
    }
    assert all(one["skipped"] and one["magnitude"] > one["limit"] for told in too_large for one in told)
    assert {one["round"] for one in too_large[0]} <= set(rounds)


def test_the_guard_is_off_and_says_so_where_ranks_could_disagree(tmp_path):
    spool = tmp_path / "spool"
    spool.mkdir()
    arguments = ["user_hook", str(tmp_path / "out")]
    results = run_ranks("tests.training.scenarios", 2, arguments, spool=spool, GRADWATCH_GUARD=POLICY)
    for result in results:
        assert result.output.count("gradwatch: the guard is off for a model") == 1
    for journal in spool.glob("rank*.jsonl"):
        records = [json.loads(line) for line in journal.read_text().splitlines()]
        (off,) = [record["guard_off"] for record in records if "guard_off" in record]
        assert "own_hook" in off["reason"]
        assert not any("skipped" in record for record in records)


def test_without_a_policy_there_is_no_guard():
    assert GuardPolicy.asked({}) is None
    assert GuardPolicy.asked({"on_nonfinite": "off"}) is None


@pytest.mark.parametrize("text", ["{", '{"on_nonfinite": "explode"}', '{"read_out": "never"}'])
def test_a_policy_that_cannot_be_read_is_an_error(text):
    environ = {"GRADWATCH_SPOOL": "/spool", "GRADWATCH_GUARD": text}
    with pytest.raises(ValueError, match=r"."):
        Settings.from_environment(environ)


def test_a_read_out_at_every_step_is_no_guard():
    environ = {"GRADWATCH_SPOOL": "/spool", "GRADWATCH_GUARD": '{"read_out": "every_step"}'}
    settings = Settings.from_environment(environ)
    assert settings is not None
    assert (settings.guard, settings.read_out_every_step, settings.holds_weights) == (None, True, True)


def test_skips_are_counted_in_a_row_and_in_a_window():
    count = SkipCount(GuardPolicy(max_consecutive=3, max_per_1000_steps=4))
    assert count.attempt(skipped=False) is None
    assert [count.attempt(skipped=True) for _ in range(3)] == [
        Tally(1, 1, exhausted=False),
        Tally(2, 2, exhausted=False),
        Tally(3, 3, exhausted=True),
    ]
    assert count.attempt(skipped=False) is None
    assert count.attempt(skipped=True) == Tally(1, 4, exhausted=True), "four of the last 1,000"
    for _ in range(999):
        count.attempt(skipped=False)
    assert count.attempt(skipped=True) == Tally(1, 1, exhausted=False), "the others are too long ago"
