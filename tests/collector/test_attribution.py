"""Who was first: histories, and the verdict each must give."""

from __future__ import annotations

import pytest

from gradwatch.collector import observations as obs
from gradwatch.collector.model import Cause, CloseReason, Status, UnknownReason
from tests.collector.history import (
    Told,
    batch,
    gradient,
    hello,
    launch_ended,
    launch_started,
    nonfinite,
    progress,
)


def bad_then(rank: int, round_: int, *bodies: obs.NonFinite) -> list[obs.Batch | obs.Progress]:
    """A rank's bad records, and its progress after the round."""
    incarnation = f"r{rank}"
    return [
        batch(incarnation, 1, *bodies),
        progress(
            incarnation,
            round_ + 1,
            1 + len(bodies),
            bad_rounds=len({body.round for body in bodies}),
            last_bad_round=round_,
        ),
    ]


def clean(rank: int, round_: int, **changes: object) -> obs.Progress:
    return progress(f"r{rank}", round_ + 1, 1, last_bad_round=round_, **changes)


def test_one_rank_was_bad_and_the_others_clean():
    told = Told().hellos(4)
    told.tell(*bad_then(2, 17, nonfinite(17, gradient("blocks.3.attn.qkv.weight", 2))))
    assert told.incident.status is Status.SUSPECTED
    told.tell(clean(0, 17), clean(1, 17), clean(3, 17))
    verdict = told.incident.verdict
    assert told.incident.status is Status.CONFIRMED
    assert (verdict.first.rank, verdict.first.step, verdict.first.round) == (2, 17, 17)
    assert verdict.first.parameter == "blocks.3.attn.qkv.weight"
    assert verdict.clean_ranks == (0, 1, 3)
    assert verdict.unknown_ranks == {}
    assert not verdict.tie
    assert verdict.cause is None
    assert verdict.sentences == (
        (
            "Rank 2 on node n2 was first: the gradient of blocks.3.attn.qkv.weight turned NaN at step 17 "
            "(round 17), the 3rd gradient to arrive in that backward pass."
        ),
        "Ranks 0, 1 and 3 were clean in that round.",
    )


def test_ranks_that_are_bad_after_the_update_are_contaminated():
    told = Told().hellos(3)
    told.tell(*bad_then(1, 18, nonfinite(17), nonfinite(18)))
    told.tell(*bad_then(0, 18, nonfinite(18)), *bad_then(2, 18, nonfinite(18)))
    verdict = told.incident.verdict
    assert [origin.rank for origin in verdict.origins] == [1]
    assert verdict.contaminated_ranks == (0, 2)
    # Both were looked at in round 17: contaminated later does not mean guilty then.
    assert verdict.clean_ranks == (0, 2)
    assert verdict.sentences[1] == (
        "Ranks 0 and 2 were clean in that round; the all-reduce then spread it, "
        "and ranks 0 and 2 were bad after the update."
    )


def test_a_later_round_of_the_same_step_makes_origins_too():
    # Two reductions per update: no update lies between rounds 6 and 7.
    told = Told().hellos(2)
    told.tell(*bad_then(0, 7, nonfinite(6, step=3)), *bad_then(1, 7, nonfinite(7, step=3)))
    assert [origin.rank for origin in told.incident.verdict.origins] == [0, 1]
    assert told.incident.verdict.contaminated_ranks == ()
    assert told.incident.verdict.first.rank == 0


FIRST = [
    # In one round, the smallest backward position is first, whatever the rank.
    ([(0, {"position": 4}), (1, {"position": 1})], 1, False),
    # The micro-batch comes before the backward position.
    ([(0, {"position": 0, "microbatch": 1}), (1, {"position": 5, "microbatch": 0})], 1, False),
    # The phase comes before the backward position.
    (
        [(0, {"position": 0, "phase": obs.Phase.BACKWARD}), (1, {"position": 5, "phase": obs.Phase.LOSS})],
        1,
        False,
    ),
    # The same position on several ranks is a tie, and the lowest rank stands for it.
    ([(1, {"position": 2}), (0, {"position": 2})], 0, True),
    # What is not known cannot be first before what is.
    ([(0, {"position": None}), (1, {"position": 9})], 1, False),
    # Unknown positions cannot be told apart.
    ([(0, {"position": None}), (1, {"position": None})], 0, True),
]


