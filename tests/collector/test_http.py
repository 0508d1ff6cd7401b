"""The JSON API, the page and the metrics of a running collector."""

from __future__ import annotations

import re
import subprocess
from typing import TYPE_CHECKING

from gradwatch.collector.app import running
from gradwatch.protos.v1 import gradwatch_pb2 as pb
from tests.collector.client import (
    batch,
    hello,
    one_bad_rank,
    sidecar,
)
from tests.collector.running import config, http, run

if TYPE_CHECKING:
    from pathlib import Path


def test_what_is_not_there_is_404_and_says_what_is(tmp_path: Path):
    async def scenario() -> None:
        async with running(config(tmp_path)) as info, http(info) as client:
            async with sidecar(info.grpc) as it:
                await it.send(one_bad_rank())
            for path, says in (
                ("/api/v1/jobs/nope", "known jobs: j"),
                ("/api/v1/jobs/nope/events", "known jobs: j"),
                ("/api/v1/incidents/nope", "/api/v1/incidents lists them"),
            ):
                answer = await client.get(path)
                assert answer.status_code == 404
                assert says in answer.json()["detail"]
            assert (await client.get("/api/v1/incidents", params={"status": "odd"})).status_code == 422
            assert (await client.get("/api/v1/incidents", params={"status": "closed"})).json() == []
            assert len((await client.get("/api/v1/incidents", params={"status": "open"})).json()) == 1

    run(scenario())


def test_openapi_tells_the_contract(tmp_path: Path):
    async def scenario() -> None:
        async with running(config(tmp_path)) as info, http(info) as client:
            api = (await client.get("/openapi.json")).json()
        schemas = api["components"]["schemas"]
        contract = (
            "id job generation status cause step round first origins tie clean_ranks unknown_ranks "
            "opened_at confirmed_at closed_at decisions"
        )
        assert {*contract.split()} <= {*schemas["IncidentDocument"]["properties"]}
        contract = (
            "rank node device device_id step round microbatch phase parameter module value count "
            "backward_position batch operator source"
        )
        assert {*contract.split()} <= {*schemas["OriginDocument"]["properties"]}
        assert {"/api/v1/jobs/{job}", "/api/v1/jobs/{job}/events", "/metrics"} <= {*api["paths"]}

    run(scenario())


def test_the_pages_files_are_let_in_by_a_strict_policy_and_kept_by_the_browser(tmp_path: Path):
    async def scenario() -> None:
        async with running(config(tmp_path)) as info, http(info) as client:
            page = await client.get("/")
            files = re.findall(r'(?:src|href)="(/assets/[^"]+)"', page.text)
            assert len(set(files)) == 3
            for path in ("/", *files):
                answer = await client.get(path)
                assert answer.status_code == 200
                assert answer.headers["content-security-policy"].startswith(
                    "default-src 'none'; script-src 'self'"
                )
                assert answer.headers["x-content-type-options"] == "nosniff"
                again = await client.get(path, headers={"If-None-Match": answer.headers["etag"]})
                assert again.status_code == 304
            assert (await client.get("/assets/nope.js")).status_code == 404
            assert (await client.get("/assets/..%2Fassets.py")).status_code == 404

    run(scenario())


# ---------------------------------------------------------------- metrics


def promtool(text: str) -> tuple[int, str, str]:
    command = ["promtool", "check", "metrics"]
    checked = subprocess.run(command, input=text, text=True, capture_output=True, check=False)
    return checked.returncode, checked.stdout, checked.stderr


def test_promtool_has_nothing_to_say_and_counters_start_at_zero(tmp_path: Path):
    async def scenario() -> None:
        async with running(config(tmp_path)) as info, http(info) as client, sidecar(info.grpc) as it:
            empty = (await client.get("/metrics")).text
            await it.send(pb.Report(batches=[batch("r", hello("r", 0, 1))]))
            first = (await client.get("/metrics")).text
            await it.send(one_bad_rank("other"))
            full = (await client.get("/metrics")).text
        for text in (empty, first, full):
            assert promtool(text) == (0, "", "")
        for cause in ("input", "loss_scale", "unknown"):
            for name in ("nonfinite_events", "incidents"):
                assert f'gradwatch_{name}_total{{cause="{cause}",training_job="j"}} 0.0' in first
        assert 'gradwatch_incidents_open{training_job="j"} 0.0' in first
        assert 'gradwatch_incident_first_rank{training_job="j"}' not in first
        assert 'gradwatch_incident_first_rank{training_job="other"} 0.0' in full
        assert 'gradwatch_rank_nonfinite_events_total{host="n0",rank="0",training_job="other"} 1.0' in full
        assert 'rank="1"' not in full
        assert 'gradwatch_job_ranks{state="watched",training_job="other"} 2.0' in full
        assert "_created" not in full

    run(scenario())
