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
from gradwatch.collector.fold import fold
from gradwatch.collector.model import (
    Cause,
    Event,
    Incident,
    Judgement,
    LikelyKind,
    Status,
    UnknownReason,
    apply,
)
from gradwatch.collector.replicas import differing, odd_ones
from tests.collector.history import (
    NOW,
    Told,
    batch,
    gradient,
    hello,
    launch_ended,
    nonfinite,
    progress,
    report,
)


def reduced(round_: int, *gradients: obs.BadGradient, **changes: object) -> obs.Reduced:
    known = obs.Reduced(0, round_, round_, gradients or (gradient(position=None),), len(gradients) or 1)
    return replace(known, **changes)


def overflow(round_: int, own: float | None, *, skipped: bool = False) -> obs.OptimizerState:
    return obs.OptimizerState(
        root=0,
        round=round_,
        step=round_,
        parameter="a.weight",
        module="a",
        module_class="Linear",
        dtype="float32",
        numel=10,
        magnitude=1e30,
        limit=5.8e20,
        local_magnitude=own,
        parameters_total=1,
        optimizer="AdamW",
        skipped=skipped,
        batch=None,
    )


def bad_weights(
    round_: int, evidence: obs.UpdateEvidence | None, *names: str, **changes: object
) -> obs.BadWeights:
    known = obs.BadWeights(
        root=0,
        round=round_,
        step=round_,
        model_step=None,
        weights=tuple(obs.BadWeight(name, obs.Value.NAN, 3, 40) for name in names or ("0.weight",)),
        weights_total=len(names) or 1,
        evidence=evidence,
        gradients=(),
        gradients_total=0,
        optimizer="Adam",
        eps=1e-8,
        learning_rate=1e-3,
        finite_step=None,
        batch=None,
        initial=False,
    )
    return replace(known, **changes)


def autopsy(of_rank: int, round_: int, replay: obs.Replay, **changes: object) -> obs.Autopsy:
    known = obs.Autopsy(
        root=0,
        round=round_,
        step=round_,
        microbatch=0,
        of_rank=of_rank,
        replay=replay,
        reason="",
        phase=obs.Phase.FORWARD,
        operator="aten.log.default",
        module="head",
        module_class="Head",
        source="train.py:42",
        code="return p.log()",
        inputs=(obs.OperatorInput("float32", (4, 3), 0.0, 3.25, 0),),
        value=obs.Value.NEGATIVE_INFINITY,
        missing=(),
        seconds=0.1,
        nbytes=100,
    )
    return replace(known, **changes)


def checksum(round_: int, *sums: int, step: int | None = None) -> obs.Checksum:
    return obs.Checksum(0, round_, round_ if step is None else step, 4, sums)


def model(*names: str) -> obs.ModelSeen:
    parameters = tuple(
        obs.Parameter(name, name.rpartition(".")[0], "Linear", (2,), "float32") for name in names
    )
    return obs.ModelSeen(0, "Net", "DistributedDataParallel", 2, 8, parameters)


def told_of(rank: int, round_: int, *bodies: obs.Body, **changes: object) -> list[obs.Batch | obs.Progress]:
    """A rank's records, and its progress after the round."""
    bad = len({body.round for body in bodies if isinstance(body, obs.NonFinite)})
    known = {"bad_rounds": bad, "last_bad_round": round_} | changes
    parts: list[obs.Batch | obs.Progress] = [batch(f"r{rank}", 1, *bodies)] if bodies else []
    return [*parts, progress(f"r{rank}", round_ + 1, 1 + len(bodies), **known)]


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


# ---------------------------------------------------------------- replays


def bad_on(rank: int, *more: obs.Body, world_size: int = 3) -> Told:
    told = Told().hellos(world_size)
    told.tell(*told_of(rank, 5, nonfinite(5, phase=obs.Phase.FORWARD), *more))
    for other in range(world_size):
        if other != rank:
            told.tell(*told_of(other, 5, reduced(5)))
    return told


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


