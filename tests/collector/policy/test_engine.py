"""When something is decided about an incident, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from pydantic import TypeAdapter

from gradwatch.collector.errors import IllegalTransitionError
from gradwatch.collector.observations import Skipped
from gradwatch.collector.policy.decision import Outcome, conclude
from gradwatch.collector.policy.decision_document import as_document
from gradwatch.collector.policy.dossier import Dossier, bad_steps_in_a_row, with_decision
from gradwatch.collector.policy.engine import decide
from gradwatch.collector.policy.model import Action
from gradwatch.collector.policy.refusals import Silence, refusal_to_perform
from tests.collector.history import batch, launch_ended, launch_started, nonfinite
from tests.collector.policy.story import BURST, ONE, ROLL_BACK, Story, checkpoint, policy


def test_nothing_is_decided_while_some_rank_may_still_have_been_first():
    story = Story(policy(ONE % "rank: 0")).start()
    story._bad[0].add(7)
    story.say(0, nonfinite(7))
    assert story.ask().silence is Silence.NOT_CONFIRMED
    assert story.decisions == ()
    story.passed(7)
    assert story.decision.rule == "it"


def test_the_first_rule_in_order_decides():
    text = "rules: [{name: a, match: {rank: 1}, action: warn}, {name: b, match: {step: 7}, action: ignore}]"
    assert Story(policy(text)).start().bad(7, rank=1).decision.rule == "a"
    assert Story(policy(text)).start().bad(7, rank=0).decision.rule == "b"


def test_with_no_rule_that_matches_it_is_said_once_the_incident_is_over():
    story = Story(policy("rules: [{name: a, match: {rank: 1}, action: warn}]")).start().bad(7)
    assert story.answer.silence is Silence.NO_MATCH
    assert story.decisions == ()
    story.passed(30)
    assert story.decision.action is Action.NONE
    assert story.decision.rule is None
    assert story.decision.reason == "no rule matches: a: rank is 0"
    assert story.decision.outcome is Outcome.RECORDED


def test_a_warning_waits_while_an_earlier_rule_may_yet_match():
    story = Story(policy(BURST)).start().saved(checkpoint(4)).bad(5).bad(6)
    assert story.decisions == ()
    assert story.answer.silence is Silence.MAY_YET_MATCH
    assert story.answer.reason == "other matches, but burst may yet: consecutive_bad_steps is 2"
    story.bad(7)
    assert (story.decision.rule, story.decision.action) == ("burst", Action.ROLLBACK)


def test_a_warning_is_given_when_the_incident_is_over():
    story = Story(policy(BURST)).start().bad(5).bad(6).passed(30)
    assert (story.decision.rule, story.decision.action) == ("other", Action.WARN)


def test_a_rollback_waits_for_nothing():
    text = BURST.replace("other, match: {}, action: warn", "other, match: {}, action: halt")
    story = Story(policy(text)).start().bad(5)
    assert (story.decision.rule, story.decision.action) == ("other", Action.HALT)


def test_a_decision_is_taken_once_per_incident():
    story = Story(policy(ONE % "cause: input")).start().bad(5).bad(6).bad(7).passed(30)
    assert len(story.decisions) == 1
    assert story.ask().silence is Silence.ALREADY_DECIDED
    # Also when the policy is another by now.
    story.policy = policy("rules: [{name: new, match: {}, action: halt}]")
    story.bad(31, rank=1)
    assert [one.rule for one in story.decisions] == ["else", "new"]
    assert len({one.id for one in story.decisions}) == 2


# ---------------------------------------------------------------- what is refused


def test_of_an_older_generation():
    story = Story(policy("rules: []")).start().bad(5)
    old = story.incidents[0].id
    story.start()
    answer = story.ask(old)
    assert answer.silence is Silence.STALE_GENERATION
    assert answer.reason == "it is of generation 0, and the job is in generation 1 by now"


def test_of_an_attempt_that_is_over():
    story = Story(policy("rules: []")).start().bad(5)
    story.start(generation=0)
    assert story.ask().silence is Silence.STALE_ATTEMPT
    assert story.decisions == ()


def test_a_second_rollback_of_a_generation():
    story = Story(policy(ROLL_BACK)).saved(checkpoint(1)).start().bad(5).bad(30)
    assert len(story.decisions) == 1
    answer = story.ask()
    assert answer.silence is Silence.CONFLICT
    assert story.decision.id in answer.reason
    # Once it has failed, another may be tried.
    failed = conclude(story.decision, Outcome.FAILED, "disk full")
    story.dossier = with_decision(story.dossier, failed)
    assert story.bad(60).decisions[-1].action is Action.ROLLBACK
    assert len(story.decisions) == 2


def test_when_the_job_has_ended():
    story = Story(policy("rules: []"))
    story._tell(batch("l", 0, launch_started()))
    story.start().bad(5)
    story._tell(batch("l", 1, launch_ended()))
    story.policy = policy("rules: [{name: a, match: {}, action: halt}]")
    assert story.ask().silence is Silence.JOB_ENDED


def test_a_relaunch_after_a_halt_is_judged_anew():
    story = Story(policy("mode: enforce\nrules: [{name: a, match: {}, action: halt}]"))
    story._tell(batch("l", 0, launch_started()))
    story.start().bad(5).bad(40)
    assert len(story.decisions) == 1
    story._tell(batch("l", 1, launch_ended(exit_code=93, ended_by="policy")))
    story._tell(batch("m", 0, launch_started("m")))
    assert len(story.start().bad(5).decisions) == 2


def test_what_is_pending_is_performed_in_its_generation_and_once():
    story = Story(policy(ROLL_BACK)).saved(checkpoint(1)).start().bad(5)
    assert refusal_to_perform(story.state, story.dossier, story.decision) is None
    performed = conclude(story.decision, Outcome.PERFORMED, "done")
    assert "performed at most once" in refusal_to_perform(story.state, story.dossier, performed)
    story.start()
    assert "the job is in generation 1" in refusal_to_perform(story.state, story.dossier, story.decision)
    with pytest.raises(IllegalTransitionError):
        conclude(performed, Outcome.FAILED, "again")


def test_the_same_case_gives_the_same_decision():
    one = Story(policy(ROLL_BACK)).saved(checkpoint(1)).start().bad(5)
    again = decide(one.state, replace(one.dossier, decisions=()), one.policy, one.decision.incident, one.now)
    assert again.decision == one.decision


def test_a_dossier_is_the_same_once_stored():
    story = Story(policy(ROLL_BACK)).saved(checkpoint(1), checkpoint(9, bad_buffers=("mask",))).start().bad(5)
    story.say(0, Skipped(step=6, round=6, consecutive=1, in_last_1000=1, exhausted=True))
    codec = TypeAdapter(Dossier)
    assert codec.validate_json(codec.dump_json(story.dossier)) == story.dossier
    assert json.dumps(as_document(story.decision))


def test_overflows_of_a_loss_scale_are_no_bad_steps():
    story = Story(policy(BURST)).start().saved(checkpoint(4))
    for round_ in range(5, 9):
        story.say(0, nonfinite(round_, loss_scale_overflow=True))
    assert bad_steps_in_a_row(story.dossier, story.state, story.state.jobs["j"].current) is None
    assert story.decisions == ()
    # They do not make a burst of the one bad step after them.
    story.bad(9)
    assert bad_steps_in_a_row(story.dossier, story.state, story.state.jobs["j"].current) == 1
    assert story.decisions == ()
