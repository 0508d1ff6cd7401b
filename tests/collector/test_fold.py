"""What counts, what is refused, and what is counted instead."""

from __future__ import annotations

import pytest

from gradwatch.collector import document
from gradwatch.collector import observations as obs
from gradwatch.collector.model import Cause, State, Status, faults_of
from gradwatch.collector.observations import DropReason
from tests.collector.history import (
    NOW,
    Told,
    batch,
    hello,
    launch_ended,
    launch_started,
    nonfinite,
    progress,
)


def test_a_record_counts_once_however_often_it_comes():
    told = Told().hellos(1)
    for _ in range(3):
        told.tell(batch("r0", 1, nonfinite(5), nonfinite(6)))
    told.tell(batch("r0", 2, nonfinite(6), nonfinite(7)))
    assert told.job.nonfinite_events == {"unknown": 3}
    assert told.rank("r0").nonfinite_events == 3
    assert told.job.dropped == {}


def test_records_of_an_unknown_journal_are_counted_once():
    told = Told()
    for _ in range(2):
        told.tell(batch("x", 1, nonfinite(5), nonfinite(6)))
    assert told.state.strays == {"unknown_incarnation": 2}
    assert told.state.jobs == {}


def test_a_hello_that_follows_makes_the_journal_known():
    told = Told().tell(batch("r0", 1, nonfinite(5)))
    told.tell(batch("r0", 2, hello(0, 1), nonfinite(6)))
    assert told.job.nonfinite_events == {"unknown": 1}


def test_an_unknown_process_that_only_shows_progress_is_passed_over():
    assert Told().tell(progress("x", 5, 1)).state == State()


REFUSED = [
    # A rank that the world has no place for.
    (hello(2, 2), DropReason.WRONG_WORLD_SIZE),
    # Another world size than the attempt's: the first hello stands.
    (hello(1, 4), DropReason.WRONG_WORLD_SIZE),
    # Another live process on its node holds the rank.
    (hello(1, 2, duplicate_claim=True, attempt_key=None), DropReason.DUPLICATE_RANK),
    # Another live process of the same rendezvous holds the rank.
    (hello(0, 2), DropReason.DUPLICATE_RANK),
    # Left over from a generation that is past.
    (hello(1, 2, generation=4), DropReason.STALE_GENERATION),
]


@pytest.mark.parametrize(("refused", "reason"), REFUSED)
def test_refused(refused: obs.Hello, reason: DropReason):
    told = Told().tell(batch("r0", 0, hello(0, 2, generation=5)))
    if reason is not DropReason.STALE_GENERATION:
        told = Told().tell(batch("r0", 0, hello(0, 2)))
    for _ in range(2):
        told.tell(batch("x", 0, refused, nonfinite(5)), progress("x", 9, 2))
    # Its hello and its other record, each once.
    assert told.job.dropped == {reason.value: 2}
    assert told.job.nonfinite_events == {}
    assert not told.incidents
    assert told.state.attempts[told.job.current].ranks == {0: "r0"}
    # The one that was there goes on.
    told.tell(batch("r0", 1, nonfinite(5)))
    assert told.job.nonfinite_events == {"unknown": 1}


def test_a_journal_says_hello_once():
    told = Told().tell(batch("r0", 0, hello(0, 1), hello(0, 1)))
    assert told.job.dropped == {"repeated_hello": 1}


def test_a_generation_from_the_future_is_adopted():
    told = Told().hellos(2)
    told.tell(batch("s0", 0, hello(0, 2, generation=7, attempt_key="k7")))
    assert told.job.generation == 7
    assert told.job.current == ("j", 7, 0)


def test_ranks_with_one_key_are_one_attempt_and_another_key_is_the_next():
    told = Told().hellos(2)
    told.tell(batch("s1", 0, hello(1, 2, attempt_key="k2")), batch("s0", 0, hello(0, 2, attempt_key="k2")))
    assert [attempt.number for attempt in told.job.attempts] == [0, 1]
    assert told.state.attempts[told.job.current].ranks == {1: "s1", 0: "s0"}


