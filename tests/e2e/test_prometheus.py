"""A real Prometheus scrapes a real run; a real Alertmanager pages; every panel of the dashboards has data."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import httpx
import pytest
from standardwebhooks import Webhook

from tests import monitoring
from tests.collector.notify.receiver import Receiver
from tests.collector.notify.receiver import receiver as new_receiver
from tests.collector.notify.test_message import HANDED_OUT
from tests.monitoring import ask, until
from tests.ranks import REPOSITORY

if TYPE_CHECKING:
    from collections.abc import Iterator

README_QUERIES = re.findall(r"```promql\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
DASHBOARDS = sorted((REPOSITORY / "helm/gradwatch/dashboards").glob("*.json"))

# It only says what it would do: the bad rank stays bad, and its incident open.
POLICY = """
apiVersion: gradwatch/v1
mode: dry_run
rules:
  - name: any
    match: {}
    action: rollback
checkpoints:
  root: {root}
"""


class Watched(NamedTuple):
    """A job, and who watches it."""

    collector: str
    prometheus: str
    pager: monitoring.Pager
    receiver: Receiver


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Two ranks, of which rank 1 goes bad once Prometheus has seen that nothing is wrong."""
    folder = tmp_path_factory.mktemp("watched")
    with contextlib.ExitStack() as stack:
        pager = stack.enter_context(monitoring.pager())
        alertmanager = stack.enter_context(monitoring.alertmanager(folder, pager.port))
        receiver = stack.enter_context(new_receiver())
        secret = folder / "secret"
        secret.write_text(HANDED_OUT)
        told = ["--webhook", receiver.url, "--webhook-secret-file", str(secret)]
        job = stack.enter_context(monitoring.training(folder, *told, ranks=2, bad_step=100, policy=POLICY))
        server = stack.enter_context(monitoring.prometheus(folder, [job.port], alertmanager))
        yield Watched(f"http://127.0.0.1:{job.port}", server, pager, receiver)


def incident_of(watched: Watched) -> dict[str, Any]:
    (incident,) = until(lambda: httpx.get(f"{watched.collector}/api/v1/incidents").json())
    return dict(incident)


@pytest.mark.e2e
def test_whoever_is_to_be_paged_is_paged_once_and_told_job_and_rank(watched: Watched) -> None:
    ((_, page),) = until(lambda: watched.pager.firing("GradwatchIncident"))
    assert page["labels"]["training_job"] == "watched"
    assert page["labels"]["cause"] == incident_of(watched)["cause"]
    assert re.search(r"Job watched: .* Rank 1 on .* was first\.", page["annotations"]["summary"])
    assert page["annotations"]["runbook_url"].endswith("/runbooks/incident/")

    # However often the rule is looked at again.
    evaluations: set[str] = set()

    def evaluated() -> bool:
        groups = httpx.get(f"{watched.prometheus}/api/v1/rules").json()["data"]["groups"]
        evaluations.update(one["lastEvaluation"] for one in groups if one["name"] == "gradwatch.incidents")
        return len(evaluations) > 5

    until(evaluated)
    assert len(watched.pager.firing("GradwatchIncident")) == 1


@pytest.mark.e2e
def test_the_readmes_queries_are_answered_from_a_real_scrape(watched: Watched) -> None:
    assert len(README_QUERIES) >= 5
    for query in README_QUERIES:
        rows = until(lambda query=query: ask(watched.prometheus, query))
        for row in rows:
            assert row["metric"]["training_job"] == "watched", row

    (first,) = until(lambda: ask(watched.prometheus, "gradwatch_incident_first_rank"))
    assert first["value"][1] == "1"
    # Labels that a server rewrites must not be ours.
    (series,) = ask(watched.prometheus, 'gradwatch_rank_nonfinite_events_total{rank="1"}')
    assert {"exported_job", "exported_instance"}.isdisjoint(series["metric"])
    assert series["metric"]["job"] == "gradwatch"

    text = httpx.get(f"{watched.collector}/metrics").text
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
    incident = incident_of(watched)
    assert (incident["first"]["rank"], incident["step"]) == (1, 100), json.dumps(incident)


