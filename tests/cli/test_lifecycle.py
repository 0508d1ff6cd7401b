"""The launcher's state machine: tables, with the time passed in."""

from __future__ import annotations

import dataclasses

import pytest

from gradwatch.agent.launch.orders import Action, Order, parse
from gradwatch.cli.launcher import lifecycle
from gradwatch.cli.launcher.lifecycle import Act, Facts, Life, Rules, State, Why
from gradwatch.cli.launcher.report import EndedBy, Ending

RULES = Rules(obeys=True)
LIVES = Facts()
GONE = Facts(status=-15)
FAILED = Facts(status=3)
WELL = Facts(status=0)
TERM = 15

START_0 = Order("", Action.START, 0)
START_1 = Order("d", Action.START, 1)
STOP_0 = Order("d", Action.STOP, 0)
HALT = Order("h", Action.HALT, 0)
RELEASE_0 = Order("", Action.RELEASE, 0)

WAITING = Life(State.WAITING, 0, 0.0)
RUNNING = Life(State.RUNNING, 0, 0.0, START_0)
STOPPING = Life(State.STOPPING, 0, 0.0, STOP_0, kill_at=40.0, acted=frozenset({("d", Action.STOP)}))
HALTING = dataclasses.replace(STOPPING, order=HALT)
STOPPED = dataclasses.replace(STOPPING, state=State.STOPPED)
CLEARING = Life(State.STOPPING, 0, 0.0, None, kill_at=5.0)
WAITED_FOR = dataclasses.replace(CLEARING, waits_until=600.0)
CRASHED = Life(State.STOPPED, 0, 0.0, None)

HALTED = Ending(93, EndedBy.HALTED)
DUE = Ending(75, EndedBy.ROLLBACK_DUE)
BY_USER = Ending(143, EndedBy.SIGNAL)
OWN = Ending(3, EndedBy.COMMAND)


def order(base: Order, **changes: object) -> Order:
    return dataclasses.replace(base, **changes)


def facts(base: Facts, **changes: object) -> Facts:
    return dataclasses.replace(base, **changes)


