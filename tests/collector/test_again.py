"""A rank that is bad again, within an incident and across incidents."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest

from gradwatch.collector import document
from gradwatch.collector import observations as obs
from gradwatch.collector.observations import Phase
from tests.collector.bodies import autopsy as autopsy_of
from tests.collector.history import Told, batch, nonfinite, progress


def bad(step: int, batch_hash: str = "", **changes: object) -> obs.NonFinite:
    known = {"phase": Phase.INPUT, "weights_finite": True, "model_step": step} | changes
    return nonfinite(step, batch_hash=batch_hash, **known)


def told_with(*bodies: obs.NonFinite, rank: int = 1) -> Told:
    told = Told().hellos(2)
    told.tell(batch(f"r{rank}", 1, *bodies))
    for one in range(2):
        records = 1 + len(bodies) * (one == rank)
        bad_rounds = len(bodies) * (one == rank)
        told.tell(progress(f"r{one}", 60, records, bad_rounds=bad_rounds, last_bad_round=bodies[-1].round))
    return told


def verdict(told: Told) -> str:
    first = min(told.incidents, key=lambda one: one.evidence.first_round)
    return " ".join(document.incident(first).verdict)


def test_a_sample_that_comes_back_in_every_epoch():
    text = verdict(told_with(bad(5, "ab"), bad(13, "ab"), bad(21, "ab")))
    assert "Rank 1 was bad again at steps 13 and 21, with the same batch." in text
    assert text.index("at step 5 (round 5") < text.index("was bad again at steps 13 and 21")


def autopsy(step: int, operator: str | None, source: str | None, **changes: object) -> obs.Autopsy:
    found = autopsy_of(1, step, obs.Replay.NOT_DONE, operator=operator, source=source, phase=Phase.LOSS)
    return replace(found, step=step, **changes)


# What was found of the first round, and what of a later one; the operator and the line that are told.
LINES = [
    (autopsy(5, None, None), autopsy(9, "aten.sqrt", "loss.py:7"), ("aten.sqrt", "loss.py:7")),
    (autopsy(5, "aten.sqrt", None), autopsy(9, "aten.sqrt", "loss.py:7"), ("aten.sqrt", "loss.py:7")),
    # Another fault, another rank's, another model's.
    (autopsy(5, "aten.sqrt", None), autopsy(9, "aten.acos", "loss.py:8"), ("aten.sqrt", None)),
    (autopsy(5, None, None), autopsy(9, "aten.sqrt", "loss.py:7", of_rank=0), (None, None)),
    (autopsy(5, None, None), autopsy(9, "aten.sqrt", "loss.py:7", root=3), (None, None)),
    # What a replay has seen stands.
    (
        autopsy(5, "aten.mm.default", None, replay=obs.Replay.REPRODUCED),
        autopsy(9, "aten.sqrt", "loss.py:7"),
        ("aten.mm.default", None),
    ),
]


@pytest.mark.parametrize(("first", "later", "expected"), LINES)
def test_a_recurrence_gives_the_first_its_line(first, later, expected):
    told = Told().hellos(2)
    bodies = [bad(5, phase=Phase.LOSS), first, bad(9, phase=Phase.LOSS), later]
    told.tell(batch("r1", 1, *bodies))
    told.tell(progress("r1", 60, 5, bad_rounds=2, last_bad_round=9), progress("r0", 60, 1, last_bad_round=9))
    operator = told.incident.verdict.first.operator
    assert (operator.name, operator.source) == expected
    assert any("when it came again, at step 9" in one for one in operator.missing) == (
        expected[1] is not None
    )


# What follows the bad round of step 5, and what is said of it.
FOLLOWS = [
    ([bad(9, "b")], "Rank 1 was bad again at step 9."),
    # Hashes that were not taken say nothing.
    ([bad(9)], "Rank 1 was bad again at step 9."),
    ([bad(9, "a"), bad(12, "c")], "Rank 1 was bad again at steps 9 and 12."),
    # By the update, or nobody knows.
    ([bad(6, weights_finite=False)], None),
    ([bad(6, weights_finite=None)], None),
    # What was reduced is still in the gradients.
    ([bad(6, phase=Phase.LOSS, model_step=5)], None),
    ([bad(6, phase=Phase.LOSS)], "Rank 1 was bad again at step 6."),
]


@pytest.mark.parametrize(("bodies", "says"), FOLLOWS)
def test_bad_again_by_itself(bodies, says):
    text = verdict(told_with(bad(5, "a"), *bodies))
    assert (says in text) if says else ("again" not in text)


def test_another_rank_that_is_bad_later_is_not_the_first_again():
    told = Told().hellos(2)
    told.tell(batch("r1", 1, bad(5)), batch("r0", 1, bad(9)))
    assert "again" not in verdict(told)


def test_later_incidents_of_an_attempt_know_the_earlier_ones():
    told = told_with(bad(5), bad(23), bad(41))
    texts = [
        " ".join(document.incident(one).verdict)
        for one in sorted(told.incidents, key=lambda one: one.evidence.first_round)
    ]
    assert len(texts) == 3
    assert "also first" not in texts[0]
    assert "Rank 1 was also first in an earlier incident, at step 5." in texts[1]
    assert "Rank 1 was also first in earlier incidents, at steps 5 and 23." in texts[2]


def test_of_many_steps_it_is_said_that_there_are_more():
    told = Told().hellos(2)
    for step in range(5, 5 + 18 * 30, 30):
        records = 1 + (step - 5) // 30
        told.tell(batch("r1", records, bad(step)))
        known = {"bad_rounds": records, "last_bad_round": step}
        told.tell(progress("r1", step + 25, 1 + records, **known), progress("r0", step + 25, 1))
    *_, but_one, last = (" ".join(document.incident(one).verdict) for one in told.incidents)
    assert re.search(r"earlier incidents, at steps 5, 35, (\d+, ){13}455 and more\.", last)
    assert re.search(r"earlier incidents, at steps 5, 35, (\d+, ){12}425 and 455\.", but_one)
    again = verdict(told_with(*(bad(step) for step in range(5, 23))))
    assert re.search(r"bad again at steps 6, (\d+, ){14}21 and more\.", again)


def test_another_first_rank_has_no_past():
    told = Told().hellos(2)
    told.tell(batch("r1", 1, bad(5)), batch("r0", 1, bad(23)))
    for rank in range(2):
        told.tell(progress(f"r{rank}", 60, 2, bad_rounds=1, last_bad_round=23))
    assert [one.verdict.before for one in told.incidents] == [(), ()]


def test_an_earlier_incident_that_is_revised_late_is_known_to_the_later():
    rounds, verdicts = [5, 23], set()
    for order in itertools.permutations(range(2)):
        told = Told().hellos(3)
        bodies = {0: [bad(5, phase=Phase.LOSS)], 1: [bad(step) for step in rounds]}
        for rank in order:
            told.tell(batch(f"r{rank}", 1, *bodies[rank]))
            count = len(bodies[rank])
            told.tell(progress(f"r{rank}", 60, 1 + count, bad_rounds=count, last_bad_round=23))
        told.tell(progress("r2", 60, 1, last_bad_round=23))
        verdicts.add(tuple((one.verdict.first.rank, one.verdict.before) for one in told.incidents))
    assert verdicts == {((1, ()), (1, (5,)))}


def test_a_rank_that_is_bad_without_end_is_told_in_little_space():
    bodies = [bad(5 + 2 * turn) for turn in range(25)]
    told = told_with(*bodies)
    (again,) = [one for one in told.incident.verdict.sentences if "again" in one]
    assert len(re.findall(r"\d+", again.partition(" at ")[2])) == 16


def test_buckets_of_a_round_may_arrive_apart():
    buckets = [bad(9, "a", bucket=0), bad(9, "a", bucket=1, phase=Phase.LOSS)]
    apart = Told().hellos(1).tell(batch("r0", 1, bad(5, "a")))
    for place, bucket in enumerate(buckets):
        apart.tell(batch("r0", 2 + place, bucket))
    at_once = Told().hellos(1).tell(batch("r0", 1, bad(5, "a"), *buckets))
    assert apart.incident.verdict == at_once.incident.verdict
    assert "Rank 0 was bad again at step 9, with the same batch." in verdict(at_once)
