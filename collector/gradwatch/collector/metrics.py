"""The Prometheus metrics, computed from the state whenever they are scraped."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector, CollectorRegistry

from gradwatch.collector import document
from gradwatch.collector.model import Cause, RankCondition, Status, cause_label
from gradwatch.collector.observations import DropReason
from gradwatch.collector.policy.checkpoints import newest_good
from gradwatch.collector.policy.decision import Outcome
from gradwatch.collector.policy.dossier import Dossier
from gradwatch.collector.policy.model import Action
from gradwatch.collector.told import EXPLODING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from prometheus_client.core import Metric

    from gradwatch.collector.model import Incident, JobState, Journal, State
    from gradwatch.collector.policies import PolicyBook

_CAUSES = [cause_label(cause) for cause in (*Cause, None)]
_ACTS = (Action.ROLLBACK, Action.HALT)
# A decision counts when it is known what became of it: a counter never falls.
_OUTCOMES = [
    (action, outcome)
    for action in Action
    for outcome in Outcome
    if outcome is not Outcome.PENDING and (outcome is Outcome.RECORDED) != (action in _ACTS)
]
# Every scraper knows this version; the newer ones only add names that we do not use.
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class StateMetrics(Collector):
    """The state as metrics.

    Args:
        state: gives the state as it is now.
        dossiers: gives what is decided, by job.
        policies: those in force.
    """

    def __init__(
        self,
        state: Callable[[], State],
        dossiers: Callable[[], Mapping[str, Dossier]],
        policies: PolicyBook,
    ) -> None:
        self._state = state
        self._dossiers = dossiers
        self._policies = policies

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not collect."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All families, also those without a sample."""
        state = self._state()
        yield from _incident_metrics(state)
        yield from _job_metrics(state)
        yield _dropped(state)
        yield from _decision_metrics(state, self._dossiers())
        reloaded = GaugeMetricFamily(
            "gradwatch_policy_last_reload_successful",
            "1 while every policy file is the one in force, 0 when one of them does not load.",
        )
        reloaded.add_metric([], float(self._policies.last_reload_successful))
        yield reloaded


def render(registry: CollectorRegistry) -> bytes:
    """The Prometheus text format."""
    return prometheus_client.generate_latest(registry)


def new_registry(
    state: Callable[[], State],
    dossiers: Callable[[], Mapping[str, Dossier]],
    policies: PolicyBook,
) -> CollectorRegistry:
    """A registry with these metrics only."""
    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
    registry = CollectorRegistry(auto_describe=False)
    registry.register(StateMetrics(state, dossiers, policies))
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
    warned = CounterMetricFamily(
        "gradwatch_warnings",
        "Early warnings, by kind: gradients that are finite still and grow far beyond what they usually are.",
        labels=["training_job", "kind"],
    )
    for job in state.jobs.values():
        warned.add_metric([job.name, EXPLODING], job.warned.get(EXPLODING, 0))
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
    yield from (nonfinite, confirmed, open_count, first_rank, by_rank, warned)


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


def _decision_metrics(state: State, dossiers: Mapping[str, Dossier]) -> Iterator[Metric]:
    decisions = CounterMetricFamily(
        "gradwatch_decisions",
        "Decisions of policy or of an operator, by what was decided and what has become of it.",
        labels=["training_job", "action", "outcome"],
    )
    rollbacks = CounterMetricFamily(
        "gradwatch_rollbacks",
        "Rollbacks, by what has become of them.",
        labels=["training_job", "outcome"],
    )
    pinned = GaugeMetricFamily(
        "gradwatch_last_good_checkpoint_step",
        "The step of the newest checkpoint that is known good.",
        labels=["training_job"],
    )
    for name in state.jobs:
        dossier = dossiers.get(name, Dossier(name))
        counts = Counter((one.action, one.outcome) for one in dossier.decisions)
        for action, outcome in _OUTCOMES:
            decisions.add_metric([name, action.value, outcome.value], counts[action, outcome])
            if action is Action.ROLLBACK:
                rollbacks.add_metric([name, outcome.value], counts[action, outcome])
        pin = newest_good(dossier.checkpoints)
        if pin is not None:
            pinned.add_metric([name], pin.step)
    yield from (decisions, rollbacks, pinned)


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
