"""What is done about Ray's worker groups: tables, with the time passed in."""

from __future__ import annotations

import dataclasses

import pytest

from gradwatch.agent.integrations.ray import lifecycle
from gradwatch.agent.integrations.ray.lifecycle import Act, Life, Rules, State
from gradwatch.agent.launch.orders import Action, Order

RULES = Rules(obeys=True)
START_0 = Order("", Action.START, 0)
START_1 = Order("d", Action.START, 1, resume_path="/runs/r/checkpoint_1")
STOP_0 = Order("d", Action.STOP, 0)
HALT = Order("h", Action.HALT, 0)

WAITING = lifecycle.begin(0, 0.0)
RUNNING = Life(State.RUNNING, 0, 0.0, START_0)
STOPPING = Life(State.STOPPING, 0, 0.0, STOP_0, acted=frozenset({("d", Action.STOP, 0)}))
STOPPED = dataclasses.replace(STOPPING, state=State.STOPPED)
CRASHED = Life(State.STOPPED, 0, 0.0, None)


def order(base: Order, **changes: object) -> Order:
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("life", "told", "act"),
    [
        (RUNNING, None, Act.NOTHING),
        (RUNNING, START_0, Act.NOTHING),
        (RUNNING, STOP_0, Act.FAIL),
        (RUNNING, order(STOP_0, generation=1), Act.NOTHING),
        (RUNNING, HALT, Act.HALT),
        (STOPPING, STOP_0, Act.NOTHING),
        (WAITING, STOP_0, Act.NOTHING),
    ],
)
def test_while_a_group_runs(life, told, act):
    after, done = lifecycle.polled(life, told, RULES)
    assert done is act
    assert (after == life) is (act is Act.NOTHING)


def test_without_a_policy_no_order_is_obeyed_and_every_group_is_a_generation():
    rules = Rules(obeys=False)
    assert lifecycle.polled(RUNNING, STOP_0, rules) == (RUNNING, Act.NOTHING)
    life, act = lifecycle.between(WAITING, None, rules, heard_at=0.0, now=1.0)
    assert (life.state, life.generation, act) == (State.RUNNING, 0, Act.START)
    life, act = lifecycle.between(life, None, rules, heard_at=0.0, now=2.0)
    assert (life.state, life.generation, act) == (State.RUNNING, 1, Act.START)


@pytest.mark.parametrize(
    ("life", "told", "now", "act", "generation"),
    [
        # The first group.
        (WAITING, None, 19.9, Act.NOTHING, 0),
        (WAITING, None, 20.0, Act.START, 0),
        (WAITING, START_0, 1.0, Act.START, 0),
        (WAITING, order(START_0, generation=4), 1.0, Act.START, 4),
        (WAITING, HALT, 1.0, Act.HALT, 0),
        # Gone, for an order or by itself: said first.
        (STOPPING, STOP_0, 1.0, Act.REPORT, 0),
        (RUNNING, None, 1.0, Act.REPORT, 0),
        # Stopped for an order.
        (STOPPED, STOP_0, 1.0, Act.NOTHING, 0),
        (STOPPED, START_0, 1.0, Act.NOTHING, 0),
        (STOPPED, START_1, 1.0, Act.START, 1),
        (STOPPED, HALT, 1.0, Act.HALT, 0),
        (STOPPED, None, 299.9, Act.NOTHING, 0),
        (STOPPED, None, 300.0, Act.HALT, 0),
        # Failed by itself: what is decided about that is waited for, and Ray goes on in any case.
        (CRASHED, None, 14.9, Act.NOTHING, 0),
        (CRASHED, None, 15.0, Act.START, 1),
        (CRASHED, START_0, 1.0, Act.NOTHING, 0),
        (CRASHED, START_1, 1.0, Act.START, 1),
        (CRASHED, STOP_0, 1.0, Act.REPORT, 0),
        (CRASHED, HALT, 1.0, Act.HALT, 0),
    ],
)
def test_between_two_groups(life, told, now, act, generation):
    after, done = lifecycle.between(life, told, RULES, heard_at=0.0, now=now)
    assert (done, after.generation) == (act, generation)
    assert (after.state is State.RUNNING) is (act is Act.START)


def test_a_collector_that_lives_is_waited_for():
    assert lifecycle.between(STOPPED, STOP_0, RULES, heard_at=200.0, now=499.0) == (STOPPED, Act.NOTHING)


def test_a_rollback_and_then_a_crash_before_the_next_report_start_from_the_same_checkpoint():
    life, act = lifecycle.polled(RUNNING, STOP_0, RULES)
    acts = [act]
    for told in (STOP_0, STOP_0, START_1):
        life, act = lifecycle.between(life, told, RULES, heard_at=0.0, now=1.0)
        acts.append(act)
    assert acts == [Act.FAIL, Act.REPORT, Act.NOTHING, Act.START]
    assert life.order == START_1
    # Ray starts the group anew, and the collector names the same decision and pin.
    life, act = lifecycle.between(life, START_1, RULES, heard_at=0.0, now=2.0)
    assert act is Act.REPORT
    life, act = lifecycle.between(life, START_1, RULES, heard_at=0.0, now=2.0)
    assert act is Act.NOTHING
    again = order(START_1, generation=2)
    life, act = lifecycle.between(life, again, RULES, heard_at=0.0, now=2.0)
    assert (act, life.generation, life.order) == (Act.START, 2, again)
    # And when nobody answers, the pin is kept.
    life, _ = lifecycle.between(life, None, RULES, heard_at=0.0, now=3.0)
    life, act = lifecycle.between(life, None, RULES, heard_at=0.0, now=18.0)
    assert (act, life.generation, life.order, life.pin) == (Act.START, 3, None, again)