@pytest.mark.parametrize(("seen", "first", "tie"), FIRST)
def test_first(seen: list[tuple[int, dict[str, object]]], first: int, tie: bool):
    told = Told().hellos(3)
    for rank, where in seen:
        position = where.pop("position")
        told.tell(*bad_then(rank, 5, nonfinite(5, gradient(position=position), **where)))
        where["position"] = position
    told.tell(clean(2, 5))
    assert told.incident.verdict.first.rank == first
    assert told.incident.verdict.tie is tie


def test_the_earliest_gradient_of_all_buckets_stands_for_the_rank():
    told = Told().hellos(1)
    told.tell(
        *bad_then(
            0,
            5,
            nonfinite(5, gradient("late", 7), gradient("unplaced", None), bucket=0),
            nonfinite(5, gradient("early", 2), bucket=1),
        )
    )
    assert told.incident.verdict.first.parameter == "early"


def test_the_phase_of_the_first_origin_is_the_cause():
    told = Told().hellos(1)
    told.tell(*bad_then(0, 5, nonfinite(5, phase=obs.Phase.INPUT)))
    assert told.incident.verdict.cause is Cause.INPUT
    assert told.job.incidents_confirmed == {"input": 1}
    assert told.job.nonfinite_events == {"input": 1}


def test_a_record_that_comes_late_but_was_earlier_takes_the_first_place():
    told = Told().hellos(3)
    told.tell(*bad_then(0, 18, nonfinite(18)))
    told.tell(clean(1, 18))
    assert told.incident.verdict.first.rank == 0
    told.tell(*bad_then(2, 18, nonfinite(17), nonfinite(18)))
    assert told.incident.verdict.first.rank == 2
    assert told.incident.verdict.contaminated_ranks == (0,)
    assert told.incident.status is Status.CONFIRMED


UNKNOWN = [
    # It ended before it had looked at the round: what it would have seen nobody knows.
    ([progress("r1", 5, 1, ended=True)], 0.0, UnknownReason.PROCESS_ENDED),
    # Its process is gone, but not all that it wrote is here: nothing is waited for but time.
    ([progress("r1", 5, 9, ended=True)], 30.0, UnknownReason.SILENT),
    # Its launcher says that all is over.
    ([batch("l", 0, launch_started(node="n1"), launch_ended())], 0.0, UnknownReason.LAUNCH_ENDED),
    # Nothing was heard of it for the confirm timeout.
    ([], 30.0, UnknownReason.SILENT),
    # Its watermark is past the round, but speaks of records that have not arrived.
    ([progress("r1", 20, 2)], 30.0, UnknownReason.SILENT),
]


@pytest.mark.parametrize(("parts", "seconds", "reason"), UNKNOWN)
def test_unknown(parts: list[obs.Batch | obs.Progress], seconds: float, reason: UnknownReason):
    told = Told().hellos(2)
    told.tell(*bad_then(0, 17, nonfinite(17)))
    told.tell(*parts)
    if seconds:
        assert told.incident.status is Status.SUSPECTED
        assert told.incident.verdict.unknown_ranks == {1: UnknownReason.WAITING}
        told.wait(seconds - 1)
        assert told.incident.status is Status.SUSPECTED
        told.wait(1)
    assert told.incident.status is not Status.SUSPECTED
    assert told.incident.verdict.unknown_ranks == {1: reason}
    assert told.incident.verdict.clean_ranks == ()
    assert told.incident.verdict.sentences[-1].startswith("Rank 1 is unknown: ")


def test_a_rank_that_never_said_hello_is_unknown():
    told = Told().tell(batch("r0", 0, hello(0, 2)))
    told.tell(*bad_then(0, 17, nonfinite(17)))
    told.wait(30)
    assert told.incident.verdict.unknown_ranks == {1: UnknownReason.NEVER_SEEN}


def test_a_culprit_that_was_killed_is_not_unknown():
    told = Told().hellos(2)
    told.tell(batch("r0", 1, nonfinite(17)), progress("r0", 17, 1, ended=True))
    told.tell(clean(1, 17))
    assert told.incident.status is Status.CONFIRMED
    assert told.incident.verdict.first.rank == 0
    assert told.incident.verdict.unknown_ranks == {}


