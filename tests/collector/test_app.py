"""A whole collector in this process: real gRPC, real HTTP, a real store."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sqlite3
import subprocess
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from gradwatch.collector import reader, statedir
from gradwatch.collector.app import CollectorConfig, running, serve
from gradwatch.collector.errors import (
    BindError,
    NoStateError,
    NotLoopbackError,
    PortTakenError,
    StateDirError,
    StateDirInUseError,
)
from gradwatch.collector.store import Store
from gradwatch.protos.v1 import gradwatch_pb2 as pb
from tests.collector.client import (
    batch,
    hello,
    launch_ended,
    launch_started,
    nonfinite,
    one_bad_rank,
    progress,
    sidecar,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine
    from pathlib import Path

ANY = "127.0.0.1:0"


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


def config(tmp_path: Path, **changes: Any) -> CollectorConfig:
    return CollectorConfig(**{"state_dir": tmp_path / "state", "grpc": ANY, "http": ANY, **changes})


@contextlib.asynccontextmanager
async def http(info: statedir.CollectorInfo) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=info.http, trust_env=False) as client:
        yield client


# ---------------------------------------------------------------- the stream


def test_a_verdict_reaches_the_api_the_sidecar_and_the_metrics(tmp_path: Path):
    async def scenario() -> None:
        async with running(config(tmp_path)) as info, http(info) as client:
            async with sidecar(info.grpc, "team/j") as it:
                assert it.got[0].welcome.http_url == info.http
                await it.send(one_bad_rank("team/j"))
                pushed = await it.until_status(lambda status: bool(status["incidents"]))
            job = (await client.get("/api/v1/jobs/team/j")).json()
            assert pushed == job
            assert (job["status"], job["ranks_watched"], job["world_size"]) == ("running", 2, 2)
            (incident,) = job["incidents"]
            assert (incident["status"], incident["clean_ranks"]) == ("confirmed", [1])
            assert (incident["first"]["rank"], incident["first"]["parameter"]) == (0, "a.weight")
            assert (await client.get("/api/v1/incidents")).json() == [incident]
            assert (await client.get(f"/api/v1/incidents/{incident['id']}")).json() == incident
            events = (await client.get("/api/v1/jobs/team/j/events")).json()
            assert [event["kind"] for event in events if event["seq"] >= 0] == ["hello", "nonfinite", "hello"]
            metrics = (await client.get("/metrics")).text
            assert 'gradwatch_incidents_total{cause="unknown",training_job="team/j"} 1.0' in metrics

    run(scenario())


def test_a_report_that_comes_again_counts_once(tmp_path: Path):
    async def scenario() -> None:
        async with running(config(tmp_path)) as info, http(info) as client:
            for _ in range(3):
                async with sidecar(info.grpc) as it:
                    await it.send(one_bad_rank())
                    await it.send(one_bad_rank())
            events = (await client.get("/api/v1/jobs/j/events")).json()
            # Beside them the log says how far ranks had come.
            assert len([event for event in events if event["kind"] != "progress"]) == 3
            assert len((await client.get("/api/v1/incidents")).json()) == 1

    run(scenario())


def test_the_jobs_last_word_comes_before_the_acknowledgement_of_its_end(tmp_path: Path):
    async def scenario() -> None:
        async with running(config(tmp_path)) as info, sidecar(info.grpc, "j") as it:
            await it.send(pb.Report(batches=[batch("l", launch_started())]))
            report = one_bad_rank()
            report.batches.append(batch("l", launch_ended(exit_code=3)))
            await it.send(report)
            # `send` read no further than the acknowledgement.
            last = it.statuses[-1]
            assert (last["status"], last["exit_code"], last["ended_by"]) == ("ended", 3, "command")
            assert [one["status"] for one in last["incidents"]] == ["closed"]

    run(scenario())


def test_a_restarted_sidecar_is_told_at_once_how_its_job_is(tmp_path: Path):
    async def scenario() -> None:
        async with running(config(tmp_path)) as info:
            async with sidecar(info.grpc) as it:
                await it.send(one_bad_rank())
                assert it.statuses == []
            async with sidecar(info.grpc, "j", "unheard of") as it:
                assert (await it.until_status())["job"] == "j"

    run(scenario())


def test_two_jobs_do_not_touch_each_other(tmp_path: Path):
    async def scenario() -> None:
        async with running(config(tmp_path)) as info, http(info) as client:
            async with sidecar(info.grpc) as one, sidecar(info.grpc) as two:
                await asyncio.gather(one.send(one_bad_rank("a", 5)), two.send(one_bad_rank("b", 7)))
            found = (await client.get("/api/v1/incidents", params={"job": "b"})).json()
            assert [(one["job"], one["round"]) for one in found] == [("b", 7)]
            assert len((await client.get("/api/v1/jobs")).json()) == 2

    run(scenario())


def test_nonsense_is_acknowledged_counted_and_survived(tmp_path: Path):
    async def scenario() -> None:
        async with running(config(tmp_path)) as info, http(info) as client, sidecar(info.grpc) as it:
            await it.send(pb.Report(batches=[batch("x", nonfinite(5, 5)), batch("", nonfinite(0, 0))]))
            await it.send(pb.Report(batches=[batch("y", hello("other", 0), pb.Record(seq=1))]))
            await it.send(pb.Report(progress=[progress("x", 4, 1), progress("", 4, 1)]))
            await it.send(one_bad_rank())
            assert len((await client.get("/api/v1/incidents")).json()) == 1
            metrics = (await client.get("/metrics")).text
            assert 'reason="malformed_record",training_job=""} 1.0' in metrics
            assert 'reason="unknown_record",training_job=""} 1.0' in metrics
            assert 'reason="unknown_incarnation",training_job=""} 1.0' in metrics

    run(scenario())


def test_a_bug_in_the_fold_costs_a_report_and_not_the_collector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    async def scenario() -> None:
        async with running(config(tmp_path)) as info, http(info) as client, sidecar(info.grpc) as it:
            with monkeypatch.context() as patch:
                patch.setattr("gradwatch.collector.engine.fold", lambda *_: 1 // 0)
                await it.send(one_bad_rank("a"))
            await it.send(one_bad_rank("b"))
            assert len((await client.get("/api/v1/incidents")).json()) == 1
            assert 'reason="internal_error",training_job=""} 1.0' in (await client.get("/metrics")).text

    run(scenario())


def test_while_the_store_fails_nothing_is_acknowledged_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    impatient = classmethod(lambda cls, path: cls(f"sqlite:///{path}", busy_seconds=0.1))
    monkeypatch.setattr(Store, "in_file", impatient)

    async def scenario() -> None:
        async with running(config(tmp_path)) as info, http(info) as client:
            other = sqlite3.connect(tmp_path / "state" / statedir.DATABASE, isolation_level=None)
            other.execute("BEGIN IMMEDIATE")
            async with sidecar(info.grpc) as it:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await it.send(one_bad_rank())
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert (await client.get("/-/ready")).status_code == 503
            assert (await client.get("/-/healthy")).status_code == 200
            assert (await client.get("/api/v1/jobs")).json() == []
            other.execute("ROLLBACK")
            other.close()
            async with sidecar(info.grpc) as it:
                await it.send(one_bad_rank())
            assert (await client.get("/-/ready")).status_code == 200
            events = (await client.get("/api/v1/jobs/j/events")).json()
            # Beside them the log says how far ranks had come.
            assert len([event for event in events if event["kind"] != "progress"]) == 3

    run(scenario())


def test_silence_is_noticed_without_any_report(tmp_path: Path):
    async def scenario() -> None:
        async with running(config(tmp_path, confirm_timeout=0.1)) as info, sidecar(info.grpc, "j") as it:
            report = one_bad_rank()
            del report.progress[1]
            await it.send(report)
            status = await it.until_status(lambda status: status["incidents"][0]["status"] == "confirmed")
            assert status["incidents"][0]["unknown_reasons"] == {"1": "silent"}

    run(scenario())


def test_health_and_reflection_answer(tmp_path: Path):
    async def scenario() -> None:
        async with running(config(tmp_path)) as info, grpc.aio.insecure_channel(info.grpc) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            for service in ("", "gradwatch.v1.Ingest"):
                answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
            call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
            await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            listed = {service.name for service in (await call.read()).list_services_response.service}
            assert "gradwatch.v1.Ingest" in listed
            call.cancel()

    run(scenario())


# ---------------------------------------------------------------- HTTP


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


def test_the_page_lets_no_job_name_in_as_markup(tmp_path: Path):
    async def scenario() -> None:
        async with running(config(tmp_path)) as info, http(info) as client:
            async with sidecar(info.grpc) as it:
                await it.send(one_bad_rank("<script>alert(1)</script>"))
            answer = await client.get("/")
            assert "<script>" not in answer.text
            assert "&lt;script&gt;" in answer.text
            assert "was first: the gradient of a.weight turned NaN" in answer.text
            assert answer.headers["content-security-policy"].startswith(
                "default-src 'none'; style-src 'sha256-"
            )

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


# ---------------------------------------------------------------- process


def test_where_it_listens_is_written_while_it_runs(tmp_path: Path):
    state_dir = tmp_path / "state"

    async def scenario() -> None:
        async with running(config(tmp_path)) as info:
            assert json.loads((state_dir / "collector.json").read_text()) == {
                "pid": os.getpid(),
                "grpc": info.grpc,
                "grpc_tls": False,
                "http": info.http,
                "started_at": info.started_at,
                "version": info.version,
            }
            assert statedir.holder(state_dir) == info
        assert not (state_dir / "collector.json").exists()
        assert statedir.holder(state_dir) is None

    run(scenario())


def test_a_state_directory_serves_one_collector(tmp_path: Path):
    async def scenario() -> None:
        async with running(config(tmp_path)) as info:
            with pytest.raises(
                StateDirInUseError, match=f"in use by a collector .pid {os.getpid()}, {info.http}"
            ):
                async with running(config(tmp_path)):
                    pass
            # The one that was first goes on.
            async with sidecar(info.grpc) as it:
                await it.send(one_bad_rank())

    run(scenario())


def test_a_state_directory_that_cannot_be_made_is_said(tmp_path: Path):
    (tmp_path / "state").write_text("a file")

    async def scenario() -> None:
        with pytest.raises(StateDirError, match="give another --state-dir"):
            async with running(config(tmp_path)):
                pass

    run(scenario())


@pytest.mark.parametrize("which", ["grpc", "http"])
def test_an_explicit_port_that_is_taken_is_an_error(tmp_path: Path, which: str):
    async def scenario() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            with pytest.raises(PortTakenError, match=address):
                async with running(config(tmp_path, **{which: address})):
                    pass
        # Nothing was left behind: the same directory and port can be used.
        async with running(config(tmp_path, **{which: address})):
            pass

    run(scenario())


@pytest.mark.parametrize("which", ["grpc", "http"])
def test_a_default_port_that_is_taken_gives_way(tmp_path: Path, which: str, monkeypatch: pytest.MonkeyPatch):
    async def scenario() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            monkeypatch.setattr(f"gradwatch.collector.app.DEFAULT_{which.upper()}", address)
            async with running(config(tmp_path, **{which: None})) as info:
                assert getattr(info, which).removeprefix("http://") != address
                async with sidecar(info.grpc) as it, http(info) as client:
                    await it.send(one_bad_rank())
                    assert (await client.get("/-/healthy")).status_code == 200

    run(scenario())


ADDRESSES = [
    ("0.0.0.0:0", NotLoopbackError, "TLS and a token"),
    ("[::]:0", NotLoopbackError, "TLS and a token"),
    ("192.0.2.1:7700", NotLoopbackError, "TLS and a token"),
    ("7700", BindError, "HOST:PORT"),
    ("127.0.0.1:http", BindError, "HOST:PORT"),
    ("127.0.0.1:70000", BindError, "HOST:PORT"),
]


@pytest.mark.parametrize(("address", "kind", "says"), ADDRESSES)
def test_addresses_that_are_refused(tmp_path: Path, address: str, kind: type[BindError], says: str):
    async def scenario() -> None:
        for which in ("grpc", "http"):
            with pytest.raises(kind, match=says):
                async with running(config(tmp_path, **{which: address})):
                    pass
        assert not (tmp_path / "state").exists()

    run(scenario())


def test_serve_ends_when_told_and_streams_with_it(tmp_path: Path):
    async def scenario() -> None:
        ready: asyncio.Future[statedir.CollectorInfo] = asyncio.get_running_loop().create_future()
        stop = asyncio.Event()
        serving = asyncio.create_task(serve(config(tmp_path), on_ready=ready.set_result, stop=stop))
        info = await ready
        async with sidecar(info.grpc, "j") as it:
            await it.send(one_bad_rank())
            stop.set()
            stop.set()
            await asyncio.wait_for(serving, 10)
            with pytest.raises(grpc.aio.AioRpcError):
                await it.until(lambda directive: directive.HasField("acked"))

    run(scenario())


# ---------------------------------------------------------------- reader


def test_a_state_directory_can_be_read_when_nobody_holds_it(tmp_path: Path):
    state_dir = tmp_path / "state"

    async def scenario() -> None:
        with pytest.raises(NoStateError), reader.opened(state_dir):
            pass
        async with running(config(tmp_path)) as info, http(info) as client:
            async with sidecar(info.grpc) as it:
                await it.send(one_bad_rank())
            with pytest.raises(StateDirInUseError), reader.opened(state_dir):
                pass
            said = {
                path: (await client.get(f"/api/v1/{path}")).json()
                for path in ("jobs", "jobs/j", "incidents", "jobs/j/events")
            }
        with reader.opened(state_dir) as left, reader.opened(state_dir) as also:
            read = {
                "jobs": left.jobs(),
                "jobs/j": left.job("j"),
                "incidents": also.incidents(),
                "jobs/j/events": left.events("j"),
            }
            assert {path: _json(document) for path, document in read.items()} == said
            assert left.incident(said["incidents"][0]["id"]) == left.incidents()[0]
            assert left.job("nope") is None
            assert left.incident("nope") is None

    run(scenario())


def _json(document: Any) -> Any:
    if isinstance(document, list):
        return [_json(one) for one in document]
    return document.model_dump(mode="json")
