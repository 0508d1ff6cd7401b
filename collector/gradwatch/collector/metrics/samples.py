"""The collector's state as samples. Pure: nothing is counted here that the state does not know."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from gradwatch.collector import document
from gradwatch.collector.metrics import catalogue as metric
from gradwatch.collector.model import Cause, RankCondition, Status, cause_label
from gradwatch.collector.observations import DropReason
from gradwatch.collector.policy.checkpoints import newest_good
from gradwatch.collector.policy.decision import Outcome
from gradwatch.collector.policy.dossier import Dossier
from gradwatch.collector.policy.ledger import Standing, standing_of
from gradwatch.collector.policy.model import Action
from gradwatch.collector.runs import is_over
from gradwatch.collector.told import EXPLODING, LOSS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from gradwatch.collector.metrics.catalogue import Metric
    from gradwatch.collector.model import Incident, JobState, Journal, RankState, State

_CAUSES = [cause_label(cause) for cause in (*Cause, None)]
_ACTS = (Action.ROLLBACK, Action.HALT)
# A decision counts when it is known what became of it: a counter never falls.
_OUTCOMES = [
    (action, outcome)
    for action in Action
    for outcome in Outcome
    if outcome is not Outcome.PENDING and (outcome is Outcome.RECORDED) != (action in _ACTS)
]
# A rank that waits for others to save a checkpoint says nothing for a while either.
_SILENT_SECONDS = 60.0
_SILENT_RANKS = 16
# What Prometheus has seen of a job that ended it keeps.
_ENDED_SECONDS = 3600.0


class Sample(NamedTuple):
    """One series' value.

    Attributes:
        labels: values, in the order of the metric's label names.
        incident: the id to hang on it as an exemplar.
    """

    metric: Metric
    labels: tuple[str, ...]
    value: float
    incident: str | None = None


@dataclass(frozen=True)
class JobSamples:
    """What is told of a job.

    Attributes:
        running: whether its run goes on.
        of_job: as many as for any other job.
        of_ranks: those that name a rank, the most telling first.
    """

    running: bool
    last_seen: float
    of_job: list[Sample]
    of_ranks: list[Sample]


def job_samples(state: State, dossiers: Mapping[str, Dossier], now: float) -> list[JobSamples]:
    """What is told of each job; of one that ended an hour ago, nothing.

    Args:
        state: the collector's.
        dossiers: what deciding about a job rests on, by job.
        now: seconds since the epoch.
    """
    shares = _by_job(state)
    told = []
    for name, job in state.jobs.items():
        over = _is_over(state, job)
        if over and now - job.last_seen > _ENDED_SECONDS:
            continue
        dossier = dossiers.get(name, Dossier(name))
        share = shares[name]
        incidents = list(document.incidents_of(state, job))
        ranks = document.current_ranks(state, job)
        of_job = [
            *_of_incidents(job, incidents),
            *_of_progress(state, job, ranks, over, now),
            *_of_drops(job, share.journals),
            *_of_decisions(name, dossier),
        ]
        of_ranks = [
            *_of_first_ranks(name, incidents),
            *(() if over else _of_silent_ranks(name, ranks, now)),
            *_of_bad_ranks(name, share.events),
        ]
        told.append(JobSamples(not over, job.last_seen, of_job, of_ranks))
    return told


def stray_samples(state: State) -> list[Sample]:
    """What was dropped and belongs to no known job."""
    return [
        Sample(metric.EVENTS_DROPPED, ("", reason), count) for reason, count in sorted(state.strays.items())
    ]


# ---------------------------------------------------------------- details


@dataclass
class _Share:
    """What a job has of the journals.

    Attributes:
        journals: those that lack something.
        events: reports of non-finite gradients, by rank and node.
    """

    journals: list[Journal] = field(default_factory=list)
    events: Counter[tuple[int, str]] = field(default_factory=Counter)


def _by_job(state: State) -> dict[str, _Share]:
    """One pass over all journals: there are many."""
    shares = {name: _Share() for name in state.jobs}
    for journal in state.journals.values():
        if journal.job is None:
            continue
        share = shares[journal.job]
        if journal.dropped or journal.malformed_lines:
            share.journals.append(journal)
        rank = journal.rank
        if rank is not None and rank.nonfinite_events:
            share.events[rank.hello.rank, rank.hello.node] += rank.nonfinite_events
    return shares


def _is_over(state: State, job: JobState) -> bool:
    current = None if job.current is None else state.attempts[job.current]
    return is_over(job, current, state.journals)


def _of_incidents(job: JobState, incidents: Iterable[Incident]) -> Iterator[Sample]:
    name = job.name
    newest: dict[str, str] = {}
    open_ones = []
    for incident in incidents:
        if incident.confirmed_at is not None:
            newest[cause_label(incident.verdict.cause)] = incident.id
        if incident.status is not Status.CLOSED:
            open_ones.append(incident)
    for cause in _CAUSES:
        yield Sample(metric.NONFINITE_EVENTS, (name, cause), job.nonfinite_events.get(cause, 0))
        count = job.incidents_confirmed.get(cause, 0)
        yield Sample(metric.INCIDENTS, (name, cause), count, newest.get(cause) if count else None)
    yield Sample(metric.INCIDENTS_OPEN, (name,), len(open_ones))
    for incident in open_ones[-1:]:
        if incident.verdict.first is not None:
            yield Sample(metric.INCIDENT_FIRST_RANK, (name,), incident.verdict.first.rank)
    for kind in (EXPLODING, LOSS):
        yield Sample(metric.WARNINGS, (name, kind), job.warned.get(kind, 0))


def _of_progress(
    state: State, job: JobState, ranks: list[RankState], over: bool, now: float
) -> Iterator[Sample]:
    name = job.name
    conditions = document.rank_conditions(state, job)
    for condition in RankCondition:
        yield Sample(metric.JOB_RANKS, (name, condition.value), conditions[condition])
    yield Sample(metric.JOB_RUNNING, (name,), not over)
    yield Sample(metric.JOB_GENERATION, (name,), job.generation)
    yield Sample(metric.UNWATCHED, (name,), len(job.unwatched))
    for family, value in (
        (metric.JOB_STEP, document.newest_step(ranks)),
        (metric.JOB_SLOWEST_STEP, document.slowest_step(ranks)),
        (metric.OVERHEAD, document.overhead(ranks).ratio),
    ):
        if value is not None:
            yield Sample(family, (name,), value)
    if ranks and not over:
        newest = max(rank.heard_at for rank in ranks)
        yield Sample(metric.JOB_SILENT_SECONDS, (name,), max(0.0, now - newest))


def _of_drops(job: JobState, journals: list[Journal]) -> Iterator[Sample]:
    counts = document.dropped(job.dropped, journals)
    for reason in sorted({reason.value for reason in DropReason} | counts.keys()):
        yield Sample(metric.EVENTS_DROPPED, (job.name, reason), counts.get(reason, 0))


def _of_decisions(name: str, dossier: Dossier) -> Iterator[Sample]:
    counts = Counter((one.action, one.outcome) for one in dossier.decisions)
    for action, outcome in _OUTCOMES:
        count = counts[action, outcome]
        yield Sample(metric.DECISIONS, (name, action.value, outcome.value), count)
        if action is Action.ROLLBACK:
            yield Sample(metric.ROLLBACKS, (name, outcome.value), count)
    if dossier.roots:
        standings = Counter(standing_of(dossier.checkpoints).values())
        for standing in Standing:
            yield Sample(metric.CHECKPOINTS, (name, standing.value), standings[standing])
    pin = newest_good(dossier.checkpoints)
    if pin is not None:
        yield Sample(metric.LAST_GOOD_STEP, (name,), pin.step)
        written = max(one.modified_at for one in dossier.checkpoints if one.path == pin.path)
        if written:
            yield Sample(metric.LAST_GOOD_TIME, (name,), written)


def _of_first_ranks(name: str, incidents: Iterable[Incident]) -> Iterator[Sample]:
    newest: dict[tuple[int, str], Incident] = {}
    counts: Counter[tuple[int, str]] = Counter()
    for incident in incidents:
        first = incident.verdict.first
        if incident.confirmed_at is not None and first is not None:
            counts[first.rank, first.node] += 1
            newest[first.rank, first.node] = incident
    for (rank, node), count in counts.most_common():
        labels, last = (name, str(rank), node), newest[rank, node]
        yield Sample(metric.RANK_INCIDENTS, labels, count, last.id)
        yield Sample(metric.RANK_LAST_INCIDENT, labels, last.confirmed_at or 0.0)


def _of_silent_ranks(name: str, ranks: list[RankState], now: float) -> Iterator[Sample]:
    silent = [
        rank
        for rank in ranks
        if now - rank.heard_at > _SILENT_SECONDS and not (rank.progress is not None and rank.progress.ended)
    ]
    silent.sort(key=lambda rank: (rank.heard_at, rank.hello.rank))
    for rank in silent[:_SILENT_RANKS]:
        yield Sample(
            metric.RANK_SILENT_SECONDS, (name, str(rank.hello.rank), rank.hello.node), now - rank.heard_at
        )


def _of_bad_ranks(name: str, events: Counter[tuple[int, str]]) -> Iterator[Sample]:
    for (rank, node), count in sorted(events.items()):
        yield Sample(metric.RANK_NONFINITE_EVENTS, (name, str(rank), node), count)