def test_who_was_named_unknown_and_reports_after_all_is_cleared():
    told = Told().hellos(2)
    told.tell(*bad_then(0, 17, nonfinite(17)))
    told.wait(30)
    told.tell(clean(1, 12))
    assert told.incident.verdict.unknown_ranks == {1: UnknownReason.SILENT}
    told.tell(clean(1, 17))
    assert told.incident.verdict.clean_ranks == (1,)
    assert told.job.incidents_confirmed == {"unknown": 1}


LOST = [
    # A record could not be written, and the count of bad rounds tells that it was a sighting.
    ({"dropped": {"disk_full": 1}, "bad_rounds": 1}, True),
    # A record could not be written, but no bad round is missing.
    ({"dropped": {"disk_full": 1}}, False),
    # A line could not be read, and a bad round is missing.
    ({"malformed_lines": 1, "bad_rounds": 1}, True),
    # A round was not looked at: who knows what was in it.
    ({"dropped": {"device_behind": 1}}, True),
    # The progress file was late once: that hides nothing.
    ({"dropped": {"progress_failed": 1}}, False),
]


@pytest.mark.parametrize(("loss", "unknown"), LOST)
def test_a_rank_that_lost_something_is_not_called_clean(loss: dict[str, object], unknown: bool):
    told = Told().hellos(2)
    told.tell(clean(1, 10))
    told.tell(*bad_then(0, 17, nonfinite(17)), clean(1, 17, **loss))
    expected = {1: UnknownReason.RECORDS_LOST} if unknown else {}
    assert told.incident.verdict.unknown_ranks == expected
    assert told.incident.status is Status.CONFIRMED


def test_what_was_lost_before_does_not_matter_later():
    told = Told().hellos(2)
    told.tell(clean(1, 10, dropped={"device_behind": 1}))
    told.tell(clean(1, 17, dropped={"device_behind": 1}), *bad_then(0, 17, nonfinite(17)))
    assert told.incident.verdict.clean_ranks == (1,)


def test_bad_rounds_that_were_only_counted_do_not_blame_the_clean():
    # After many bad rounds in a row a probe only counts; rank 1 was clean in round 17 all the same.
    told = Told().hellos(2)
    told.tell(*bad_then(0, 17, nonfinite(17)))
    told.tell(
        batch("r1", 1, *[nonfinite(round_) for round_ in range(18, 34)]),
        progress("r1", 100, 17, bad_rounds=82, last_bad_round=99, dropped={"repeated": 66}),
    )
    assert told.incident.verdict.clean_ranks == (1,)
    assert told.incident.evidence.last_round == 99


def test_an_incident_closes_after_ten_clean_rounds():
    told = Told().hellos(2)
    told.tell(*bad_then(0, 17, nonfinite(17)), clean(1, 17))
    told.tell(progress("r1", 29, 1, reduced_round=27, last_bad_round=17))
    assert told.incident.status is Status.CONFIRMED
    told.tell(progress("r1", 29, 1, reduced_round=28, last_bad_round=17))
    assert told.incident.status is Status.CLOSED
    assert told.incident.close_reason is CloseReason.CLEAN_ROUNDS


def test_reduced_gradients_that_stay_bad_keep_it_open():
    told = Told().hellos(2)
    told.tell(*bad_then(0, 17, nonfinite(17)), clean(1, 17))
    told.tell(progress("r1", 40, 1, reduced_round=40, last_bad_round=30))
    assert told.incident.status is Status.CONFIRMED
    told.tell(progress("r1", 41, 1, reduced_round=41, last_bad_round=30))
    assert told.incident.status is Status.CLOSED


def test_a_late_record_of_a_closed_incidents_rounds_is_merged_into_it():
    told = Told().hellos(3)
    told.tell(*bad_then(0, 17, nonfinite(17)), clean(1, 17))
    told.wait(30)
    told.tell(progress("r1", 40, 1, reduced_round=40, last_bad_round=17))
    assert told.incident.status is Status.CLOSED
    told.tell(*bad_then(2, 17, nonfinite(16)))
    assert told.incident.status is Status.CLOSED
    assert told.incident.verdict.first.rank == 2
    assert told.job.incidents_confirmed == {"unknown": 1}


def skip(round_: int, step: int | None = None) -> obs.Skipped:
    return obs.Skipped(round_ if step is None else step, round_, 1, 1, exhausted=False)


