"""Documents of jobs with more incidents than one has room for."""

from __future__ import annotations

import json

import pytest

from gradwatch.collector import document
from tests.collector.history import Told, batch, nonfinite, progress

ROUNDS = (5, 25, 45, 65)


@pytest.fixture
def told() -> Told:
    told = Told().hellos(1)
    for number, round_ in enumerate(ROUNDS, start=1):
        told.tell(
            batch("r0", number, nonfinite(round_)),
            progress("r0", round_ + 15, number + 1, bad_rounds=number, last_bad_round=round_),
        )
    assert [one.evidence.first_round for one in told.incidents] == [*ROUNDS]
    return told


@pytest.mark.parametrize(("newest", "listed"), [(None, ROUNDS), (9, ROUNDS), (3, (25, 45, 65)), (0, ())])
def test_the_newest_incidents_are_listed_and_the_others_counted(
    told: Told, newest: int | None, listed: tuple[int, ...]
):
    job = document.job(told.state, "j", newest=newest)
    assert tuple(one.round for one in job.incidents) == listed
    assert job.incidents_left_out == len(ROUNDS) - len(listed)


def test_a_document_that_is_too_long_leaves_out_the_oldest_too(told: Told):
    job = document.job(told.state, "j", newest=3)
    whole = document.as_json(job, 1 << 20)
    short = document.as_json(job, len(whole) - 1)
    assert len(short) < len(whole)
    assert [one["round"] for one in json.loads(short)["incidents"]] == [65]
    assert json.loads(short)["incidents_left_out"] == 3
