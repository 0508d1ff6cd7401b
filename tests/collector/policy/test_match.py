"""Which incidents a rule matches, and what its conditions count."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gradwatch.collector.observations import GuardOff, Phase, Skipped, UpdateEvidence, Value
from gradwatch.collector.policy.decision import Verdict
from tests.collector.bodies import bad_weights
from tests.collector.history import gradient, nonfinite
from tests.collector.policy.story import BURST, HEAD, ONE, Story, policy

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


# ---------------------------------------------------------------- weights that an update made bad

# A rule's condition, and whether it matches an update's incident, and one of weights that were found bad.
OF_WEIGHTS = [
    ("cause: parameter", True, True),
    ("cause: [loss, parameter]", True, True),
    ("cause: update", True, False),
    ("phase: parameter", True, True),
    ("phase: update", True, False),
    ("cause: parameter, phase: update", True, False),
    ("cause: loss", False, False),
]


def with_weights(text: str, evidence: UpdateEvidence | None) -> Story:
    story = Story(policy(text)).start()
    for rank in range(2):
        story.say(rank, bad_weights(7, evidence))
    return story.passed(30)


@pytest.mark.parametrize(("match", "of_update", "found"), OF_WEIGHTS)
def test_a_policy_of_before_means_updates_too(match: str, of_update: bool, found: bool):
    for evidence, matches in ((UpdateEvidence.EPSILON, of_update), (None, found)):
        assert with_weights(ONE % match, evidence).decision.rule == ("it" if matches else "else")


@pytest.mark.parametrize("evidence", [None, *UpdateEvidence])
def test_the_example_policy_rolls_back_from_bad_weights(evidence: UpdateEvidence | None):
    text = (Path(__file__).parents[3] / "examples/policy.yaml").read_text().replace(HEAD, "")
    assert with_weights(text, evidence).decision.rule == "poisoned-weights"


GIVEN = bad_weights(
    7, UpdateEvidence.GRADIENTS, weights=(), weights_total=0, gradients=(BAD,), gradients_total=1
)
SKIPPED = Skipped(step=7, round=7, consecutive=1, in_last_1000=1, exhausted=False)
WEIGHTS_BAD = nonfinite(8, phase=Phase.PARAMETER, weights_finite=False, model_step=8)
GUARDED = ONE + "    mode: enforce\n"
NO_GUARD = GUARDED.replace("skip_step, max_consecutive: 3", "'off'")

# A policy, what each rank says of an update that was given bad gradients, and whether weights are bad since.
TOUCHED = [
    (GUARDED, [GIVEN, SKIPPED], Verdict.DIFFERS, "the update made no weights bad"),
    (GUARDED, [GIVEN], Verdict.UNKNOWN, "weights: whether the update was skipped is not known"),
    (GUARDED, [GIVEN, WEIGHTS_BAD], Verdict.MATCHES, None),
    # The next one was not skipped.
    (GUARDED, [GIVEN, SKIPPED, WEIGHTS_BAD], Verdict.MATCHES, None),
    (NO_GUARD, [GIVEN], Verdict.MATCHES, None),
    # In a dry run the guard is off.
    (ONE, [GIVEN], Verdict.MATCHES, None),
]


@pytest.mark.parametrize(("text", "bodies", "verdict", "why"), TOUCHED)
@pytest.mark.parametrize("match", ["cause: parameter", "phase: parameter"])
def test_an_update_means_bad_weights_only_if_they_are(text, bodies, verdict, why, match):
    story = Story(policy(text % match)).start()
    for rank in range(2):
        story.say(rank, *bodies)
        story._bad[rank] |= {8} if WEIGHTS_BAD in bodies else set()
    looked = story.passed(30).decision.evidence.rules[0]
    assert looked.verdict is verdict
    assert why is None or looked.why == why


def test_a_rule_on_bad_weights_waits_for_what_became_of_the_update():
    story = Story(policy(GUARDED % "cause: parameter")).start()
    for rank in range(2):
        story.say(rank, GIVEN)
    story.passed(7)
    assert (story.decisions, story.answer.looked[0].verdict) == ((), Verdict.NOT_YET)
    story.say(0, SKIPPED)
    assert story.decision.rule == "else"


def test_the_example_policy_lets_an_update_pass_that_was_skipped():
    text = (Path(__file__).parents[3] / "examples/policy.yaml").read_text().replace(HEAD, "")
    story = Story(policy(text.replace("dry_run", "enforce"))).start()
    for rank in range(2):
        story.say(rank, GIVEN, SKIPPED)
    assert story.passed(30).decision.rule is None