def test_after_a_skipped_update_one_clean_round_closes_it():
    told = Told().hellos(2)
    told.tell(*bad_then(0, 17, nonfinite(17)), clean(1, 17))
    told.tell(progress("r1", 19, 1, reduced_round=19, last_bad_round=17))
    # Nobody said yet that the update was skipped.
    assert told.incident.status is Status.CONFIRMED
    told.tell(batch("r1", 1, skip(17)))
    assert told.incident.close_reason is CloseReason.CLEAN_ROUNDS
    assert told.incident.verdict.sentences[-1] == "The guard skipped the update, so no weight was touched."


def test_the_round_after_a_skipped_update_must_be_clean():
    told = Told().hellos(2)
    told.tell(*bad_then(0, 17, nonfinite(17)), clean(1, 17), batch("r1", 1, skip(17)))
    told.tell(progress("r1", 18, 2, reduced_round=18, last_bad_round=17))
    assert told.incident.status is Status.CONFIRMED
    told.tell(progress("r1", 21, 2, reduced_round=21, last_bad_round=18))
    assert told.incident.status is Status.CONFIRMED
    told.tell(batch("r1", 2, skip(18)))
    assert told.incident.status is Status.CLOSED
    assert told.incident.verdict.sentences[-1].startswith(
        "The guard skipped the updates of steps 17 to 18, so"
    )