NO_EDGE = [
    ("aten.pow.Tensor_Scalar", [(1.0, 3e30)]),
    ("aten.div.Tensor", [(0.0, 1.0), (1e-40, 1e-39)]),
    ("aten.native_layer_norm.default", [(1.0, 3e30)]),
]
EDGE = [
    ("aten.div.Tensor", [(0.0, 1.0), (0.0, 3.0)], LikelyKind.DOMAIN),
    ("aten.pow.Tensor_Scalar", [(-1.0, 2.0)], LikelyKind.DOMAIN),
    ("aten.log.default", [], LikelyKind.DOMAIN),
    ("aten.native_layer_norm.default", [(2.0, 2.0)], LikelyKind.SATURATION),
]


@pytest.mark.parametrize(
    ("operator", "ranges", "kind"), [*((*one, LikelyKind.UNKNOWN) for one in NO_EDGE), *EDGE]
)
def test_what_an_operator_was_given_tells_whether_it_is_at_an_edge(operator, ranges, kind):
    inputs = tuple(obs.OperatorInput("float32", (4,), low, high, 0) for low, high in ranges)
    told = bad_on(1, autopsy(1, 5, obs.Replay.REPRODUCED, operator=operator, inputs=inputs))
    guess = told.incident.verdict.likely[0]
    assert guess.kind is kind
    if kind is LikelyKind.UNKNOWN:
        # Nobody else has tried.
        assert "what differs in that process cannot be excluded" in told.incident.verdict.sentences[-1]


def test_a_replay_may_be_told_before_what_it_is_of():
    told = Told().hellos(2)
    told.tell(*told_of(0, 5, reduced(5), autopsy(1, 5, obs.Replay.REPRODUCED)))
    told.tell(*told_of(1, 5, nonfinite(5, phase=obs.Phase.FORWARD), autopsy(1, 5, obs.Replay.REPRODUCED)))
    assert told.incident.verdict.judgement is Judgement.DETERMINISTIC


# ---------------------------------------------------------------- how it came


def flight(round_: int, magnitudes: list[float], rates: list[float] | None = None) -> obs.Flight:
    steps = tuple(
        obs.FlightStep(
            round=round_ - len(magnitudes) + 1 + place,
            step=round_ - len(magnitudes) + 1 + place,
            loss=1.0,
            loss_scale=None,
            learning_rate=None if rates is None else rates[place],
            magnitude=magnitude,
            magnitudes=(magnitude,),
        )
        for place, magnitude in enumerate(magnitudes)
    )
    return obs.Flight(0, round_, round_, ("a.weight",), steps, 3.4e38, "float32")


GROWING = [1.0, 1.1, 0.9, 1.0, 30.0, 4e3, 6e6, math.nan]
STEADY = [1.0, 1.1, 0.9, 1.0, 1.2, 1.0, 0.8, math.nan]
LIKELY = [
    (GROWING, None, LikelyKind.EXPLODING_GRADIENTS),
    (STEADY, None, LikelyKind.UNKNOWN),
    (STEADY, [0.1] * 6 + [1.0, 1.0], LikelyKind.HYPERPARAMETERS),
]


@pytest.mark.parametrize(("magnitudes", "rates", "kind"), LIKELY)
def test_the_course_of_the_gradients_tells_what_is_likely(magnitudes, rates, kind):
    told = Told().hellos(2)
    for rank in range(2):
        told.tell(*told_of(rank, 20, nonfinite(20, phase=obs.Phase.FORWARD), flight(20, magnitudes, rates)))
    verdict = told.incident.verdict
    assert verdict.likely[0].kind is kind
    described = document.incident(told.incident)
    assert described.flight.steps[-1].magnitude == "NaN"
    assert "NaN" in described.model_dump_json()