def test_a_late_hello_joins_the_attempt_of_its_key():
    told = Told().tell(batch("r0", 0, hello(0, 2)))
    told.tell(batch("s0", 0, hello(0, 2, attempt_key="k2")))
    told.tell(batch("r1", 0, hello(1, 2)))
    assert told.rank("r1").attempt.number == 0
    assert told.job.current.number == 1


def test_without_a_key_a_rank_that_says_hello_again_begins_the_next_attempt():
    told = Told().hellos(2, attempt_key=None)
    assert len(told.job.attempts) == 1
    told.tell(batch("s1", 0, hello(1, 2, attempt_key=None)), batch("s0", 0, hello(0, 2, attempt_key=None)))
    assert told.state.attempts[told.job.current].ranks == {1: "s1", 0: "s0"}


def test_a_clock_that_is_far_ahead_is_not_believed():
    told = Told()
    told.tell(batch("r0", 0, hello(0, 1), at=NOW + 301))
    assert told.job.dropped == {"future_event": 1}
    assert told.rank("r0").heard_at == NOW
    told.tell(batch("r0", 1, nonfinite(5), at=NOW + 299))
    assert told.job.dropped == {"future_event": 1}


def test_what_the_wire_could_not_read_is_counted_once():
    told = Told().hellos(1)
    broken = obs.Batch(
        "r0",
        (
            obs.Record(1, NOW, None, (DropReason.UNKNOWN_RECORD,)),
            obs.Record(2, NOW, nonfinite(5), (DropReason.UNKNOWN_ENUM,)),
        ),
    )
    told.tell(broken).tell(broken)
    assert told.job.dropped == {"unknown_record": 1, "unknown_enum": 1}
    assert told.job.nonfinite_events == {"unknown": 1}


def test_a_watermark_counts_once_its_records_are_here():
    told = Told().hellos(1)
    told.tell(progress("r0", 9, 3, bad_rounds=2))
    assert told.rank("r0").watermark == 0
    told.tell(batch("r0", 1, nonfinite(5)))
    assert told.rank("r0").watermark == 0
    told.tell(batch("r0", 2, nonfinite(6)))
    assert told.rank("r0").watermark == 9


def test_a_line_that_could_not_be_read_does_not_hold_the_watermark_up():
    told = Told().hellos(1).tell(progress("r0", 9, 2, malformed_lines=1))
    assert told.rank("r0").watermark == 9


def test_progress_never_goes_back():
    told = Told().hellos(1)
    told.tell(progress("r0", 9, 1, dropped={"a": 2}, faults={"scan": 1}))
    told.tell(progress("r0", 4, 1, dropped={"a": 1, "b": 1}))
    assert told.rank("r0").watermark == 9
    assert told.rank("r0").step == 9
    assert told.state.journals["r0"].dropped == {"a": 2, "b": 1}
    told.tell(progress("r0", 9, 1, ended=True))
    assert told.rank("r0").progress.ended


def test_a_fault_is_journalled_and_counted_and_is_one_fault():
    told = Told().hellos(1)
    told.tell(batch("r0", 1, obs.Fault("scan", "boom"), obs.Fault("tag", "bang")))
    told.tell(progress("r0", 1, 3, faults={"scan": 1}))
    assert faults_of(told.state.journals["r0"]) == {"scan": 1, "tag": 1}


def test_a_process_that_is_not_watched_is_named():
    unwatched = obs.Unwatched("j", 0, "n0", 5, None, None, "FSDP1")
    told = Told().tell(batch("u", 0, unwatched)).tell(batch("u", 0, unwatched))
    assert told.job.unwatched == (unwatched,)


