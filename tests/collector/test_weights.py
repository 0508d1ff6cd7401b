"""Weights that are bad, and updates that made them so: histories, and the verdict each must give."""

from __future__ import annotations

import itertools

import pytest

from gradwatch.collector import document
from gradwatch.collector import observations as obs
from gradwatch.collector.model import Cause, Incident, LikelyKind, Status
from gradwatch.collector.observations import Phase, UpdateEvidence, Value
from tests.collector.bodies import bad_weights, reduced, told_of
from tests.collector.history import Told, batch, gradient, nonfinite, progress


def weight(name: str, value: Value = Value.NAN, count: int = 3) -> obs.BadWeight:
    return obs.BadWeight(name, value, count, 40)


def after(round_: int, *names: str, **changes: object) -> obs.NonFinite:
    """Gradients that are bad since the weights are."""
    weights = tuple(weight(name) for name in names)
    known = {"phase": Phase.PARAMETER, "weights_finite": False, "bad_weights": weights} | changes
    return nonfinite(round_, gradient("head.bias", 0), **known)


def on_all(world_size: int, round_: int, *bodies: obs.Body) -> Told:
    told = Told().hellos(world_size)
    for rank in range(world_size):
        told.tell(*told_of(rank, round_, *bodies))
    return told


def text(incident: Incident) -> str:
    return " ".join(document.incident(incident).verdict)


# What shows that the update did it, and what is said of it.
SHOWN = [
    (UpdateEvidence.STATE, {}, "the optimizer's state was not"),
    (UpdateEvidence.EPSILON, {"eps": 1e-8}, "the optimizer's eps of 1e-08 is 0 in their dtype"),
    (
        UpdateEvidence.GRADIENTS,
        {"gradients": (gradient("b.weight", None),), "gradients_total": 1},
        "that of b.weight was not when the optimizer took it",
    ),
]


@pytest.mark.parametrize(("evidence", "changes", "says"), SHOWN)
def test_an_update_that_made_weights_bad(evidence, changes, says):
    told = on_all(2, 4, bad_weights(3, evidence, "a.weight", "b.weight", **changes), after(4, "a.weight"))
    incident = told.incident
    first = document.incident(incident).first
    assert (incident.verdict.cause, first.phase, first.parameter) == (Cause.UPDATE, "update", "a.weight")
    assert (incident.verdict.tie, first.step, first.value) == (True, 3, "nan")
    assert [one.name for one in first.bad_weights] == ["a.weight", "b.weight"]
    assert [origin.rank for origin in incident.verdict.origins] == [0, 1]
    assert says in text(incident)
    assert "by Adam (eps 1e-08, learning rate 0.001) made the weight a.weight NaN on all ranks" in text(
        incident
    )
    assert told.job.nonfinite_events == {"parameter": 2}


def test_an_update_whose_gradients_are_bad_and_weights_not_yet():
    bad = bad_weights(
        3,
        UpdateEvidence.GRADIENTS,
        weights=(),
        weights_total=0,
        gradients=(gradient("c.bias", None),),
        gradients_total=5,
    )
    incident = on_all(1, 3, bad).incident
    assert (incident.verdict.cause, incident.verdict.first.parameter) == (Cause.UPDATE, "c.bias")
    assert "5 of them (c.bias is the first) were not when the optimizer took them" in text(incident)


def test_how_many_weights_are_bad_is_a_sentence():
    names = ("a.weight", "b.weight", "c.weight")
    assert "NaN on all ranks, and 2 more weights were bad." in text(
        on_all(2, 3, bad_weights(3, UpdateEvidence.STATE, *names)).incident
    )
    assert "before the update of step 3, and 1 more weight was bad." in text(
        on_all(2, 3, bad_weights(3, None, *names[:2])).incident
    )


def given_bad(round_: int) -> obs.BadWeights:
    """What an optimizer is about to take."""
    bad = gradient("c.bias", None)
    return bad_weights(
        round_,
        UpdateEvidence.GRADIENTS,
        weights=(),
        weights_total=0,
        gradients=(bad,),
        gradients_total=1,
        model_step=round_,
    )