@pytest.mark.parametrize(
    ("life", "given", "how", "now", "state", "act"),
    [
        # the first order starts the command, in its generation; a generation below our own is stale
        (WAITING, None, LIVES, 19.9, State.WAITING, Act.NOTHING),
        (WAITING, START_0, LIVES, 1.0, State.RUNNING, Act.START),
        (WAITING, order(START_0, generation=4), LIVES, 1.0, State.RUNNING, Act.START),
        (dataclasses.replace(WAITING, generation=2), START_1, LIVES, 1.0, State.WAITING, Act.NOTHING),
        # nobody answers: training does not wait for us
        (WAITING, None, LIVES, 20.0, State.RUNNING, Act.START),
        # a host that comes back amid a rollback is stopped already, and waits for the others
        (WAITING, STOP_0, LIVES, 20.0, State.WAITING, Act.NOTHING),
        (WAITING, RELEASE_0, LIVES, 1.0, State.WAITING, Act.NOTHING),
        # one for an earlier generation is no answer
        (dataclasses.replace(WAITING, generation=2), START_1, LIVES, 20.0, State.RUNNING, Act.START),
        # a stop is for just the generation that runs
        (RUNNING, STOP_0, LIVES, 1.0, State.STOPPING, Act.TERMINATE),
        (RUNNING, order(STOP_0, generation=1), LIVES, 1.0, State.RUNNING, Act.NOTHING),
        (dataclasses.replace(RUNNING, generation=1), STOP_0, LIVES, 1.0, State.RUNNING, Act.NOTHING),
        # what does not concern a running command
        (RUNNING, START_0, LIVES, 1.0, State.RUNNING, Act.NOTHING),
        (RUNNING, START_1, LIVES, 1.0, State.RUNNING, Act.NOTHING),
        (RUNNING, RELEASE_0, LIVES, 1.0, State.RUNNING, Act.NOTHING),
        (RUNNING, HALT, LIVES, 1.0, State.STOPPING, Act.TERMINATE),
        # the user has asked for the end: no order stops what ends anyway
        (RUNNING, STOP_0, facts(LIVES, user_signal=TERM), 1.0, State.RUNNING, Act.NOTHING),
        # it ended by itself: first what it left behind
        (RUNNING, STOP_0, FAILED, 1.0, State.STOPPING, Act.NOTHING),
        # ranks that work on after a command that ended well are waited for, but not for ever
        (CLEARING, None, facts(WELL, left=2, ranks_left=1), 1.0, State.STOPPING, Act.WAIT_FOR_RANKS),
        (WAITED_FOR, None, facts(WELL, left=2, ranks_left=1), 599.0, State.STOPPING, Act.NOTHING),
        (WAITED_FOR, None, facts(WELL, left=2, ranks_left=1), 600.0, State.STOPPING, Act.TERMINATE_LEFT),
        (WAITED_FOR, None, facts(WELL, left=1), 30.0, State.STOPPING, Act.TERMINATE_LEFT),
        (WAITED_FOR, None, facts(WELL, left=1, ranks_left=1, user_signal=TERM), 1.0,
         State.STOPPING, Act.TERMINATE_LEFT),
        (WAITED_FOR, None, facts(WELL), 30.0, State.ENDED, Act.END),
        (CLEARING, None, facts(FAILED, left=1, ranks_left=1), 1.0, State.STOPPING, Act.TERMINATE_LEFT),
        # patience while the command ends, then for what it left behind, then none
        (STOPPING, STOP_0, LIVES, 39.9, State.STOPPING, Act.NOTHING),
        (STOPPING, STOP_0, LIVES, 40.0, State.STOPPING, Act.KILL),
        (STOPPING, STOP_0, facts(GONE, left=2), 1.0, State.STOPPING, Act.TERMINATE_LEFT),
        (dataclasses.replace(STOPPING, left_told=True), None, facts(GONE, left=2), 39.9,
         State.STOPPING, Act.NOTHING),
        (dataclasses.replace(STOPPING, left_told=True), None, facts(GONE, left=2), 40.0,
         State.STOPPING, Act.KILL),
        (CLEARING, None, facts(GONE, left=1, user_signal=TERM, impatient=True), 1.0,
         State.STOPPING, Act.KILL),
        (CLEARING, None, facts(GONE, left=1, user_signal=TERM), 1.0, State.STOPPING, Act.TERMINATE_LEFT),
        # only then is it stopped
        (STOPPING, STOP_0, GONE, 1.0, State.STOPPED, Act.REPORT),
        (CLEARING, None, FAILED, 1.0, State.STOPPED, Act.REPORT),
        # after a stop only a later generation starts
        (STOPPED, START_0, GONE, 1.0, State.STOPPED, Act.NOTHING),
        (STOPPED, order(START_1, generation=0), GONE, 1.0, State.STOPPED, Act.NOTHING),
        (STOPPED, START_1, GONE, 1.0, State.RUNNING, Act.START),
        (STOPPED, RELEASE_0, GONE, 1.0, State.STOPPED, Act.NOTHING),
        (STOPPED, STOP_0, GONE, 1.0, State.STOPPED, Act.NOTHING),
        (STOPPED, None, GONE, 299.9, State.STOPPED, Act.NOTHING),
        (STOPPED, None, facts(GONE, heard_at=100.0), 399.0, State.STOPPED, Act.NOTHING),
        # one that failed by itself may have failed of what is being decided on
        (CRASHED, None, FAILED, 14.9, State.STOPPED, Act.NOTHING),
        (CRASHED, STOP_0, FAILED, 1.0, State.STOPPED, Act.REPORT),
        (CRASHED, START_1, FAILED, 1.0, State.RUNNING, Act.START),
        (CRASHED, START_0, FAILED, 1.0, State.STOPPED, Act.NOTHING),
        (CRASHED, order(RELEASE_0, generation=1), FAILED, 1.0, State.STOPPED, Act.NOTHING),
    ],
)  # fmt: skip
def test_what_is_done(life, given, how, now, state, act):
    after, done = lifecycle.step(life, given, how, RULES, now)
    assert (after.state, done) == (state, act)


