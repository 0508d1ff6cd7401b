"""The text of the metrics: bounded, and with exemplars where the format has them."""

from __future__ import annotations

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from gradwatch.collector.metrics import catalogue
from gradwatch.collector.metrics.exposition import Source, bounded, new_registry, render
from gradwatch.collector.metrics.samples import JobSamples, Sample, job_samples
from tests.collector.history import NOW, Told, batch, nonfinite, progress

OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"


def job(name: str, *, running: bool, last_seen: float, of_ranks: int = 0) -> JobSamples:
    of_job = [Sample(catalogue.JOB_STEP, (name,), 1), Sample(catalogue.JOB_RUNNING, (name,), 1)]
    ranks = [Sample(catalogue.RANK_INCIDENTS, (name, str(rank), "n"), 1) for rank in range(of_ranks)]
    return JobSamples(running, last_seen, of_job, ranks)


@pytest.mark.parametrize(
    ("room", "kept", "left_out"),
    [
        (100, "new old ended new/0 new/1 new/2 old/0", 0),
        # Ranks give way first, and those of a job that comes later before others.
        (9, "new old ended new/0 new/1 new/2", 1),
        (7, "new old ended new/0", 3),
        # A job is told of wholly or not at all, and the ranks of one that is not are not either.
        (5, "new old new/0", 5),
        (3, "new new/0", 7),
        (1, "", 10),
    ],
)
def test_what_is_left_out(room, kept, left_out):
    jobs = [
        job("ended", running=False, last_seen=9),
        job("old", running=True, last_seen=1, of_ranks=1),
        job("new", running=True, last_seen=2, of_ranks=3),
    ]
    samples, missing = bounded(jobs, room)
    names = [one.labels[0] if len(one.labels) == 1 else "/".join(one.labels[:2]) for one in samples]
    assert list(dict.fromkeys(names)) == kept.split()
    assert missing == left_out
    assert len(samples) <= room


def all_bad(world_size: int) -> Told:
    told = Told().hellos(world_size)
    return told.tell(
        *(batch(f"r{rank}", 1, nonfinite(5 + min(rank, 1))) for rank in range(world_size)),
        *(progress(f"r{rank}", 7, 2, bad_rounds=1) for rank in range(world_size)),
    )


def source(told: Told) -> Source:
    return Source(
        state=lambda: told.state,
        dossiers=dict,
        policies_reloaded=lambda: True,
        access_reloaded=lambda: True,
        store_writable=lambda: True,
        clock=lambda: NOW,
    )


def test_what_is_left_out_is_counted_over_scrapes():
    told = all_bad(300)
    registry = new_registry(source(told), max_series=200)
    wanted = sum(len(one.of_job) + len(one.of_ranks) for one in job_samples(told.state, {}, NOW))
    dropped = []
    for _ in range(2):
        text, _ = render(registry, None)
        series = [line for line in text.decode().splitlines() if not line.startswith("#")]
        assert len(series) == 200
        (line,) = (line for line in series if line.startswith("gradwatch_series_dropped_total "))
        dropped.append(float(line.split()[1]))
    own = 5  # policies, access, store, version, and this counter
    assert dropped == [wanted + own - 200, 2 * (wanted + own - 200)]


def test_openmetrics_has_the_incident_as_exemplar():
    told = all_bad(2)
    text, content_type = render(new_registry(source(told)), OPENMETRICS)
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    families = {family.name: family for family in text_string_to_metric_families(text.decode())}
    exemplars = {
        sample.exemplar.labels["incident"]
        for name in ("gradwatch_incidents", "gradwatch_rank_incidents")
        for sample in families[name].samples
        if sample.exemplar is not None
    }
    assert exemplars == {told.incident.id}
    plain, content_type = render(new_registry(source(told)), "text/plain")
    assert content_type.startswith("text/plain")
    assert told.incident.id.encode() not in plain


def test_the_catalogue_keeps_to_the_rules_of_names():
    reserved = {"job", "instance", "node", "namespace", "pod", "container", "service", "endpoint"}
    names = [metric.name for metric in catalogue.ALL]
    assert len(names) == len(set(names))
    for metric in catalogue.ALL:
        assert metric.name.startswith("gradwatch_")
        assert (metric.kind is catalogue.Kind.COUNTER) == metric.name.endswith("_total")
        assert reserved.isdisjoint(metric.labels), metric.name
        assert metric.help.endswith((".", "version."))
