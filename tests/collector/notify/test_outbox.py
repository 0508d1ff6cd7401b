"""Which incidents somebody is told of, and what an answer means."""

from __future__ import annotations

import pytest

from gradwatch.collector.notify.outbox import NEWS_SECONDS, due, is_final
from tests.collector.history import NOW, Told, batch, nonfinite, progress


def told_of_one() -> Told:
    return Told().hellos(2).tell(batch("r1", 1, nonfinite(5)), progress("r1", 6, 2, bad_rounds=1))


def test_an_incident_is_told_of_once_it_is_confirmed_and_while_it_is_news():
    told = told_of_one()
    assert due(told.state, set(), NOW) == []  # rank 0 may still say that it was first
    told.tell(progress("r0", 6, 1, last_bad_round=5))
    assert due(told.state, set(), NOW) == [told.incident]
    assert due(told.state, {told.incident.id}, NOW) == []
    assert due(told.state, set(), NOW + NEWS_SECONDS - 1) == [told.incident]
    assert due(told.state, set(), NOW + NEWS_SECONDS) == []


def test_one_that_closed_meanwhile_is_still_told_of():
    told = told_of_one().tell(progress("r0", 6, 1, last_bad_round=5))
    told.tell(*(progress(f"r{rank}", 30, 1 + rank, last_bad_round=5, bad_rounds=rank) for rank in range(2)))
    assert told.incident.closed_at is not None
    assert due(told.state, set(), NOW) == [told.incident]


@pytest.mark.parametrize(
    ("status", "final"),
    [
        (400, True),
        (401, True),
        (404, True),
        (410, True),
        (408, False),
        (429, False),
        (500, False),
        (503, False),
        (302, False),
    ],
)
def test_what_an_answer_means(status, final):
    assert is_final(status) is final
