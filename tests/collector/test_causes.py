"""Causes that no rank's own gradients show: histories, and the verdict each must give."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import pytest
from pydantic import TypeAdapter

from gradwatch.collector import document, tables
from gradwatch.collector import observations as obs
from gradwatch.collector.model import Cause, Event, Incident, Judgement, LikelyKind, Status, UnknownReason
from tests.collector.bodies import GROWING, autopsy, bad_on, bad_weights, flight, overflow, reduced, told_of
from tests.collector.history import NOW, Told, batch, gradient, launch_ended, nonfinite, progress

# ---------------------------------------------------------------- the reduction


def test_a_sum_of_which_no_parameter_is_known():
    bad = replace(reduced(7), gradients=(), gradients_total=0)
    told = Told().hellos(2).tell(*told_of(0, 7, bad), *told_of(1, 7, bad))
    assert told.incident.verdict.sentences[0] == (
        "Every rank's own gradients were finite at step 7 (round 7), and their reduction was not."
    )
    told = Told().hellos(2).tell(*told_of(0, 7, bad), progress("r1", 5, 1, ended=True))
    assert told.incident.verdict.sentences[0] == (
        "The reduced gradients were not finite at step 7 (round 7); who made them so is not known."
    )


def test_a_sum_that_no_rank_made_bad_is_the_reductions():
    told = Told().hellos(3)
    for rank in range(3):
        told.tell(*told_of(rank, 7, reduced(7, gradient("head.weight", None))))
    incident = told.incident
    assert incident.status is Status.CONFIRMED
    assert (incident.verdict.cause, incident.verdict.first, incident.verdict.origins) == (
        Cause.REDUCTION,
        None,
        (),
    )
    assert incident.verdict.clean_ranks == (0, 1, 2)
    assert incident.verdict.sentences[0] == (
        "Every rank's own gradients were finite at step 7 (round 7), and their reduction was not: head."
        "weight is the first."
    )
    assert document.incident(incident).step == 7


def test_what_the_other_ranks_see_of_one_ranks_nan_changes_nothing():
    told = Told().hellos(3)
    told.tell(*told_of(0, 7, reduced(7)))
    told.tell(*told_of(2, 8, nonfinite(7), nonfinite(8)))
    told.tell(*told_of(1, 7, reduced(7)))
    verdict = told.incident.verdict
    assert (verdict.first.rank, verdict.clean_ranks, verdict.cause) == (2, (0, 1), None)


def test_what_follows_a_bad_reduction_is_contaminated():
    told = Told().hellos(2)
    told.tell(*told_of(0, 8, reduced(7), nonfinite(8)), *told_of(1, 8, reduced(7), nonfinite(8)))
    verdict = told.incident.verdict
    assert (verdict.cause, verdict.first, verdict.contaminated_ranks) == (Cause.REDUCTION, None, (0, 1))


def test_a_rank_that_is_not_known_of_may_have_made_it():
    told = Told().hellos(2)
    told.tell(*told_of(0, 7, reduced(7)), progress("r1", 5, 1, ended=True))
    verdict = told.incident.verdict
    assert (verdict.cause, verdict.first) == (None, None)
    assert verdict.unknown_ranks == {1: UnknownReason.PROCESS_ENDED}
    assert "not known" in verdict.sentences[0]


def test_a_scaled_sum_that_overflows_is_the_scalers():
    told = Told().hellos(2)
    for rank in range(2):
        told.tell(*told_of(rank, 7, reduced(7, loss_scale_overflow=True)))
    assert told.incidents == []
    assert told.job.nonfinite_events == {"loss_scale": 2}


# ---------------------------------------------------------------- the optimizer's state


def test_who_had_the_largest_share_in_a_gradient_that_is_too_large():
    told = Told().hellos(3)
    for rank, own in enumerate([1.0, 3e30, 2.0]):
        told.tell(*told_of(rank, 4, overflow(4, own), last_bad_round=None))
    verdict = told.incident.verdict
    assert (verdict.cause, verdict.first.rank, verdict.tie) == (Cause.OPTIMIZER_STATE, 1, False)
    assert (verdict.first.parameter, verdict.first.value, verdict.clean_ranks) == ("a.weight", None, (0, 2))
    assert "never move again" in " ".join(verdict.sentences)


def test_shares_that_are_nearly_as_large_are_named_after_the_largest():
    told = Told().hellos(3)
    for rank, own in enumerate([2e30, 3e30, 2.0]):
        told.tell(*told_of(rank, 4, overflow(4, own), last_bad_round=None))
    verdict = told.incident.verdict
    assert ([origin.rank for origin in verdict.origins], verdict.tie) == ([1, 0], False)
    assert verdict.sentences[1] == (
        "Rank 1 on node n1 had the largest share in it, 3e+30 before the reduction; more than half as much "
        "came from rank 0."
    )


def test_an_update_that_was_skipped_has_done_no_harm():
    told = Told().hellos(1)
    told.tell(*told_of(0, 4, overflow(4, 3e30, skipped=True), last_bad_round=None))
    assert "The guard skipped the update" in " ".join(told.incident.verdict.sentences)


def test_the_operator_is_named_with_its_line_and_inputs():
    told = bad_on(1, autopsy(1, 5, obs.Replay.REPRODUCED))
    described = document.incident(told.incident)
    assert (described.first.operator, described.first.source) == ("aten.log.default", "train.py:42")
    assert described.first.replay.module == "head"
    assert (
        "Its batch and its weights were finite; aten.log.default in head made it in the forward pass, called "
        "from train.py:42 (return p.log()). It was given 0 to 3.25."
    ) in described.verdict
    assert described.likely[0].kind == "domain"
    assert len(described.verdict) <= 4


def test_an_operator_through_which_a_bad_batch_went_has_not_made_it():
    told = Told().hellos(1)
    told.tell(*told_of(0, 5, nonfinite(5, phase=obs.Phase.INPUT), autopsy(0, 5, obs.Replay.REPRODUCED)))
    described = document.incident(told.incident)
    assert (
        "The batch that it was given was not finite, which is bad data, and spread by aten.log.default in "
        "head in the forward pass, called from train.py:42 (return p.log())."
    ) in described.verdict
    assert len(described.verdict) <= 4


BAD, FINITE = obs.Replay.REPRODUCED, obs.Replay.FINITE


# Who replayed it, what came of it, and whether the replay is shown to have repeated the pass.
JUDGED = [
    # It goes bad on another rank too: that is proof by itself.
    ([(1, BAD, None), (0, BAD, None)], Judgement.DETERMINISTIC),
    ([(1, FINITE, True), (0, BAD, None)], Judgement.DETERMINISTIC),
    # Only there, and another rank has repeated the pass.
    ([(1, BAD, None), (0, FINITE, True)], Judgement.ONLY_THERE),
    # Another rank has tried, and it is not known whether it repeated the pass.
    ([(1, BAD, None), (0, FINITE, None)], Judgement.REPEATED_THERE),
    ([(1, BAD, None), (0, FINITE, False)], Judgement.REPEATED_THERE),
    # Nobody else has tried.
    ([(1, BAD, None)], Judgement.REPEATED_THERE),
    # Nowhere.
    ([(1, FINITE, True), (0, FINITE, True)], Judgement.TRANSIENT),
    ([(1, FINITE, True)], Judgement.TRANSIENT),
    # Nowhere, and nobody knows whether it was the same pass.
    ([(1, FINITE, False), (0, FINITE, True)], Judgement.NOT_REPRODUCED),
    ([(1, FINITE, None)], Judgement.NOT_REPRODUCED),
    ([(1, obs.Replay.NOT_DONE, None)], None),
    ([], None),
]


@pytest.mark.parametrize(("replays", "judgement"), JUDGED)
def test_where_it_goes_bad_again_judges_where_the_fault_is(replays, judgement):
    told = bad_on(1)
    for by_rank, replay, faithful in replays:
        told.tell(batch(f"r{by_rank}", 2, autopsy(1, 5, replay, faithful=faithful)))
    assert told.incident.verdict.judgement is judgement


def test_ranks_that_a_collective_had_made_bad_are_no_origins():
    told = Told().hellos(3)
    for rank in range(3):
        replay = obs.Replay.REPRODUCED if rank == 2 else obs.Replay.RECEIVED
        told.tell(*told_of(rank, 5, nonfinite(5, phase=obs.Phase.FORWARD), autopsy(rank, 5, replay)))
    verdict = told.incident.verdict
    assert ([origin.rank for origin in verdict.origins], verdict.tie) == ([2], False)
    assert verdict.contaminated_ranks == (0, 1)
    assert "a collective of the forward pass had spread it" in verdict.sentences[2]


def test_whoever_made_it_is_found_among_many():
    told = Told().hellos(100)
    for rank in range(100):
        replay = obs.Replay.REPRODUCED if rank == 90 else obs.Replay.RECEIVED
        told.tell(*told_of(rank, 5, nonfinite(5, phase=obs.Phase.FORWARD), autopsy(rank, 5, replay)))
    assert [origin.rank for origin in told.incident.verdict.origins] == [90]


def test_four_sentences_say_it_all():
    told = Told().hellos(4)
    for rank, replay in {1: obs.Replay.REPRODUCED, 2: obs.Replay.REPRODUCED, 3: obs.Replay.RECEIVED}.items():
        bad = nonfinite(5, gradient(position=rank), phase=obs.Phase.FORWARD)
        told.tell(*told_of(rank, 5, bad, autopsy(rank, 5, replay)))
    told.tell(*told_of(0, 5, reduced(5)))
    assert len(told.incident.verdict.sentences) == 4
    assert told.incident.verdict.sentences[2] == (
        "Rank 3 was bad in the same round, and got it from there: a collective of the forward pass had "
        "spread it before there were gradients; rank 2 was bad before any update was applied too; rank 0 was "
        "clean in that round."
    )


def test_a_replay_may_be_told_before_what_it_is_of():
    told = Told().hellos(2)
    told.tell(*told_of(0, 5, reduced(5), autopsy(1, 5, obs.Replay.REPRODUCED)))
    told.tell(*told_of(1, 5, nonfinite(5, phase=obs.Phase.FORWARD), autopsy(1, 5, obs.Replay.REPRODUCED)))
    assert told.incident.verdict.judgement is Judgement.DETERMINISTIC


def test_ranks_that_share_the_first_position_are_listed_once():
    told = Told().hellos(2)
    for rank in range(2):
        told.tell(*told_of(rank, 5, nonfinite(5, phase=obs.Phase.BACKWARD)))
    said = " ".join(told.incident.verdict.sentences)
    assert "ranks 0 and 1 share that position" in said
    assert "before any update was applied" not in said


def test_growth_is_a_warning_and_no_incident():
    told = Told().hellos(2)
    warning = obs.Exploding(0, 9, 9, "a.weight", "a", "Linear", 5e6, 0.5, 1)
    told.tell(batch("r0", 1, warning))
    # What all ranks see at once, and step after step, is one warning.
    for place, step in enumerate(range(9, 60)):
        told.tell(batch("r1", 1 + place, replace(warning, round=step, step=step)))
    assert told.incidents == []
    assert told.job.warned == {"exploding": 52}
    (text,) = document.job(told.state, "j").warnings
    assert text == (
        "Rank 0: the gradient of a.weight has grown to 5e+06 at step 9, from 0.5 as usual; if it goes on, it "
        "will overflow."
    )


def test_warnings_that_do_not_end_are_told_a_few_times():
    told, texts = Told().hellos(1), set()
    for turn in range(30):
        warning = obs.Exploding(0, 50 * turn, 50 * turn, "a.weight", "a", "Linear", 5e6, 0.5, 1)
        told.tell(batch("r0", 1 + turn, warning))
        texts |= {*document.job(told.state, "j").warnings}
    assert len(texts) == 8
    assert told.job.warned == {"exploding": 30}


def test_how_it_came_to_the_first_rank_is_kept_among_many():
    told = Told().hellos(20)
    for rank in range(20):
        bad = nonfinite(20, gradient(position=19 - rank), phase=obs.Phase.FORWARD)
        told.tell(*told_of(rank, 20, bad, flight(20, GROWING)))
    assert told.incident.verdict.first.rank == 19
    assert told.incident.verdict.likely[0].kind is LikelyKind.EXPLODING_GRADIENTS
    assert len(told.incident.evidence.flown) < 20


# ---------------------------------------------------------------- in any order


def test_the_verdict_does_not_depend_on_the_order_of_the_ranks():
    stories = {
        0: told_of(0, 5, reduced(5), autopsy(1, 5, obs.Replay.FINITE)),
        1: told_of(
            1,
            5,
            nonfinite(5, phase=obs.Phase.FORWARD),
            flight(5, GROWING),
            autopsy(1, 5, obs.Replay.REPRODUCED),
        ),
        2: told_of(2, 5, reduced(5)),
    }
    verdicts = set()
    for order in itertools.permutations(stories):
        told = Told().hellos(3)
        for rank in order:
            told.tell(*stories[rank])
        assert told.incident.status is Status.CONFIRMED
        verdicts.add(repr(told.incident.verdict))
    assert len(verdicts) == 1


def test_a_launch_that_has_ended_leaves_a_reduction_without_a_maker_if_all_were_heard():
    told = Told().hellos(2)
    told.tell(*told_of(0, 7, reduced(7)), *told_of(1, 7, reduced(7)), batch("l", 0, launch_ended("l")))
    assert told.incident.verdict.cause is Cause.REDUCTION


def test_a_nan_of_the_recorder_is_read_back_from_the_store():
    told = Told().hellos(1)
    course = flight(20, GROWING)
    told.tell(*told_of(0, 20, nonfinite(20), course))
    read = TypeAdapter(Incident).validate_json(tables.incident_row(told.incident)["state"])
    assert repr(read) == repr(told.incident)
    assert math.isnan(read.evidence.flown[0].flight.steps[-1].magnitudes[0])
    event = Event("j", None, 0, "r0", 2, None, NOW, course)
    body = json.loads(tables.event_row(event)["body"])
    assert body["steps"][-1]["magnitudes"] == ["NaN"]
    assert repr(TypeAdapter(obs.Flight).validate_python(body)) == repr(course)


def test_a_buffer_that_was_bad_is_told_instead_of_an_operator():
    missing = ("no operator is named: buffer 1.running_var of the model is not finite",)
    found = replace(
        autopsy(1, 5, obs.Replay.REPRODUCED), operator=None, source=None, code=None, missing=missing
    )
    told = Told().hellos(2).tell(*told_of(1, 5, nonfinite(5, phase=obs.Phase.FORWARD), found), *told_of(0, 5))
    assert "Buffer 1.running_var of the model is not finite." in told.incident.verdict.sentences


@pytest.mark.parametrize(
    ("evidence", "says", "kind"),
    [
        (obs.UpdateEvidence.LEARNING_RATE, "The learning rate was NaN", LikelyKind.HYPERPARAMETERS),
        (obs.UpdateEvidence.SEEN, "look at what the optimizer computes", LikelyKind.UNKNOWN),
    ],
)
def test_an_update_by_a_rate_that_is_no_number_or_seen_to_do_it(evidence, says, kind):
    rate = math.nan if evidence is obs.UpdateEvidence.LEARNING_RATE else 0.1
    body = replace(bad_weights(5, evidence), optimizer="SGD", learning_rate=rate, finite_step=5)
    told = Told().hellos(2).tell(*told_of(0, 5, body), *told_of(1, 5, body))
    verdict = told.incident.verdict
    assert verdict.cause is Cause.UPDATE
    assert says in " ".join(verdict.sentences)
    assert verdict.likely[0].kind is kind
