"""The Prometheus metrics, computed from the state whenever they are scraped.

Not here yet, since what they tell does not exist: `gradwatch_decisions_total` and
`gradwatch_rollbacks_total` (a counter at 0 needs its label values, and those are the
policy's), `gradwatch_last_good_checkpoint_step`, `gradwatch_policy_last_reload_successful`.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector, CollectorRegistry

from gradwatch.collector import document
from gradwatch.collector.model import Cause, RankCondition, Status, cause_label
from gradwatch.collector.observations import DropReason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from prometheus_client.core import Metric

    from gradwatch.collector.model import Incident, JobState, Journal, State

_CAUSES = [cause_label(cause) for cause in (*Cause, None)]
# Every scraper knows this version; the newer ones only add names that we do not use.
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class StateMetrics(Collector):
    """The state as metrics.

    Args:
        state: gives the state as it is now.
    """

    def __init__(self, state: Callable[[], State]) -> None:
        self._state = state

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not collect."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All families, also those without a sample."""
        state = self._state()
        yield from _incident_metrics(state)
        yield from _job_metrics(state)
        yield _dropped(state)


def render(registry: CollectorRegistry) -> bytes:
    """The Prometheus text format."""
    return prometheus_client.generate_latest(registry)


def new_registry(state: Callable[[], State]) -> CollectorRegistry:
    """A registry with these metrics only."""
    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
    registry = CollectorRegistry(auto_describe=False)
    registry.register(StateMetrics(state))
    return registry


def _incident_metrics(state: State) -> Iterator[Metric]:
    nonfinite = CounterMetricFamily(
        "gradwatch_nonfinite_events",
        "Reports of non-finite local gradients, by cause.",
        labels=["training_job", "cause"],
    )
    confirmed = CounterMetricFamily(
        "gradwatch_incidents",
        "Confirmed incidents, by cause.",
        labels=["training_job", "cause"],
    )
    open_count = GaugeMetricFamily(
        "gradwatch_incidents_open",
        "Incidents that are suspected or confirmed, and not closed.",
        labels=["training_job"],
    )
    first_rank = GaugeMetricFamily(
        "gradwatch_incident_first_rank",
        "The rank that was first, while an incident is open.",
        labels=["training_job"],
    )
    by_rank = CounterMetricFamily(
        "gradwatch_rank_nonfinite_events",
        "Reports of non-finite local gradients by a rank; only ranks that ever had one.",
        labels=["training_job", "rank", "host"],
    )
    for job in state.jobs.values():
        for cause in _CAUSES:
            nonfinite.add_metric([job.name, cause], job.nonfinite_events.get(cause, 0))
            confirmed.add_metric([job.name, cause], job.incidents_confirmed.get(cause, 0))
        open_ones = _open_incidents(state, job)
        open_count.add_metric([job.name], len(open_ones))
        for incident in open_ones[-1:]:
            if incident.verdict.first is not None:
                first_rank.add_metric([job.name], incident.verdict.first.rank)
    for (name, rank, host), count in sorted(_events_by_rank(state).items()):
        by_rank.add_metric([name, str(rank), host], count)
    yield from (nonfinite, confirmed, open_count, first_rank, by_rank)


def _job_metrics(state: State) -> Iterator[Metric]:
    step = GaugeMetricFamily(
        "gradwatch_job_step", "The newest step that a rank has reached.", labels=["training_job"]
    )
    slowest = GaugeMetricFamily(
        "gradwatch_job_slowest_step", "The step of the rank that is behind.", labels=["training_job"]
    )
    ranks = GaugeMetricFamily(
        "gradwatch_job_ranks",
        "Ranks of the world: watched, ended, or missing since no process said it was that rank.",
        labels=["training_job", "state"],
    )
    overhead = GaugeMetricFamily(
        "gradwatch_agent_overhead_ratio",
        "The probe's own time as a share of the training's, on the rank where it is largest.",
        labels=["training_job"],
    )
    for job in state.jobs.values():
        current = document.current_ranks(state, job)
        conditions = document.rank_conditions(state, job)
        for condition in RankCondition:
            ranks.add_metric([job.name, condition.value], conditions[condition])
        for family, value in (
            (step, document.newest_step(current)),
            (slowest, document.slowest_step(current)),
            (overhead, document.overhead(current).ratio),
        ):
            if value is not None:
                family.add_metric([job.name], value)
    yield from (step, slowest, ranks, overhead)


def _dropped(state: State) -> Metric:
    family = CounterMetricFamily(
        "gradwatch_events_dropped",
        "What was reported and is not, or not wholly, taken in; no training_job where that is not known.",
        labels=["training_job", "reason"],
    )
    journals: dict[str, list[Journal]] = {name: [] for name in state.jobs}
    for journal in state.journals.values():
        if journal.job is not None:
            journals[journal.job].append(journal)
    for name, job in state.jobs.items():
        counts = document.dropped(job.dropped, journals[name])
        for reason in sorted({reason.value for reason in DropReason} | counts.keys()):
            family.add_metric([name, reason], counts.get(reason, 0))
    for reason, count in sorted(state.strays.items()):
        family.add_metric(["", reason], count)
    return family


def _open_incidents(state: State, job: JobState) -> list[Incident]:
    return [
        incident for incident in document.incidents_of(state, job) if incident.status is not Status.CLOSED
    ]


def _events_by_rank(state: State) -> Counter[tuple[str, int, str]]:
    counts: Counter[tuple[str, int, str]] = Counter()
    for journal in state.journals.values():
        rank = journal.rank
        if rank is not None and rank.nonfinite_events:
            counts[rank.attempt.job, rank.hello.rank, rank.hello.node] += rank.nonfinite_events
    return counts
