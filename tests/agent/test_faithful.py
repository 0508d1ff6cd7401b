"""Whether a replay is shown to have repeated the pass: with a broken device it is, and with nothing else."""

from __future__ import annotations

import functools
import json

import pytest

from tests.ranks import run_ranks
from tests.training.faithful import CASES

RANKS = 3
# With two threads those whose results depend on it.
NAMES = {1: [*CASES], 2: [name for name in CASES if "broken" in name]}
IN_THREADS = [(threads, name) for threads, names in NAMES.items() for name in names]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Gives, for a number of threads, what each rank journalled of replays, by case."""
    return functools.cache(lambda threads: run_all(tmp_path_factory.mktemp(f"threads{threads}"), threads))


def run_all(spool, threads):
    names = NAMES[threads]
    run_ranks("tests.training.faithful", RANKS, names, spool=spool, OMP_NUM_THREADS=str(threads))
    by_rank = []
    for journal in sorted(spool.glob("rank*.jsonl")):
        records = [json.loads(line) for line in journal.read_text().splitlines()]
        assert not [record for record in records if "fault" in record]
        by_rank.append(
            {
                kind: {
                    name: [one[kind] for one in records if kind in one and one[kind]["root"] == root]
                    for root, name in enumerate(names)
                }
                for kind in ("autopsy", "rehearsal", "nonfinite")
            }
        )
    assert not any((spool / "capsules").iterdir())
    return by_rank


@pytest.mark.parametrize(("threads", "name"), IN_THREADS)
def test_the_owner(told, name, threads):
    case = CASES[name]
    (record,) = told(threads)[1]["autopsy"][name]
    assert (record["replay"], record.get("faithful")) == (case.replay, case.faithful), record
    assert case.operator in record.get("operator", "")
    doubts = record.get("doubts", [])
    assert any(case.doubt in doubt for doubt in doubts) if case.doubt else not doubts, doubts


@pytest.mark.parametrize(("threads", "name"), IN_THREADS)
def test_two_others(told, name, threads):
    for rank in (0, 2):
        records = told(threads)[rank]["autopsy"][name]
        if CASES[name].peers is None:
            assert not records
            continue
        (record,) = records
        assert record["of_rank"] == 1
        assert (record["replay"], record.get("faithful")) == CASES[name].peers, record


@pytest.mark.parametrize("threads", NAMES)
def test_a_clean_pass_is_replayed_where_nothing_was_finite(told, threads):
    for rank in range(RANKS):
        for name in NAMES[threads]:
            rehearsals = told(threads)[rank]["rehearsal"][name]
            if name != "broken_all":
                assert not rehearsals
                continue
            (record,) = rehearsals
            (autopsy,) = told(threads)[rank]["autopsy"][name]
            assert (record["equal"], record["doubts"]) == (True, [])
            assert record["of_round"] == autopsy["round"] == record["round"] - 1