def test_a_launch_after_all_have_ended_begins_the_next_run():
    told = Told().tell(batch("l", 0, launch_started())).hellos(2)
    told.tell(batch("m", 0, launch_started("m", "n1")))
    assert told.job.run == 0
    told.tell(batch("l", 1, launch_ended()), batch("m", 1, launch_ended("m")))
    # The launch is shipped after the ranks it started: it counts as having been before them.
    told.tell(
        batch("s0", 0, hello(0, 1, attempt_key="k2")),
        batch("o", 0, launch_started("o")),
    )
    assert told.job.run == 1
    assert [*told.job.launches] == ["o"]
    assert told.state.attempts[told.job.current].run == 1


def test_a_launcher_that_was_killed_has_ended_too():
    told = Told().tell(batch("l", 0, launch_started()))
    told.tell(progress("l", 0, 1, ended=True))
    assert told.job.launches["l"].ended_by == "lost"
    assert told.job.launches["l"].exit_code is None


def test_what_an_earlier_run_ships_late_takes_nobodys_place():
    told = Told().tell(batch("l", 0, launch_started())).hellos(2)
    told.tell(
        batch("old", 0, launch_started("old"), launch_ended("old", exit_code=9)),
        batch("o0", 0, hello(0, 1, attempt_key="old"), nonfinite(3)),
        progress("o0", 4, 2, bad_rounds=1, ended=True),
    )
    assert told.rank("r0").attempt == told.job.current
    assert [*told.job.launches] == ["l"]
    # What it has to say is not lost.
    assert told.incident.attempt.number == 1
    assert told.incident.status is Status.CLOSED
    # A restart does take its place, though it ends at once as well.
    told.tell(progress("r0", 9, 1, ended=True), progress("r1", 9, 1, ended=True))
    told.tell(batch("s0", 0, hello(0, 2, attempt_key="k2")), progress("s0", 1, 1, ended=True))
    assert told.rank("s0").attempt == told.job.current


def test_a_runs_document_counts_its_own_drops():
    told = Told().tell(batch("l", 0, launch_started())).hellos(1)
    told.tell(batch("r0", 1, hello(0, 1)), progress("r0", 1, 2, dropped={"disk_full": 2}, faults={"scan": 1}))
    told.tell(batch("l", 1, launch_ended()))
    told.tell(batch("m", 0, launch_started("m")), batch("s0", 0, hello(0, 1, attempt_key="k2"), hello(0, 1)))
    now = document.job(told.state, "j")
    assert (now.dropped, now.faults, now.attempts) == ({"repeated_hello": 1}, {}, 1)
    assert told.job.dropped == {"repeated_hello": 2}


def test_a_progress_that_only_says_that_the_process_is_gone_says_that():
    told = Told().hellos(1).tell(progress("r0", 9, 1))
    told.tell(progress("r0", 0, 0, ended=True))
    assert (told.rank("r0").progress.round, told.rank("r0").progress.ended) == (9, True)


def test_an_overflow_of_a_loss_scale_is_counted_and_is_no_incident():
    told = Told().hellos(2)
    for round_ in range(5):
        overflow = nonfinite(round_, phase=obs.Phase.LOSS, loss_scale_overflow=True)
        told.tell(
            batch("r0", 1 + round_, overflow),
            progress("r0", round_ + 1, 2 + round_, bad_rounds=round_ + 1, last_bad_round=round_),
            progress("r1", round_ + 1, 1, last_bad_round=round_),
        )
    assert told.incidents == []
    assert told.job.nonfinite_events == {"loss_scale": 5}
    # What comes in between is one all the same, and begins where it began.
    told.tell(
        batch("r0", 6, nonfinite(5, phase=obs.Phase.FORWARD)),
        progress("r0", 6, 7, bad_rounds=6, last_bad_round=5),
        progress("r1", 6, 1, last_bad_round=5),
    )
    assert (told.incident.evidence.first_round, told.incident.verdict.cause) == (5, Cause.FORWARD)
    assert told.incident.verdict.clean_ranks == (1,)
