"""What is told of jobs and ranks, read off a state."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from gradwatch.collector.metrics.samples import JobSamples, job_samples
from gradwatch.collector.policy.dossier import Checkpoint, Dossier
from gradwatch.collector.policy.ledger import Standing, standing_of
from gradwatch.collector.recovery.model import Root
from tests.collector.history import Told, batch, hello, launch_ended, launch_started, nonfinite, progress

if TYPE_CHECKING:
    from collections.abc import Mapping

HOUR = 3600.0


def told_of(told: Told, dossiers: Mapping[str, Dossier] | None = None) -> JobSamples:
    (only,) = job_samples(told.state, dossiers or {}, told.now)
    return only


def values(samples: JobSamples, name: str) -> dict[tuple[str, ...], float]:
    """By labels without the job's name."""
    found = [*samples.of_job, *samples.of_ranks]
    return {one.labels[1:]: one.value for one in found if one.metric.name == f"gradwatch_{name}"}


def one_bad(round_: int = 5) -> Told:
    """Rank 1 of two was bad in a round that both have passed."""
    return (
        Told()
        .hellos(2)
        .tell(
            batch("r1", 1, nonfinite(round_)),
            progress("r0", round_ + 1, 1, last_bad_round=round_),
            progress("r1", round_ + 1, 2, last_bad_round=round_, bad_rounds=1),
        )
    )


def test_a_confirmed_incident_counts_for_the_rank_that_was_first_and_carries_its_id():
    told = one_bad()
    samples = told_of(told)
    assert values(samples, "rank_incidents_total") == {("1", "n1"): 1}
    assert values(samples, "rank_nonfinite_events_total") == {("1", "n1"): 1}
    assert values(samples, "incident_first_rank") == {(): 1}
    exemplars = {one.labels: one.incident for one in samples.of_job if one.incident is not None}
    assert exemplars == {("j", "unknown"): told.incident.id}


def test_a_rank_that_lags_is_silent_and_one_that_ended_is_not():
    told = Told().hellos(3).tell(*(progress(f"r{rank}", 5, 1) for rank in range(3)))
    told = told.wait(30).tell(progress("r0", 6, 1), progress("r1", 6, 1, ended=True)).wait(40)
    samples = told_of(told)
    # r1 ended; r0 came further 40 s ago, which is no silence yet.
    assert values(samples, "rank_silent_seconds") == {("2", "n2"): 70}
    assert values(samples, "job_silent_seconds") == {(): 40}
    assert values(samples, "job_ranks") == {("watched",): 2, ("ended",): 1, ("missing",): 0}


def test_no_more_than_sixteen_silent_ranks_are_named_the_longest_first():
    told = Told().hellos(40).tell(progress("r7", 5, 1)).wait(100)
    silent = values(told_of(told), "rank_silent_seconds")
    assert len(silent) == 16
    assert ("7", "n7") in silent  # it was heard at the same time as all others


def test_of_a_job_that_ended_the_counters_stay_for_an_hour():
    told = one_bad().tell(batch("l", 0, launch_started(), launch_ended()))
    samples = told_of(told)
    assert not samples.running
    assert values(samples, "job_running") == {(): 0}
    assert values(samples, "incidents_total")[("unknown",)] == 1
    assert not values(samples, "job_silent_seconds")
    assert not values(samples, "rank_silent_seconds")
    assert told_of(told.wait(HOUR))
    assert job_samples(told.wait(1).state, {}, told.now) == []


GOOD = Checkpoint("/c/10", 10, complete=True, finite=True, modified_at=1000.0)


@pytest.mark.parametrize(
    ("checkpoint", "standing"),
    [
        (GOOD, Standing.GOOD),
        (replace(GOOD, finite=False), Standing.BAD),
        # A buffer that was finite in the first good checkpoint.
        (replace(GOOD, path="/c/20", step=20, bad_buffers=("running_mean",)), Standing.BAD),
        (replace(GOOD, finite=None), Standing.UNKNOWN),
        (replace(GOOD, complete=False), Standing.UNKNOWN),
        (replace(GOOD, step=None), Standing.UNKNOWN),
        (replace(GOOD, quarantined=True, finite=False), Standing.QUARANTINED),
        (replace(GOOD, gone=True), None),
    ],
)
def test_how_a_checkpoint_stands(checkpoint, standing):
    ledger = [checkpoint] if checkpoint.path == GOOD.path else [GOOD, checkpoint]
    assert standing_of(ledger).get(checkpoint.path) is standing


def test_checkpoints_are_told_of_where_somebody_looks_after_them():
    told = Told().hellos(2)
    poisoned = replace(GOOD, path="/c/20", step=20, finite=False)
    dossier = Dossier("j", checkpoints=(GOOD, poisoned))
    assert values(told_of(told, {"j": dossier}), "checkpoints") == {}
    root = Root(launch="l", node="n0", root="/c", error="")
    samples = told_of(told, {"j": replace(dossier, roots=(root,))})
    assert values(samples, "checkpoints") == {
        ("good",): 1,
        ("bad",): 1,
        ("unknown",): 0,
        ("quarantined",): 0,
    }
    assert values(samples, "last_good_checkpoint_step") == {(): 10}
    assert values(samples, "last_good_checkpoint_timestamp_seconds") == {(): 1000.0}


def test_a_rank_is_counted_on_each_host_that_it_was_first_on():
    told = one_bad()
    told.tell(
        *(batch(f"s{rank}", 0, hello(rank, attempt_key="k2", node="other")) for rank in range(2)),
        batch("s1", 1, nonfinite(3)),
        progress("s0", 4, 1),
        progress("s1", 4, 2, bad_rounds=1),
    )
    assert values(told_of(told), "rank_incidents_total") == {("1", "n1"): 1, ("1", "other"): 1}
