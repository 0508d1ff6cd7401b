"""Which rollbacks are decided on: the target, the budgets, the cooldown."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gradwatch.collector.policy.decision import Outcome, Target, Unfit
from gradwatch.collector.policy.model import Action
from gradwatch.collector.policy.refusals import Silence
from tests.collector.policy.story import ROLL_BACK, Story, checkpoint, policy


def test_a_rollback_names_where_it_goes_and_what_it_moves():
    text = ROLL_BACK + "    rollback: {skip_batches: 2}\n"
    story = Story(policy(text)).start()
    story.saved(checkpoint(4), checkpoint(9, finite=False), checkpoint(None, seen_at=story.now + 9))
    decision = story.bad(5, rank=1).decision
    assert (decision.action, decision.outcome) == (Action.ROLLBACK, Outcome.PENDING)
    assert decision.checkpoint == Target("/ckpts/4", 4)
    assert decision.quarantine == ("/ckpts/None", "/ckpts/9")
    assert decision.effect == "resume /ckpts/4, move /ckpts/None and /ckpts/9"
    assert (decision.first_bad_step, decision.skip_batches, decision.rule) == (5, 2, "any")
    assert [one.unfit for one in decision.evidence.passed_over] == [Unfit.STEP_UNKNOWN, Unfit.NONFINITE]
    assert decision.exclude_node is None


def test_a_dry_run_says_what_would_be():
    story = Story(policy(ROLL_BACK.replace("enforce", "dry_run"))).start()
    decision = story.saved(checkpoint(4), checkpoint(9)).bad(5).decision
    assert decision.outcome is Outcome.DRY_RUN
    assert decision.effect == "would resume /ckpts/4, would move /ckpts/9"
    # Nothing was done: what comes next is decided as if it had not been.
    assert story.bad(30).decisions[-1].action is Action.ROLLBACK


def test_a_halt_in_a_dry_run():
    story = Story(policy("rules: [{name: a, match: {}, action: halt}]")).start()
    assert story.bad(5).decision.effect == "would stop the job with exit code 93"
    assert story.bad(30).ask().silence is Silence.HALTED


def test_with_the_node_of_the_first_rank_left_out():
    text = ROLL_BACK.replace("action: rollback", "action: rollback, exclude_node: true")
    story = Story(policy(text)).start().saved(checkpoint(4))
    assert story.bad(5, rank=1).decision.exclude_node == "n1"


NO_GOOD = [
    # Nothing was ever saved.
    ([], "no checkpoint is known"),
    # All that there is is poisoned, torn or too new.
    ([checkpoint(4, finite=False)], "/ckpts/4 holds non-finite parameters or optimizer state"),
    ([checkpoint(4, complete=False), checkpoint(3, gone=True)], "/ckpts/4 is not complete, and 1 more are"),
    ([checkpoint(5)], "/ckpts/5 is of step 5, not older than the first bad step 5"),
]


@pytest.mark.parametrize(("ledger", "why"), NO_GOOD)
def test_with_no_good_checkpoint_it_is_looked_once_more_or_the_job_goes_on(ledger: list, why: str):
    decision = Story(policy(ROLL_BACK)).saved(*ledger).start().bad(5).decision
    assert (decision.action, decision.outcome, decision.checkpoint) == (
        Action.ROLLBACK,
        Outcome.PENDING,
        None,
    )
    assert f"no good checkpoint is known yet ({why}" in decision.reason
    dry = Story(policy(ROLL_BACK.replace("enforce", "dry_run"))).saved(*ledger).start().bad(5).decision
    assert (dry.action, dry.outcome) == (Action.HALT, Outcome.DRY_RUN)
    assert "there is no good checkpoint: " + why in dry.reason
    story = Story(policy(ROLL_BACK + "    on_no_good_checkpoint: warn")).saved(*ledger).start().bad(5)
    assert (story.decision.action, story.decision.outcome) == (Action.WARN, Outcome.RECORDED)
    assert why in story.decision.reason


def test_a_margin_is_kept():
    text = ROLL_BACK + "    rollback: {margin_steps: 10}"
    story = Story(policy(text)).saved(checkpoint(30), checkpoint(20), checkpoint(19)).start().bad(30)
    assert story.decision.checkpoint == Target("/ckpts/19", 19)


# ---------------------------------------------------------------- budgets and cooldown

BUDGETS = ROLL_BACK + "    budgets: [{scope: %s, max: 2%s}]\n"


def flap(story: Story, *bad: int) -> Story:
    """In each generation it is bad in one step, and rolled back."""
    for step in bad:
        story.start().bad(step)
        if story.decisions[-1].action is Action.ROLLBACK:
            story.perform()
        story.wait(60)
    return story


def test_a_job_has_so_many_rollbacks():
    story = flap(Story(policy(BUDGETS % ("job", ""))).saved(checkpoint(1)), 5, 6, 7)
    assert [one.action for one in story.decisions] == [Action.ROLLBACK, Action.ROLLBACK, Action.HALT]
    assert story.decisions[-1].reason.endswith(
        "the budget job is used up: 2 rollbacks of this job, and 2 allowed"
    )
    assert story.decisions[-1].effect == "stop the job with exit code 93"


def test_a_budget_over_a_time_is_given_back_with_time():
    story = flap(Story(policy(BUDGETS % ("job", ", per: 1h"))).saved(checkpoint(1)), 5, 6)
    story.wait(3600 - 121)
    assert flap(story, 7).decisions[-1].action is Action.HALT
    story = flap(Story(policy(BUDGETS % ("job", ", per: 1h"))).saved(checkpoint(1)), 5, 6)
    story.wait(3600 - 119)
    assert flap(story, 7).decisions[-1].action is Action.ROLLBACK


def test_the_same_first_bad_step_again():
    story = flap(Story(policy(BUDGETS % ("same_first_bad_step", ""))).saved(checkpoint(1)), 5, 6, 5, 6, 7)
    assert {one.action for one in story.decisions} == {Action.ROLLBACK}
    assert "the budget same_first_bad_step is used up: 2 rollbacks" in flap(story, 5).decisions[-1].reason


def test_without_progress():
    story = flap(Story(policy(BUDGETS % ("no_progress", ""))).saved(checkpoint(1)), 5, 6)
    # A newer good checkpoint is progress.
    flap(story.saved(checkpoint(6)), 8, 9)
    assert {one.action for one in story.decisions} == {Action.ROLLBACK}
    assert (
        "the budget no_progress is used up: 2 rollbacks without a newer"
        in flap(story, 9).decisions[-1].reason
    )


def test_to_fall_back_and_come_again_to_where_it_was_is_no_progress():
    story = flap(Story(policy(BUDGETS % ("no_progress", ""))).saved(checkpoint(1), checkpoint(4)), 5, 3)
    flap(story.saved(checkpoint(4)), 5)
    assert [one.action for one in story.decisions] == [Action.ROLLBACK, Action.ROLLBACK, Action.HALT]


def test_a_budget_of_none():
    story = flap(Story(policy(ROLL_BACK + "    budgets: [{scope: job, max: 0}]")).saved(checkpoint(1)), 5)
    assert "0 rollbacks of this job, and 0 allowed" in story.decision.reason


def test_what_a_dry_run_would_have_done_is_not_taken_from_the_budget():
    story = Story(policy((BUDGETS % ("job", "")).replace("enforce", "dry_run"))).saved(checkpoint(1)).start()
    story.bad(5).bad(30).bad(60)
    assert [one.action for one in story.decisions] == [Action.ROLLBACK, Action.ROLLBACK, Action.HALT]
    story.policy = policy(BUDGETS % ("job", ""))
    # The halt that would have been stands until the job is started again; the next one decides anew.
    story.dossier = replace(story.dossier, decisions=story.decisions[:2])
    assert story.start().bad(5).decisions[-1].outcome is Outcome.PENDING


def test_a_job_may_go_on_when_a_budget_is_used_up():
    text = BUDGETS % ("job", "") + "    on_budget_exhausted: warn"
    story = flap(Story(policy(text)).saved(checkpoint(1)), 5, 6, 7)
    assert (story.decisions[-1].action, story.decisions[-1].outcome) == (Action.WARN, Outcome.RECORDED)


def test_a_rollback_waits_for_the_cooldown():
    story = flap(Story(policy(ROLL_BACK + "    cooldown: 10m")).saved(checkpoint(1)), 5)
    story.start().bad(6)
    assert story.answer.silence is Silence.COOLDOWN
    assert story.answer.ask_again_at == story.decisions[0].at + 600
    assert len(story.wait(539).decisions) == 1
    assert story.wait(2).decisions[-1].action is Action.ROLLBACK


def test_an_incident_that_is_over_before_the_cooldown_is_left():
    story = flap(Story(policy(ROLL_BACK + "    cooldown: 10m")).saved(checkpoint(1)), 5)
    story.start().bad(6).passed(30)
    assert story.decisions[-1].action is Action.NONE
    assert "after the cooldown, and by now the incident is over" in story.decisions[-1].reason