# What follows on it, and what is said of the weights.
AFTER_IT = [
    ([], "Whether the weights are bad since is not known."),
    ([obs.Skipped(3, 3, 1, 1, exhausted=False)], "The guard skipped the update, so no weight was touched."),
    ([after(4, "c.bias", model_step=4)], "Afterwards the weights were not finite."),
    # The next one was not skipped.
    (
        [obs.Skipped(3, 3, 1, 1, exhausted=False), after(5, "c.bias", step=4, model_step=4)],
        "Afterwards the weights were not finite.",
    ),
    # It left out what was bad.
    ([nonfinite(5, phase=Phase.LOSS, weights_finite=True, model_step=5)], "The weights stayed finite."),
]


@pytest.mark.parametrize(("bodies", "says"), AFTER_IT)
@pytest.mark.parametrize("world_size", [1, 2])
def test_an_update_that_was_given_bad_gradients_is_not_said_to_have_made_weights_bad(
    bodies, says, world_size
):
    incident = on_all(world_size, 6, given_bad(3), *bodies).incident
    assert (incident.verdict.cause, incident.verdict.first.phase) == (Cause.UPDATE, Phase.UPDATE)
    where = " on all ranks" if world_size > 1 else " on rank 0 (node n0)"
    assert incident.verdict.sentences[0] == (
        "Adam (eps 1e-08, learning rate 0.001) was given a gradient of c.bias that was NaN at step 3 "
        f"(round 3){where}."
    )
    assert says in text(incident)
    assert "made" not in text(incident)


def test_weights_that_were_found_bad_are_no_updates_fault():
    told = on_all(2, 9, bad_weights(8, None, "emb.weight", step=9, finite_step=4), after(9, "emb.weight"))
    incident = told.incident
    assert (incident.verdict.cause, incident.verdict.first.phase) == (Cause.PARAMETER, Phase.PARAMETER)
    # The round in which they were found is the one before.
    assert "was NaN on all ranks before the update of step 9." in text(incident)
    assert "It was last known finite at step 4." in text(incident)
    assert document.incident(incident).first.gradient == "head.bias"


def test_the_gradient_that_arrived_first_is_that_of_the_step_before_which_one_ranks_weights_were_found_bad():
    told = Told().hellos(2).tell(*told_of(0, 9, reduced(9)))
    found = bad_weights(8, None, "emb.weight", step=9, model_step=9, finite_step=4)
    told.tell(*told_of(1, 10, found, *(after(at, "emb.weight", model_step=at) for at in (9, 10))))
    first = document.incident(told.incident).first
    assert (first.rank, first.step, first.parameter, first.gradient) == (1, 9, "emb.weight", "head.bias")


def test_weights_that_no_look_had_found_before():
    """Only the bad round tells of them."""
    told = on_all(2, 9, after(9, "emb.weight", "head.bias", weights_finite_step=6, bad_weights_total=2))
    described = document.incident(told.incident)
    assert (described.cause, described.first.parameter, described.first.gradient) == (
        "parameter",
        "emb.weight",
        "head.bias",
    )
    assert (described.first.value, described.first.count, described.first.numel) == ("nan", 3, 40)
    assert "the weight emb.weight was NaN at step 9 (round 9), and 1 more weight was bad" in text(
        told.incident
    )
    assert "They were last known finite at step 6." in text(told.incident)


# How weights are known to be bad from the beginning.
BEGUN = [
    [bad_weights(0, None, "bg", initial=True), after(0, "bg")],
    [after(0, "bg", model_step=0)],
    [after(0, "bg")],
    # The job's clock goes on after a resume; the model's begins again.
    [after(40, "bg", step=40, model_step=0)],
]


@pytest.mark.parametrize("bodies", BEGUN)
def test_weights_that_were_bad_before_the_first_update(bodies):
    told = on_all(2, bodies[-1].round, *bodies)
    verdict = told.incident.verdict
    assert (verdict.cause, verdict.first.parameter, verdict.tie) == (Cause.PARAMETER, "bg", True)
    assert verdict.likely[0].kind is LikelyKind.INITIALISATION


def test_weights_that_were_trained_are_not_badly_initialised():
    told = on_all(2, 7, after(7, "bg", model_step=7))
    assert LikelyKind.INITIALISATION not in {one.kind for one in told.incident.verdict.likely}