@pytest.mark.parametrize(
    ("life", "given", "how", "rules", "now", "ending", "why"),
    [
        # the command's own end
        (CLEARING, None, Facts(status=0), RULES, 1.0, Ending(0, EndedBy.COMMAND), Why.OWN),
        (CLEARING, None, FAILED, Rules(), 1.0, OWN, Why.OWN),
        (CLEARING, None, GONE, Rules(), 1.0, BY_USER, Why.OWN),
        (CRASHED, RELEASE_0, FAILED, RULES, 1.0, OWN, Why.OWN),
        (CRASHED, None, FAILED, RULES, 15.0, OWN, Why.OWN),
        # the user's
        (WAITING, START_0, facts(LIVES, user_signal=TERM), RULES, 1.0, BY_USER, Why.OWN),
        (STOPPED, START_1, facts(GONE, user_signal=TERM), RULES, 1.0, BY_USER, Why.OWN),
        (STOPPING, STOP_0, facts(GONE, user_signal=TERM), RULES, 1.0, BY_USER, Why.OWN),
        (CLEARING, STOP_0, facts(FAILED, user_signal=TERM), RULES, 1.0, Ending(3, EndedBy.SIGNAL), Why.OWN),
        (CRASHED, START_1, facts(FAILED, user_signal=TERM), RULES, 1.0, Ending(3, EndedBy.SIGNAL), Why.OWN),
        # halted
        (WAITING, HALT, LIVES, RULES, 1.0, HALTED, Why.ORDERED),
        (HALTING, HALT, GONE, RULES, 1.0, HALTED, Why.ORDERED),
        (STOPPING, HALT, GONE, RULES, 1.0, HALTED, Why.ORDERED),
        (STOPPED, HALT, GONE, RULES, 1.0, HALTED, Why.ORDERED),
        (CRASHED, HALT, FAILED, RULES, 1.0, HALTED, Why.ORDERED),
        # the collector is silent
        (STOPPED, None, GONE, RULES, 300.0, HALTED, Why.NO_ANSWER),
        (STOPPED, None, facts(GONE, heard_at=100.0), RULES, 400.0, HALTED, Why.NO_ANSWER),
        (WAITING, STOP_0, LIVES, RULES, 300.0, HALTED, Why.NO_ANSWER),
        # never without what is to be resumed
        (STOPPED, START_1, facts(GONE, cannot_resume="no"), RULES, 1.0, HALTED, Why.CANNOT_RESUME),
        (WAITING, START_0, facts(LIVES, cannot_resume="no"), RULES, 1.0, HALTED, Why.CANNOT_RESUME),
        # the restart is left to a supervisor
        (STOPPED, START_1, GONE, Rules(obeys=True, restarts=False), 1.0, DUE, Why.ORDERED),
        (STOPPED, order(START_1, exclude_node="bad"), GONE, RULES, 1.0, DUE, Why.EXCLUDE_NODE),
    ],
)
def test_how_it_ends(life, given, how, rules, now, ending, why):
    after, act = lifecycle.step(life, given, how, rules, now)
    assert (after.state, act, after.ending, after.why) == (State.ENDED, Act.END, ending, why)


def test_the_same_order_again_changes_nothing():
    life, act = lifecycle.step(RUNNING, STOP_0, LIVES, RULES, 1.0)
    life, act = lifecycle.step(life, STOP_0, GONE, RULES, 2.0)
    life, act = lifecycle.step(life, START_1, GONE, RULES, 3.0)
    assert (life.generation, act) == (1, Act.START)
    # The command of generation 1 fails; both orders come again, even with a generation that would fit.
    life = dataclasses.replace(life, state=State.STOPPED, order=None, since=4.0)
    for again in (START_1, order(START_1, generation=2), order(STOP_0, generation=1)):
        assert lifecycle.step(life, again, FAILED, RULES, 5.0)[1] is Act.NOTHING


def test_a_silent_collector_counts_from_its_last_word_once_it_has_answered():
    life, _ = lifecycle.step(WAITING, STOP_0, LIVES, RULES, 1.0)
    life, act = lifecycle.step(life, None, LIVES, RULES, 25.0)
    assert (life.state, act) == (State.WAITING, Act.NOTHING)


def test_the_host_to_leave_out_is_known_only_when_the_run_ended_for_it():
    excluding = order(START_1, exclude_node="bad")
    assert lifecycle.step(STOPPED, excluding, GONE, RULES, 1.0)[0].exclude_node == "bad"
    assert lifecycle.step(WAITING, excluding, LIVES, RULES, 1.0)[0].exclude_node is None


def test_without_a_policy_nothing_is_obeyed():
    life, act = lifecycle.begin(Rules(), 0, 0.0)
    assert (life.state, act) == (State.RUNNING, Act.START)
    assert lifecycle.step(life, STOP_0, LIVES, Rules(), 1.0) == (life, Act.NOTHING)
    life, act = lifecycle.begin(RULES, 0, 0.0)
    assert (life.state, act) == (State.WAITING, Act.NOTHING)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        (b'{"job": "j", "launch": "l", "action": "ACTION_STOP"}', Order("", Action.STOP, 0)),
        (
            b"""{"id": "d", "job": "j", "launch": "l", "generation": 2, "action": "ACTION_START",
                 "reason": "r", "resume_path": "/c", "resume_step": "7",
                 "skip_batches": 3, "exclude_node": "n"}""",
            Order("d", Action.START, 2, "r", "/c", 7, 3, "n"),
        ),
        # the step 0 is a step
        (
            b'{"job": "j", "launch": "l", "action": "ACTION_START", "resume_path": "/c", "resume_step": "0"}',
            Order("", Action.START, 0, resume_path="/c", resume_step=0),
        ),
        # for others, of later versions, or nothing
        (b'{"job": "k", "launch": "l", "action": "ACTION_STOP"}', None),
        (b'{"job": "j", "launch": "m", "action": "ACTION_STOP"}', None),
        (b'{"job": "j", "launch": "l", "action": "ACTION_DANCE"}', None),
        (b'{"job": "j", "launch": "l"}', None),
        (b'{"job": "j", "launch": "l", "action": "ACTION_STOP", "generation": "x"}', None),
        (b"[]", None),
        (b"{", None),
        (b"", None),
    ],
)
def test_an_order_is_read(text, read):
    assert parse(text, job="j", launch="l") == read
