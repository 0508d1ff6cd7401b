"""What is decided about an incident, and why."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from pydantic import TypeAdapter

from gradwatch.collector.errors import IllegalTransitionError
from gradwatch.collector.observations import GuardOff, Phase, Skipped, Value
from gradwatch.collector.policy.decision import Outcome, Target, Unfit, Verdict, conclude
from gradwatch.collector.policy.decision_document import as_document
from gradwatch.collector.policy.dossier import Dossier, with_decision
from gradwatch.collector.policy.engine import decide
from gradwatch.collector.policy.model import Action
from gradwatch.collector.policy.refusals import Silence, refusal_to_perform
from tests.collector.history import batch, gradient, launch_ended, launch_started, nonfinite
from tests.collector.policy.story import ROLL_BACK, Story, checkpoint, policy

ONE = """
    guard: {on_nonfinite: skip_step, max_consecutive: 3}
    rules:
      - {name: it, match: {%s}, action: warn}
      - {name: else, match: {}, action: ignore}
"""

INPUT = {"phase": Phase.INPUT}
BAD = gradient("layers.3.weight", value=Value.NEGATIVE_INFINITY)
MATCHES = [
    # (match, whether rank 1's -inf in layers.3.weight in step 7, that began in the input, matches)
    ("", True),
    ("cause: input", True),
    ("cause: [loss, input]", True),
    ("cause: loss", False),
    ("phase: input", True),
    ("phase: [forward, loss]", False),
    ("value: -inf", True),
    ("value: [nan, +inf]", False),
    ("step: 7", True),
    ("step: '<7'", False),
    ("rank: 1", True),
    ("rank: '!=1'", False),
    ("node: n1", True),
    ("node: 'n[2-9]'", False),
    ("node: ['x*', 'n*']", True),
    ("parameter: 'layers.*.weight'", True),
    ("parameter: layers.3", False),
    ("origins: 1", True),
    ("origins: '>1'", False),
    ("count: 1", True),
    ("count: '>=2'", False),
    ("same_rank: true, count: 1", True),
    ("consecutive_bad_steps: 1", True),
    ("consecutive_bad_steps: '!=1'", False),
    ("guard_exhausted: false", True),
    ("cause: input, rank: 1, node: n1", True),
    # All must hold.
    ("cause: input, rank: 0", False),
]


@pytest.mark.parametrize(("match", "matches"), MATCHES)
def test_match(match: str, matches: bool):
    # An empty match, or one that always holds here, would leave the second rule nothing.
    text = ONE % match if match else ONE.replace("      - {name: else, match: {}, action: ignore}\n", "") % ""
    story = Story(policy(text)).start().bad(7, rank=1, phase=Phase.INPUT, gradients=(BAD,)).passed(30)
    assert story.decision.rule == ("it" if matches else "else")


UNKNOWN = [
    # The probe could not tell where it began.
    ("cause: input", {}, "cause: what caused it is not known"),
    ("phase: input", {}, "phase: where it began on the first rank is not known"),
    # Nobody could say which value, or where.
    ("value: nan", {"gradients": (gradient(value=None),)}, "value: which value it was is not known"),
    (
        "parameter: '*'",
        {"gradients": (), "gradients_total": 0},
        "parameter: the first bad parameter is not known",
    ),
]


@pytest.mark.parametrize(("match", "sighting", "why"), UNKNOWN)
def test_what_is_not_known_does_not_match_and_says_so(match: str, sighting: dict, why: str):
    story = Story(policy(ONE % match)).start()
    story._bad[0].add(7)
    story.say(0, replace(nonfinite(7), **sighting)).passed(7)
    looked = story.decision.evidence.rules
    assert [(one.rule, one.verdict) for one in looked] == [("it", Verdict.UNKNOWN), ("else", Verdict.MATCHES)]
    assert looked[0].why == why
    assert story.decision.evidence.facts[match.partition(":")[0]] is None


def test_a_guard_that_cannot_act_is_not_known_to_have_reached_a_limit():
    story = Story(policy(ONE % "guard_exhausted: true")).start()
    story.say(1, GuardOff("the comm hook may differ"))
    story.bad(7)
    (first, _) = story.decision.evidence.rules
    assert first.verdict is Verdict.UNKNOWN
    assert first.why.endswith("the guard cannot act on some rank: the comm hook may differ")


# ---------------------------------------------------------------- when


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


BURST = """
    mode: enforce
    rules:
      - {name: burst, match: {consecutive_bad_steps: ">=3"}, action: rollback}
      - {name: other, match: {}, action: warn}
    checkpoints: {root: /ckpts}