def test_a_loss_scale_that_has_collapsed_is_told():
    course = flight(20, [1.0] + [math.inf] * 17)
    steps = tuple(replace(step, loss_scale=65536.0 / 2**place) for place, step in enumerate(course.steps))
    told = Told().hellos(1)
    told.tell(*told_of(0, 20, nonfinite(20, phase=obs.Phase.BACKWARD), replace(course, steps=steps)))
    assert told.incident.verdict.sentences[-1].startswith(
        "Likely precision: the loss scale had been lowered 17 times in a row, to 0.5"
    )


def test_a_loss_scale_that_has_sunk_to_nothing_is_told():
    course = flight(20, [1.0, 1.0, math.inf, 1.0, math.inf])
    scales = (2.0, 2.0, 1.0, 1.0, 0.5)
    steps = tuple(replace(step, loss_scale=scale) for step, scale in zip(course.steps, scales, strict=True))
    told = Told().hellos(1)
    told.tell(*told_of(0, 20, nonfinite(20, phase=obs.Phase.BACKWARD), replace(course, steps=steps)))
    assert told.incident.verdict.sentences[-1].startswith(
        "Likely precision: the loss scale has sunk to 0.5, which makes gradients smaller, and gradients still"
    )


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


# ---------------------------------------------------------------- replicas


def with_names(world_size: int) -> Told:
    told = Told()
    for rank in range(world_size):
        names = ("a.weight", "a.bias", "b.weight", "b.bias") if rank == 0 else ()
        told.tell(batch(f"r{rank}", 0, hello(rank, world_size), model(*names)))
    return told


def test_the_replica_that_has_drifted_apart_is_named_with_its_parameter():
    told = with_names(3)
    for rank in range(3):
        told.tell(batch(f"r{rank}", 2, checksum(100, 50, 7, 9)))
    for rank in range(3):
        # Ordinal 2: the second bit.
        sums = (60, 8, 19) if rank == 1 else (50, 8, 9)
        told.tell(batch(f"r{rank}", 3, checksum(200, *sums)), progress(f"r{rank}", 201, 4))
    verdict = told.incident.verdict
    assert (verdict.cause, verdict.first.rank, verdict.first.step) == (Cause.REPLICA_DIVERGENCE, 1, 200)
    assert (verdict.first.parameter, verdict.clean_ranks, verdict.tie) == ("b.weight", (0, 2), False)
    assert "At step 100 all had still been alike." in verdict.sentences


def test_what_is_not_known_of_a_replica_is_not_claimed():
    # The collector was started again: names are told at the beginning of an attempt.
    told = Told().hellos(3)
    for rank in range(3):
        sums = (60, 8, 19) if rank == 1 else (50, 8, 9)
        # Nobody has passed the round yet.
        told.tell(batch(f"r{rank}", 1, checksum(200, *sums)))
    verdict = told.incident.verdict
    assert (verdict.first.rank, verdict.first.parameter, verdict.tie) == (1, None, False)
    assert verdict.sentences[0] == (
        "Rank 1 on node n1 has drifted apart: at step 200 (round 200) one parameter is not what it is on "
        "ranks 0 and 2."
    )


def test_a_checksum_may_come_with_the_hello():
    told = Told()
    for rank in range(2):
        told.tell(batch(f"r{rank}", 0, hello(rank), model("a.weight"), checksum(0, 7 + rank)))
    assert told.incident.verdict.cause is Cause.REPLICA_DIVERGENCE


def test_checksums_that_differ_while_an_incident_is_open_are_logged_once():
    told = with_names(3).tell(batch("r1", 2, nonfinite(99)))
    for rank in range(3):
        sums = (51, 7, 9) if rank == 1 else (50, 7, 9)
        told.tell(batch(f"r{rank}", 3, checksum(100, *sums)))
    assert {("r0", 3), ("r1", 3), ("r2", 3)} <= told.logged


def test_of_two_replicas_it_cannot_be_told_whose_is_right():
    told = with_names(2)
    for rank in range(2):
        told.tell(batch(f"r{rank}", 2, checksum(100, 50 + rank, 7, 9)), progress(f"r{rank}", 101, 3))
    verdict = told.incident.verdict
    assert ([origin.rank for origin in verdict.origins], verdict.tie) == ([0, 1], True)
    assert verdict.first.parameter == "a.weight"