def test_the_rest_of_a_skipped_step_is_not_the_round_after_it():
    # Three reductions per update: rounds 6 to 8 are step 2, and its update was skipped.
    told = Told().hellos(1)
    told.tell(batch("r0", 1, nonfinite(6, step=2), skip(6, 2)))
    for round_ in range(7, 12):
        told.tell(progress("r0", round_, 3, step=round_ // 3, bad_rounds=1, last_bad_round=6))
        assert told.incident.status is Status.CONFIRMED
    told.tell(progress("r0", 13, 3, step=4, bad_rounds=1, last_bad_round=6))
    assert told.incident.status is Status.CLOSED


def test_with_a_clean_round_after_a_skipped_update_they_are_two_incidents():
    told = Told().hellos(2)
    told.tell(*bad_then(0, 7, nonfinite(5), skip(5), nonfinite(7), skip(7)), clean(1, 7))
    assert [incident.evidence.first_round for incident in told.incidents] == [5, 7]
    # One update that was applied in between, and they are one.
    told = Told().hellos(2).tell(*bad_then(0, 7, nonfinite(5), nonfinite(7), skip(7)), clean(1, 7))
    assert told.incident.evidence.last_round == 7
    assert told.incident.verdict.sentences[-1] == (
        "The guard skipped the update of step 7; of those before it that is not known."
    )


def test_ranks_that_are_bad_after_skipped_updates_alone_are_origins():
    told = Told().hellos(4)
    told.tell(*bad_then(1, 18, nonfinite(17), skip(17), nonfinite(18)))
    told.tell(*bad_then(0, 19, skip(17), nonfinite(18), nonfinite(19)), clean(2, 18), clean(3, 18))
    verdict = told.incident.verdict
    assert [origin.rank for origin in verdict.origins] == [1, 0]
    assert verdict.contaminated_ranks == ()
    assert verdict.sentences[1] == (
        "Rank 0 was bad before any update was applied too; ranks 2 and 3 were clean in that round."
    )
    assert verdict.sentences[-1] == (
        "The guard skipped the update of step 17; of those after it that is not known yet."
    )
    # The update of step 18 was applied: who is bad from step 19 on is contaminated.
    told.tell(batch("r3", 1, skip(17), nonfinite(19)))
    assert told.incident.verdict.contaminated_ranks == (3,)


def test_a_job_that_skips_again_and_again_is_remembered_in_little_space():
    told = Told().hellos(1)
    for index in range(200):
        round_ = 5 * index
        told.tell(batch("r0", 1 + 2 * index, nonfinite(round_), skip(round_)))
        told.tell(progress("r0", round_ + 3, 3 + 2 * index, bad_rounds=index + 1, last_bad_round=round_))
    assert len(told.incidents) == 200
    assert {incident.status for incident in told.incidents} == {Status.CLOSED}
    attempt = told.state.attempts[told.job.current]
    assert (len(attempt.skips), attempt.pending) == (64, ())


def test_a_run_of_skipped_updates_is_one_incident_however_long():
    # Once there are many bad rounds in a row a probe only counts them, and says of each that it was skipped.
    told = Told().hellos(1)
    records = [body for round_ in range(5, 21) for body in (nonfinite(round_), skip(round_))]
    told.tell(batch("r0", 1, *records, *(skip(round_) for round_ in range(21, 400))))
    assert told.incident.evidence.last_round == 399
    assert len(told.state.attempts[told.job.current].skips) == 1


def test_a_rollback_closes_what_was_open():
    told = Told().tell(batch("l", 0, launch_started(policy_hash="p"))).hellos(2)
    told.tell(*bad_then(0, 17, nonfinite(17)))
    # The command runs in the next generation, before any of its ranks has said hello.
    told.tell(batch("l", 1, obs.CommandStarted("j", 1, "l")))
    assert told.incident.close_reason is CloseReason.ROLLBACK
    assert told.incident.verdict.unknown_ranks == {1: UnknownReason.ATTEMPT_OVER}


def test_bad_rounds_far_apart_are_two_incidents_even_in_one_report():
    told = Told().hellos(2)
    told.tell(
        batch("r0", 1, nonfinite(5), nonfinite(30)),
        progress("r0", 31, 3, bad_rounds=2, last_bad_round=30),
        progress("r1", 31, 1, last_bad_round=30),
    )
    first, second = told.incidents
    assert (first.status, second.status) == (Status.CLOSED, Status.CONFIRMED)
    assert (first.evidence.first_round, second.evidence.first_round) == (5, 30)
    assert first.id != second.id
    assert told.job.incidents_confirmed == {"unknown": 2}


def test_the_second_waits_while_somebody_may_fill_the_space_between():
    told = Told().hellos(2)
    told.tell(
        batch("r0", 1, nonfinite(5), nonfinite(20)),
        progress("r0", 21, 3, bad_rounds=2, last_bad_round=20),
        progress("r1", 10, 1, last_bad_round=5),
    )
    assert told.incident.evidence.last_round == 5
    told.tell(batch("r1", 1, nonfinite(12)), progress("r1", 21, 2, bad_rounds=1, last_bad_round=20))
    assert (told.incident.evidence.first_round, told.incident.evidence.last_round) == (5, 20)


def test_a_new_attempt_closes_what_was_open():
    told = Told().hellos(2)
    told.tell(*bad_then(0, 17, nonfinite(17)))
    told.tell(batch("s0", 0, hello(0, 2, attempt_key="k2")))
    assert told.incident.close_reason is CloseReason.ATTEMPT_OVER
    assert told.incident.verdict.unknown_ranks == {1: UnknownReason.ATTEMPT_OVER}
    assert told.job.incidents_confirmed == {"unknown": 1}


def test_rounds_of_another_attempt_are_another_incident():
    told = Told().hellos(1)
    told.tell(*bad_then(0, 17, nonfinite(17)))
    told.tell(batch("s0", 0, hello(0, 1, attempt_key="k2"), nonfinite(17)))
    assert [incident.attempt.number for incident in told.incidents] == [0, 1]


def test_what_an_earlier_attempt_says_late_is_not_lost():
    told = Told().hellos(2)
    told.tell(batch("s0", 0, hello(0, 2, attempt_key="k2")))
    told.tell(*bad_then(0, 17, nonfinite(17)))
    assert told.incident.attempt.number == 0
    assert told.incident.status is Status.CLOSED
    assert told.incident.verdict.first.rank == 0


def test_the_job_ends_and_its_incident_with_it():
    told = Told().tell(batch("l", 0, launch_started())).hellos(2)
    told.tell(*bad_then(0, 17, nonfinite(17)), clean(1, 17))
    told.tell(batch("l", 1, launch_ended(exit_code=1)))
    assert told.incident.close_reason is CloseReason.JOB_ENDED


def test_without_a_launcher_the_job_ends_with_its_processes():
    told = Told().hellos(2)
    told.tell(batch("r0", 1, nonfinite(17)), progress("r0", 18, 2, bad_rounds=1, ended=True))
    told.tell(progress("r1", 18, 1, ended=True))
    assert told.incident.close_reason is CloseReason.JOB_ENDED
    assert told.incident.verdict.clean_ranks == (1,)