def test_weights_after_bad_gradients_are_the_consequence():
    told = Told().hellos(2)
    told.tell(*told_of(0, 4, reduced(3), bad_weights(3, None, step=4), after(4, "0.weight")))
    bad = nonfinite(3, phase=Phase.LOSS, weights_finite=True)
    told.tell(*told_of(1, 4, bad, bad_weights(3, None, step=4), after(4, "0.weight")))
    verdict = told.incident.verdict
    assert (verdict.cause, verdict.first.rank, verdict.first.phase) == (Cause.LOSS, 1, Phase.LOSS)
    assert (verdict.clean_ranks, verdict.contaminated_ranks) == ((0,), (0,))
    assert [origin.rank for origin in verdict.origins] == [1]


def test_weights_after_a_bad_sum_are_the_consequence():
    told = on_all(2, 4, reduced(3), bad_weights(3, None, step=4), after(4, "0.weight"))
    verdict = told.incident.verdict
    assert (verdict.cause, verdict.first, verdict.contaminated_ranks) == (Cause.REDUCTION, None, (0, 1))


def test_the_weights_of_one_rank_alone():
    told = Told().hellos(3)
    told.tell(*told_of(1, 10, bad_weights(9, None, "b.weight", step=10), after(10, "b.weight", step=10)))
    for rank in (0, 2):
        told.tell(*told_of(rank, 11, reduced(10), after(11, "b.weight")))
    verdict = told.incident.verdict
    assert ([one.rank for one in verdict.origins], verdict.clean_ranks) == ([1], (0, 2))
    assert verdict.contaminated_ranks == (0, 2)
    assert "on rank 1 (node n1)" in text(told.incident)


def test_gradients_of_the_same_round_that_weights_explain_are_not_first():
    told = on_all(2, 9, after(9, "0.weight"), bad_weights(9, UpdateEvidence.STATE, "0.weight"))
    assert told.incident.verdict.cause is Cause.UPDATE


def test_gradients_of_the_same_round_that_weights_do_not_explain_are():
    told = Told().hellos(2)
    told.tell(*told_of(0, 9, reduced(9), bad_weights(9, UpdateEvidence.STATE)))
    told.tell(*told_of(1, 9, nonfinite(9, phase=Phase.FORWARD), bad_weights(9, UpdateEvidence.STATE)))
    assert told.incident.verdict.cause is Cause.FORWARD


def test_the_verdict_on_weights_does_not_depend_on_the_order_of_the_ranks():
    stories = [
        told_of(rank, 4, bad_weights(3, UpdateEvidence.EPSILON, "e.weight"), after(4, "e.weight"))
        for rank in range(3)
    ]
    verdicts = set()
    for order in itertools.permutations(stories):
        told = Told().hellos(3)
        for story in order:
            told.tell(*story)
        assert told.incident.status is Status.CONFIRMED
        verdicts.add(repr(told.incident.verdict))
    assert len(verdicts) == 1


def test_weights_that_no_gradient_shows_stay_an_incident_until_all_have_said_so():
    told = Told().hellos(2)
    told.tell(*told_of(0, 40, bad_weights(3, UpdateEvidence.EPSILON), last_bad_round=None))
    told.tell(progress("r1", 5, 1))
    assert told.incident.status is Status.CONFIRMED
    told.tell(batch("r1", 1, bad_weights(3, UpdateEvidence.EPSILON)), progress("r1", 41, 2))
    assert told.incident.status is Status.CLOSED
    assert told.incident.verdict.tie


# What shows that the update did it, its learning rate, and what is likely.
LIKELY = [
    (UpdateEvidence.EPSILON, 1e-3, LikelyKind.PRECISION),
    (UpdateEvidence.STATE, 1e30, LikelyKind.HYPERPARAMETERS),
    (None, 1e30, LikelyKind.HYPERPARAMETERS),
    (UpdateEvidence.STATE, 1e-3, LikelyKind.UNKNOWN),
]


@pytest.mark.parametrize(("evidence", "rate", "kind"), LIKELY)
@pytest.mark.parametrize("world_size", [1, 2])
def test_what_is_likely_behind_an_update(evidence, rate, kind, world_size):
    told = on_all(world_size, 9, bad_weights(9, evidence, learning_rate=rate))
    assert told.incident.verdict.likely[0].kind is kind


def test_weights_that_no_name_is_known_of_are_told_as_bad():
    """As a device tells of them; and what an update is about to do is not done."""
    found = on_all(1, 9, bad_weights(9, None, weights=(), weights_total=0)).incident.verdict.first
    assert (found.bad_weights, found.weights_finite) == ((), False)
    assert on_all(1, 3, given_bad(3)).incident.verdict.first.weights_finite is None