"""


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


# ---------------------------------------------------------------- numbers


def test_bad_steps_in_a_row():
    story = Story(policy(BURST)).start()
    # Of a step that has several rounds, one is enough.
    story.bad(10, step=5).bad(11, step=5).bad(12, step=6)
    assert story.ask().looked[0].why == "consecutive_bad_steps is 2"
    # A good one in between begins anew.
    story.bad(15, step=8)
    assert story.ask().looked[0].why == "consecutive_bad_steps is 1"
    # What comes late fills the gap.
    story.say(1, nonfinite(13, step=7))
    assert story.decision.evidence.facts["consecutive_bad_steps"] == 4


def test_bad_steps_that_are_only_counted_are_counted():
    story = Story(policy(BURST.replace(">=3", ">=12"))).start()
    for round_ in range(8):
        story.bad(round_)
    story._bad[0] |= {8, 9, 10}
    story.passed(10)
    assert story.decisions == ()
    story._bad[0].add(11)
    story.passed(11)
    assert story.decision.evidence.facts["consecutive_bad_steps"] == 12


def test_skips_count_as_bad_steps_where_no_rank_was_bad_by_itself():
    story = Story(policy(BURST)).start()
    story.bad(5)
    for step in (6, 7):
        story.say(0, Skipped(step=step, round=step, consecutive=step - 4, in_last_1000=3, exhausted=False))
    assert story.decision.evidence.facts["consecutive_bad_steps"] == 3


def test_a_row_of_bad_steps_goes_on_in_the_attempt_after_a_crash():
    story = Story(policy(BURST)).start().bad(5).bad(6)
    story.start(generation=0).bad(0, step=6)
    assert story.decision.evidence.facts["consecutive_bad_steps"] == 3
    # Not if the earlier attempt came out of it, nor if the later one trained on first.
    story = Story(policy(BURST)).start().bad(5).bad(6).passed(9)
    story.start(generation=0).bad(0, step=6)
    assert story.ask().looked[0].why == "consecutive_bad_steps is 1"
    story = Story(policy(BURST)).start().bad(5).bad(6)
    story.start(generation=0).passed(0).bad(1, step=6)
    assert story.ask().looked[0].why == "consecutive_bad_steps is 1"


def test_the_guards_limit_is_matched_when_it_says_so():
    text = """
        guard: {on_nonfinite: skip_step, max_consecutive: 2}
        rules: [{name: limit, match: {guard_exhausted: true}, action: warn}]
    """
    story = Story(policy(text)).start().bad(5)
    story.say(0, Skipped(step=5, round=5, consecutive=1, in_last_1000=1, exhausted=False))
    assert story.answer.looked[0].verdict is Verdict.NOT_YET
    story.bad(6).say(0, Skipped(step=6, round=6, consecutive=2, in_last_1000=2, exhausted=True))
    assert story.decision.rule == "limit"
    # It is about that incident, not about all that follow.
    story.passed(30).bad(40)
    assert story.ask().looked[0].verdict is Verdict.NOT_YET


REPEATS = """
    rules:
      - {name: amp, match: {parameter: scaled}, action: ignore}
      - {name: repeats, match: {same_rank: true, count: ">=3", within_steps: 100}, action: warn}
"""


def test_incidents_of_one_rank_are_counted_within_their_distance():
    story = Story(policy(REPEATS)).start()
    story.bad(0, rank=1).bad(60, rank=1).bad(80, rank=0).bad(120, rank=1)
    # 0 is too far from 120, and 80 was another rank's.
    assert story.ask().looked[1].why == "count is 2"
    story.bad(150, rank=1)
    assert story.decisions[-1].rule == "repeats"


def test_incidents_of_earlier_generations_are_counted_too():
    story = Story(policy(REPEATS)).start().bad(50, rank=1)
    story.start().bad(20, rank=1)
    story.start().bad(30, rank=1)
    assert story.decisions[-1].rule == "repeats"


def test_incidents_that_are_ignored_do_not_count():
    story = Story(policy(REPEATS)).start()
    scaled = {"gradients": (gradient("scaled"),)}
    story.bad(0, rank=1, **scaled).bad(20, rank=1, **scaled).bad(40, rank=1)
    assert [one.rule for one in story.decisions] == ["amp", "amp"]
    assert story.ask().looked[1].why == "count is 1"


# ---------------------------------------------------------------- rollbacks


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
