"""The samples as the text that Prometheus reads: bounded, and in the format that it asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector, CollectorRegistry
from prometheus_client.samples import Exemplar

from gradwatch.collector.metrics import catalogue
from gradwatch.collector.metrics.catalogue import Kind
from gradwatch.collector.metrics.samples import Sample, job_samples, stray_samples
from gradwatch.collector.version import collector_version

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from prometheus_client.core import Metric as Family

    from gradwatch.collector.metrics.catalogue import Metric
    from gradwatch.collector.metrics.samples import JobSamples
    from gradwatch.collector.model import State
    from gradwatch.collector.notify.outbox import Outcome
    from gradwatch.collector.policy.dossier import Dossier

MAX_SERIES = 2000


class Source(NamedTuple):
    """What metrics are made from; each is asked at each scrape.

    Attributes:
        clock: the collector's time, in seconds since the epoch.
        notifications: how many came to which end.
    """

    state: Callable[[], State]
    dossiers: Callable[[], Mapping[str, Dossier]]
    policies_reloaded: Callable[[], bool]
    access_reloaded: Callable[[], bool]
    store_writable: Callable[[], bool]
    clock: Callable[[], float]
    notifications: Callable[[], Mapping[Outcome, int]] = dict


class StateMetrics(Collector):
    """The state as metrics.

    Args:
        source: what they are made from.
        max_series: at most so many; what is left out is counted.
    """

    def __init__(self, source: Source, max_series: int) -> None:
        self._source = source
        self._max_series = max_series
        self._dropped = 0

    def describe(self) -> Iterable[Family]:
        """Nothing: registering must not collect."""
        return []

    def collect(self) -> Iterator[Family]:
        """All families, also those without a sample."""
        source = self._source
        state = source.state()
        own = [
            Sample(catalogue.POLICY_RELOADED, (), source.policies_reloaded()),
            Sample(catalogue.ACCESS_RELOADED, (), source.access_reloaded()),
            Sample(catalogue.STORE_WRITABLE, (), source.store_writable()),
            Sample(catalogue.BUILD_INFO, (collector_version(),), 1),
            *(
                Sample(catalogue.NOTIFICATIONS, (outcome.value,), count)
                for outcome, count in source.notifications().items()
            ),
            *stray_samples(state),
        ]
        jobs = job_samples(state, source.dossiers(), source.clock())
        kept, left_out = bounded(jobs, self._max_series - len(own) - 1)
        self._dropped += left_out
        own.append(Sample(catalogue.SERIES_DROPPED, (), self._dropped))
        by_metric: dict[str, list[Sample]] = {one.name: [] for one in catalogue.ALL}
        for sample in (*own, *kept):
            by_metric[sample.metric.name].append(sample)
        for one in catalogue.ALL:
            yield _family(one, by_metric[one.name])


def bounded(jobs: Iterable[JobSamples], room: int) -> tuple[list[Sample], int]:
    """As many samples as there is room for, and how many were left out.

    Jobs that run go before those that ended, and the newest before older ones; of a job, all or nothing.
    What is told of single ranks comes after what is told of jobs.
    """
    ordered = sorted(jobs, key=lambda job: (job.running, job.last_seen), reverse=True)
    kept: list[Sample] = []
    left_out = 0
    with_room = []
    for job in ordered:
        if len(kept) + len(job.of_job) <= room:
            kept += job.of_job
            with_room.append(job)
        else:
            left_out += len(job.of_job) + len(job.of_ranks)
    for job in with_room:
        fits = job.of_ranks[: room - len(kept)]
        kept += fits
        left_out += len(job.of_ranks) - len(fits)
    return kept, left_out


def new_registry(source: Source, max_series: int = MAX_SERIES) -> CollectorRegistry:
    """A registry with these metrics only."""
    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
    registry = CollectorRegistry(auto_describe=False)
    registry.register(StateMetrics(source, max_series))
    return registry


def render(registry: CollectorRegistry, accept: str | None) -> tuple[bytes, str]:
    """The metrics as text.

    Args:
        registry: whose.
        accept: the header of that name. Exemplars are in OpenMetrics only.

    Returns:
        The text, and its content type.
    """
    encode, content_type = choose_encoder(accept or "")
    return encode(registry), content_type


def _family(metric: Metric, samples: Iterable[Sample]) -> Family:
    if metric.kind is Kind.GAUGE:
        gauge = GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)
        for sample in samples:
            gauge.add_metric(sample.labels, sample.value)
        return gauge
    counter = CounterMetricFamily(metric.name.removesuffix("_total"), metric.help, labels=metric.labels)
    for sample in samples:
        exemplar = None if sample.incident is None else Exemplar({"incident": sample.incident}, 1.0)
        counter.add_metric(sample.labels, sample.value, exemplar=exemplar)
    return counter
