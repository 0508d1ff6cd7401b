"""Replicas that are not the same: histories, and the verdict each must give."""

from __future__ import annotations

import itertools

import pytest

from gradwatch.collector.fold import fold
from gradwatch.collector.model import Cause, apply
from gradwatch.collector.replicas import differing, odd_ones
from tests.collector.bodies import checksum, model
from tests.collector.history import NOW, Told, batch, hello, nonfinite, progress, report


def with_names(world_size: int) -> Told:
    told = Told()
    for rank in range(world_size):
        names = ("a.weight", "a.bias", "b.weight", "b.bias") if rank == 0 else ()
        told.tell(batch(f"r{rank}", 0, hello(rank, world_size), model(*names)))
    return told


def test_the_replica_that_has_drifted_apart_is_named_with_its_parameter():
    told = with_names(3)
    for rank in range(3):
        told.tell(batch(f"r{rank}", 2, checksum(100, 50, 7, 9)))
    for rank in range(3):
        # Ordinal 2: the second bit.
        sums = (60, 8, 19) if rank == 1 else (50, 8, 9)
        told.tell(batch(f"r{rank}", 3, checksum(200, *sums)), progress(f"r{rank}", 201, 4))
    verdict = told.incident.verdict
    assert (verdict.cause, verdict.first.rank, verdict.first.step) == (Cause.REPLICA_DIVERGENCE, 1, 200)
    assert (verdict.first.parameter, verdict.clean_ranks, verdict.tie) == ("b.weight", (0, 2), False)
    assert "At step 100 all had still been alike." in verdict.sentences


def test_what_is_not_known_of_a_replica_is_not_claimed():
    # The collector was started again: names are told at the beginning of an attempt.
    told = Told().hellos(3)
    for rank in range(3):
        sums = (60, 8, 19) if rank == 1 else (50, 8, 9)
        # Nobody has passed the round yet.
        told.tell(batch(f"r{rank}", 1, checksum(200, *sums)))
    verdict = told.incident.verdict
    assert (verdict.first.rank, verdict.first.parameter, verdict.tie) == (1, None, False)
    assert verdict.sentences[0] == (
        "Rank 1 on node n1 has drifted apart: at step 200 (round 200) one parameter is not what it is on "
        "ranks 0 and 2."
    )


def test_a_checksum_may_come_with_the_hello():
    told = Told()
    for rank in range(2):
        told.tell(batch(f"r{rank}", 0, hello(rank), model("a.weight"), checksum(0, 7 + rank)))
    assert told.incident.verdict.cause is Cause.REPLICA_DIVERGENCE


def test_checksums_that_differ_while_an_incident_is_open_are_logged_once():
    told = with_names(3).tell(batch("r1", 2, nonfinite(99)))
    for rank in range(3):
        sums = (51, 7, 9) if rank == 1 else (50, 7, 9)
        told.tell(batch(f"r{rank}", 3, checksum(100, *sums)))
    assert {("r0", 3), ("r1", 3), ("r2", 3)} <= told.logged


def test_of_two_replicas_it_cannot_be_told_whose_is_right():
    told = with_names(2)
    for rank in range(2):
        told.tell(batch(f"r{rank}", 2, checksum(100, 50 + rank, 7, 9)), progress(f"r{rank}", 101, 3))
    verdict = told.incident.verdict
    assert ([origin.rank for origin in verdict.origins], verdict.tie) == ([0, 1], True)
    assert verdict.first.parameter == "a.weight"


def test_a_divergence_that_goes_on_is_told_once():
    told = with_names(3)
    for turn in range(4):
        for rank in range(3):
            sums = (51, 7, 9) if rank == 1 else (50, 7, 9)
            told.tell(batch(f"r{rank}", 2 + turn, checksum(100 * turn, *sums)))
            told.tell(progress(f"r{rank}", 100 * turn + 50, 3 + turn, reduced_round=100 * turn + 50))
    assert len(told.incidents) == 1


def test_checksums_that_agree_leave_nothing_behind():
    told = with_names(2)
    logged = []
    for turn, rank in itertools.product(range(5), range(2)):
        parts = [batch(f"r{rank}", 2 + turn, checksum(10 * turn, 5, 6))]
        changes = fold(told.state, report(*parts), told.config, NOW)
        logged += changes.events
        told.state = apply(told.state, changes)
    (attempt,) = told.state.attempts.values()
    assert attempt.checksums == ()
    assert logged == []


@pytest.mark.parametrize("ordinal", range(8))
def test_one_parameter_that_differs_spells_its_ordinal(ordinal):
    sums = [3, 14, 15, 9, 2, 6, 5, 35]

    def told_by(values: list[int]) -> list[int]:
        bits = [sum(value for place, value in enumerate(values) if place >> bit & 1) for bit in range(3)]
        return [sum(values), *bits]

    other = [value - 77 if place == ordinal else value for place, value in enumerate(sums)]
    assert differing(told_by(sums), told_by(other)) == ordinal
    two = [value + 5 if place in {1, 6} else value for place, value in enumerate(sums)]
    assert differing(told_by(sums), told_by(two)) is None


def test_a_majority_is_right():
    seen = {rank: checksum(1, 1 if rank == 2 else 0) for rank in range(4)}
    assert odd_ones(seen) == (2,)
    seen = {rank: checksum(1, rank // 2) for rank in range(4)}
    assert odd_ones(seen) == (0, 1, 2, 3)
