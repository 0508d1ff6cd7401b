"""What a sidecar reports over a stream, and what it is told: real gRPC, real HTTP, a real store."""

from __future__ import annotations

import asyncio
import sqlite3
from typing import TYPE_CHECKING

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from gradwatch.collector import statedir
from gradwatch.collector.app import running
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
from tests.collector.running import config, http, run

if TYPE_CHECKING:
    from pathlib import Path


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


def test_who_asks_again_has_the_jobs_last_word_before_the_acknowledgement(tmp_path: Path):
    async def scenario() -> None:
        async with running(config(tmp_path)) as info, sidecar(info.grpc, "j") as it:
            await it.send(pb.Report(batches=[batch("l", launch_started())]))
            report = one_bad_rank()
            report.batches.append(batch("l", launch_ended(exit_code=3)))
            await it.send(report)
            await it.greet("j")
            # `greet` read no further than the acknowledgement.
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
