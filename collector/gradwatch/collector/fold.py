"""Fold what agents report into the state: `(state, report, config, now)` gives the changes. Pure.

Duplicates fall out here: of a journal, a record counts only when its `seq` is above the
highest that has arrived.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias, get_args

from gradwatch.collector import observations as obs
from gradwatch.collector import told
from gradwatch.collector.attribution import cause_of
from gradwatch.collector.draft import Draft, counted
from gradwatch.collector.hello import admit
from gradwatch.collector.model import Cause, Event, Skips, cause_label
from gradwatch.collector.observations import DropReason
from gradwatch.collector.progress import advance, see_progress
from gradwatch.collector.progress_log import log_end, log_progress
from gradwatch.collector.runs import end_launch, keep_the_living, lose_launch, see_command, start_launch
from gradwatch.collector.settle import settle
from gradwatch.collector.sightings import sighting_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gradwatch.collector.model import Changes, FoldConfig, Journal, RankState, State

_Opening: TypeAlias = (
    obs.LaunchStarted
    | obs.CommandStarted
    | obs.CommandStopped
    | obs.LaunchEnded
    | obs.Unwatched
    | obs.CheckpointRoot
)
_OPENINGS = get_args(_Opening)
# What is told beside a rank's own bad gradients, and who takes it in.
_TOLD: Mapping[type, Callable[[Draft, RankState, Any], None]] = {
    obs.Reduced: told.see_reduced,
    obs.OptimizerState: told.see_overflow,
    obs.BadWeights: told.see_weights,
    obs.Exploding: told.see_growth,
    obs.BadLoss: told.see_loss,
    obs.Flight: told.see_flight,
    obs.Autopsy: told.see_autopsy,
    obs.Rehearsal: told.see_rehearsal,
    obs.Resumed: told.see_resumed,
    obs.ModelSeen: told.see_model,
}
# Of one run; a job with more processes than this has made its point.
MAX_UNWATCHED = 1024


def fold(state: State, report: obs.Report, config: FoldConfig, now: float) -> Changes:
    """What a report changes.

    Args:
        state: is not touched.
        report: in any order with respect to other journals' reports.
        config: what the pure part can be told.
        now: the collector's time, in seconds since the epoch.
    """
    draft = Draft(state, config, now)
    # A launch comes before the ranks it started: it may begin the job's next run.
    for batch in sorted(report.batches, key=_is_launch, reverse=True):
        _absorb_batch(draft, batch)
    for progress in report.progress:
        _absorb_progress(draft, progress)
    for job in draft.touched_jobs():
        keep_the_living(draft, job)
        settle(draft, job)
    log_progress(draft)
    return draft.changes()


def tick(state: State, config: FoldConfig, now: float) -> Changes:
    """What the mere passing of time changes: ranks that stay silent are named unknown."""
    draft = Draft(state, config, now)
    for job in state.jobs:
        settle(draft, job)
    log_progress(draft)
    return draft.changes()


def _is_launch(batch: obs.Batch) -> bool:
    return bool(batch.records) and isinstance(batch.records[0].body, obs.LaunchStarted)


def _absorb_batch(draft: Draft, batch: obs.Batch) -> None:
    journal = draft.journal(batch.incarnation)
    heard = False
    for record in batch.records:
        if record.seq <= journal.high_seq:
            continue
        journal = replace(journal, high_seq=record.seq)
        drops = record.drops
        if record.body is not None:
            journal, refused = _absorb_record(draft, journal, record.body)
            drops = drops if refused is None else (*drops, refused)
            if refused is None:
                heard = True
            if refused is None and not _is_too_much(draft, journal, record.body):
                drops += _log(draft, journal, record, record.body)
                journal = replace(journal, logged_seq=record.seq)
        for reason in drops:
            draft.drop(journal.job, reason)
    if heard and journal.rank is not None:
        rank = advance(draft, replace(journal.rank, heard_at=draft.now), journal.high_seq)
        journal = replace(journal, rank=rank)
        draft.news[rank.attempt].ranks.add(rank.hello.rank)
    if heard and journal.job is not None:
        draft.jobs[journal.job] = replace(draft.jobs[journal.job], last_seen=draft.now)
    draft.journals[journal.incarnation] = journal


def _absorb_record(draft: Draft, journal: Journal, body: obs.Body) -> tuple[Journal, DropReason | None]:
    """Take one new record in; the reason, when it does not count."""
    if isinstance(body, obs.Hello):
        return admit(draft, journal, body)
    if journal.refused not in {None, DropReason.UNKNOWN_INCARNATION}:
        return journal, journal.refused
    if isinstance(body, _OPENINGS):
        return _absorb_opening(draft, journal, body), None
    if journal.job is None:
        return replace(journal, refused=DropReason.UNKNOWN_INCARNATION), DropReason.UNKNOWN_INCARNATION
    if isinstance(body, obs.NonFinite) and journal.rank is None:
        return journal, DropReason.UNKNOWN_INCARNATION
    if isinstance(body, obs.Fault):
        journal = replace(journal, faults_recorded=counted(journal.faults_recorded, body.part))
    elif isinstance(body, obs.NonFinite) and journal.rank is not None:
        journal = replace(journal, rank=_see_nonfinite(draft, journal.rank, body))
    elif journal.rank is not None:
        _absorb_told(draft, journal.rank, body, journal.high_seq)
    return journal, None


def _absorb_told(draft: Draft, rank: RankState, body: obs.Body, seq: int) -> None:
    """Take in what a rank tells beside its own bad gradients."""
    if isinstance(body, obs.Skipped):
        draft.news[rank.attempt].skips.add(Skips(body.round, body.step, body.round, body.step))
    elif isinstance(body, obs.Checksum):
        told.see_checksum(draft, rank, body, seq)
    elif type(body) in _TOLD:
        _TOLD[type(body)](draft, rank, body)


def _absorb_opening(draft: Draft, journal: Journal, body: _Opening) -> Journal:
    """Take in a record that names its job: a journal can begin with it."""
    launch = journal.launch
    if isinstance(body, obs.Unwatched):
        _see_unwatched(draft, body)
    elif isinstance(body, obs.CheckpointRoot):
        draft.jobs[body.job] = draft.job(body.job, body.generation)
    else:
        launch = body.launch
        if isinstance(body, obs.LaunchStarted):
            start_launch(draft, body)
        elif isinstance(body, obs.LaunchEnded):
            end_launch(draft, body)
        else:
            see_command(draft, body)
    run = draft.jobs[body.job].run if body.job in draft.jobs else 0
    return replace(journal, job=body.job, run=run, launch=launch, refused=None)


def _see_nonfinite(draft: Draft, rank: RankState, body: obs.NonFinite) -> RankState:
    if not body.loss_scale_overflow:
        draft.news[rank.attempt].sightings.append(sighting_of(rank.hello, body))
    job = draft.jobs[rank.attempt.job]
    label = cause_label(Cause.LOSS_SCALE if body.loss_scale_overflow else cause_of(body.phase))
    draft.jobs[job.name] = replace(job, nonfinite_events=counted(job.nonfinite_events, label))
    new_round = rank.last_round_seen is None or body.round > rank.last_round_seen
    return replace(
        rank,
        nonfinite_events=rank.nonfinite_events + 1,
        bad_rounds_seen=rank.bad_rounds_seen + new_round,
        last_round_seen=body.round if new_round else rank.last_round_seen,
        bad_through=body.round if rank.bad_through is None else max(rank.bad_through, body.round),
        step=body.step if rank.step is None else max(rank.step, body.step),
    )


def _see_unwatched(draft: Draft, body: obs.Unwatched) -> None:
    job = draft.job(body.job, body.generation)
    if len(job.unwatched) < MAX_UNWATCHED:
        job = replace(job, unwatched=(*job.unwatched, body))
    draft.jobs[job.name] = job


def _is_too_much(draft: Draft, journal: Journal, body: obs.Body) -> bool:
    """Of checksums only those that differ are logged, by `told`; and while an incident waits for records."""
    if not isinstance(body, obs.Checksum) or journal.rank is None:
        return False
    return not told.is_checksum_logged(draft, journal.rank.attempt)


def _log(draft: Draft, journal: Journal, record: obs.Record, body: obs.Body) -> tuple[DropReason, ...]:
    """Keep the record for the append-only log; the drops, when its time is not believed."""
    ahead = record.at is not None and record.at > draft.now + draft.config.clock_skew
    if journal.job is not None:
        rank = journal.rank
        draft.events.append(
            Event(
                job=journal.job,
                attempt=None if rank is None else rank.attempt,
                rank=None if rank is None else rank.hello.rank,
                incarnation=journal.incarnation,
                seq=record.seq,
                at=None if ahead else record.at,
                received_at=draft.now,
                body=body,
            )
        )
    return (DropReason.FUTURE_EVENT,) if ahead else ()


def _absorb_progress(draft: Draft, progress: obs.Progress) -> None:
    journal = draft.journals.get(progress.incarnation)
    if journal is None or journal.job is None:
        return
    seen = see_progress(draft, journal, progress)
    if seen != journal:
        draft.journals[journal.incarnation] = seen
        draft.jobs[journal.job] = replace(draft.jobs[journal.job], last_seen=draft.now)
        if journal.rank is not None:
            draft.progressed.setdefault(journal.incarnation, journal.rank)
    if (
        progress.ended
        and journal.launch is not None
        and seen.high_seq + 1 >= progress.journal_records
        and lose_launch(draft, journal.job, journal.launch)
    ):
        log_end(draft, journal, progress)