def queries_of(dashboard: dict[str, Any]) -> dict[str, str]:
    """All queries, by where they are, of the job that is watched."""
    found = {}
    for panel in dashboard["panels"]:
        for number, target in enumerate(panel["targets"]):
            found[f"{dashboard['title']}: {panel['title']}, query {number}"] = target["expr"]
    for annotation in dashboard["annotations"]["list"]:
        if annotation.get("expr"):
            found[f"{dashboard['title']}: marks {annotation['name']}"] = annotation["expr"]
    return {
        where: query.replace("$training_job", "watched").replace("$rank", ".*")
        for where, query in found.items()
    }


# Nothing is to be seen of them in a job that is not rolled back.
NOT_HERE = {"Gradwatch / Fleet: marks Rollbacks", "Gradwatch / Job: marks Rollbacks"}


@pytest.mark.e2e
@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.stem)
def test_every_panel_of_a_dashboard_has_data(watched: Watched, file: Any) -> None:
    dashboard = json.loads(file.read_text())
    for where, query in queries_of(dashboard).items():
        if where in NOT_HERE:
            ask(watched.prometheus, query)  # It is at least a query.
        else:
            assert until(lambda query=query: ask(watched.prometheus, query)), where
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            labels = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"])
            assert labels is not None
            series = labels[1].replace("$training_job", "watched")
            assert all(
                labels[2] in row["metric"] for row in until(lambda s=series: ask(watched.prometheus, s))
            )


@pytest.mark.e2e
def test_a_runs_own_webhook_is_told_in_plain_words(watched: Watched) -> None:
    headers, content = until(lambda: watched.receiver.got and watched.receiver.got[0])
    told = Webhook(HANDED_OUT).verify(content, headers)["data"]
    assert told["id"] == incident_of(watched)["id"]
    assert "Rank 1 on node" in " ".join(told["verdict"])
    assert len(watched.receiver.got) == 1


@pytest.mark.e2e
def test_the_job_is_drawn_with_its_ranks_and_how_large_their_gradients_were(watched: Watched) -> None:
    incident_of(watched)

    def drawn() -> dict[str, Any] | None:
        picture = httpx.get(f"{watched.collector}/api/v1/jobs/watched/picture").json()
        verdicts = {one["step"]: one["verdict"] for one in picture["checkpoints"]}
        scanned = (verdicts.get(100), verdicts.get(110)) == ("good", "bad")
        seen = picture["incidents"] and scanned and "b" in picture["ranks"][0]["states"]
        return dict(picture) if seen else None

    picture = until(drawn)
    (mark,) = picture["incidents"]
    for row in picture["ranks"]:
        assert len(row["states"]) == len(row["magnitudes"]) == picture["columns"]
        # Finite before, in columns that are there to be seen.
        assert any(magnitude is not None for magnitude in row["magnitudes"][: mark["column"] + 1])
    # Rank 0 was contaminated by the update, one step later.
    first = {row["rank"]: row["states"].index("b") for row in picture["ranks"]}
    assert first[1] == mark["column"] <= first[0]


@pytest.mark.e2e
def test_the_incidents_id_is_an_exemplar(watched: Watched) -> None:
    incident = incident_of(watched)

    def exemplars() -> set[str]:
        now = time.time()
        asked = {"query": "gradwatch_incidents_total", "start": now - 600, "end": now + 60}
        answer = httpx.get(f"{watched.prometheus}/api/v1/query_exemplars", params=asked).json()
        return {one["labels"]["incident"] for series in answer["data"] for one in series["exemplars"]}

    assert until(exemplars) == {incident["id"]}


def test_the_dashboards_are_what_their_code_makes():
    done = subprocess.run(
        [sys.executable, "-m", "scripts.dashboards", "--check"],
        cwd=REPOSITORY,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