def test_a_divergence_that_goes_on_is_told_once():
    told = with_names(3)
    for turn in range(4):
        for rank in range(3):
            sums = (51, 7, 9) if rank == 1 else (50, 7, 9)
            told.tell(batch(f"r{rank}", 2 + turn, checksum(100 * turn, *sums)))
            told.tell(progress(f"r{rank}", 100 * turn + 50, 3 + turn, reduced_round=100 * turn + 50))
    assert len(told.incidents) == 1


def test_checksums_that_agree_leave_nothing_behind():
    told = with_names(2)
    logged = []
    for turn, rank in itertools.product(range(5), range(2)):
        parts = [batch(f"r{rank}", 2 + turn, checksum(10 * turn, 5, 6))]
        changes = fold(told.state, report(*parts), told.config, NOW)
        logged += changes.events
        told.state = apply(told.state, changes)
    (attempt,) = told.state.attempts.values()
    assert attempt.checksums == ()
    assert logged == []


@pytest.mark.parametrize("ordinal", range(8))
def test_one_parameter_that_differs_spells_its_ordinal(ordinal):
    sums = [3, 14, 15, 9, 2, 6, 5, 35]

    def told_by(values: list[int]) -> list[int]:
        bits = [sum(value for place, value in enumerate(values) if place >> bit & 1) for bit in range(3)]
        return [sum(values), *bits]

    other = [value - 77 if place == ordinal else value for place, value in enumerate(sums)]
    assert differing(told_by(sums), told_by(other)) == ordinal
    two = [value + 5 if place in {1, 6} else value for place, value in enumerate(sums)]
    assert differing(told_by(sums), told_by(two)) is None


def test_a_majority_is_right():
    seen = {rank: checksum(1, 1 if rank == 2 else 0) for rank in range(4)}
    assert odd_ones(seen) == (2,)
    seen = {rank: checksum(1, rank // 2) for rank in range(4)}
    assert odd_ones(seen) == (0, 1, 2, 3)


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


HALF = obs.OperatorInput("float16", (8, 8), -563.0, 521.0, 0)
NEGATIVE = obs.OperatorInput("float32", (4,), -0.99, -0.2, 0)

# What an operator was given and gave, and what is likely then.
BY_RANGE = [
    ("aten.bmm.default", [HALF, HALF], obs.Value.POSITIVE_INFINITY, LikelyKind.PRECISION),
    ("aten.mul.Tensor", [HALF, HALF], obs.Value.NEGATIVE_INFINITY, LikelyKind.PRECISION),
    (
        "aten.bmm.default",
        [replace(HALF, dtype="float32")] * 2,
        obs.Value.POSITIVE_INFINITY,
        LikelyKind.UNKNOWN,
    ),
    ("aten.bmm.default", [HALF, HALF], obs.Value.NAN, LikelyKind.UNKNOWN),
    ("aten.bmm.default", [replace(HALF, nonfinite=1), HALF], obs.Value.POSITIVE_INFINITY, LikelyKind.UNKNOWN),
    ("aten.pow.Tensor_Scalar", [NEGATIVE], obs.Value.NAN, LikelyKind.DOMAIN),
    ("aten.pow.Tensor_Scalar", [NEGATIVE], obs.Value.POSITIVE_INFINITY, LikelyKind.UNKNOWN),
]


@pytest.mark.parametrize(("name", "inputs", "value", "kind"), BY_RANGE)
def test_what_the_range_of_the_input_makes_likely(name, inputs, value, kind):
    found = replace(
        autopsy(1, 5, obs.Replay.REPRODUCED), operator=name, inputs=tuple(inputs), value=value, module=None
    )
    told = Told().hellos(2).tell(*told_of(1, 5, nonfinite(5, phase=obs.Phase.FORWARD), found), *told_of(0, 5))
    assert told.incident.verdict.likely[0].kind is kind


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
