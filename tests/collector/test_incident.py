"""The incident's state machine, against its table."""

from __future__ import annotations

import itertools

import pytest

from gradwatch.collector.errors import IllegalTransitionError
from gradwatch.collector.incident import TRANSITIONS, Step, next_status
from gradwatch.collector.model import Status


def test_it_is_confirmed_before_it_is_closed():
    status = None
    for step in (Step.OPEN, Step.REVISE, Step.CONFIRM, Step.REVISE, Step.CLOSE, Step.REVISE):
        status = next_status(status, step)
    assert status is Status.CLOSED


@pytest.mark.parametrize(
    ("status", "step"),
    [pair for pair in itertools.product([None, *Status], Step) if pair not in TRANSITIONS],
)
def test_a_step_that_is_not_in_the_table_is_an_error(status: Status | None, step: Step):
    with pytest.raises(IllegalTransitionError, match=step.value):
        next_status(status, step)


def test_every_status_can_be_reached_and_revised():
    assert {*TRANSITIONS.values()} == {*Status}
    assert {status for status, step in TRANSITIONS if step is Step.REVISE} == {*Status}
