"""The stream to the collector: one report at a time, until it is acknowledged."""

from __future__ import annotations

import asyncio

import pytest

from gradwatch.agent.sidecar import client as client_module
from gradwatch.agent.sidecar.client import Client, CollectorUnavailableError
from gradwatch.protos.v1 import gradwatch_pb2 as pb
from tests.sidecar.ingest import serving, until


def hello() -> pb.Sidecar:
    return pb.Sidecar(id="me", node="here", jobs=["job"])


def report(round_: int = 1) -> pb.Report:
    return pb.Report(progress=[pb.Progress(incarnation="a", round=round_)])


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr(client_module, "_FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(client_module, "_LONGEST_WAIT_SECONDS", 0.05)


def test_a_report_is_delivered_and_the_status_comes_back():
    statuses = []

    async def scenario():
        async with serving() as ingest:

            def take(directive: pb.Directive) -> None:
                if directive.HasField("status"):
                    statuses.append(directive.status)

            client = Client(lambda: ingest.address, hello, take)
            await client.deliver(report())
            assert client.connected
            await until(lambda: statuses)
            await client.close()
            assert [one.id for one in ingest.hellos] == ["me"]
            assert ingest.progress("a")[0].round == 1
            assert [one.id for one in ingest.reports] == [1, 2]

    asyncio.run(scenario())
    assert statuses[0].job == "job"


def test_an_unacknowledged_report_is_sent_again_on_a_new_stream():
    async def scenario():
        async with serving() as ingest:
            ingest.refusals = 3
            client = Client(lambda: ingest.address, hello, lambda _: None)
            await client.deliver(report())
            await client.close()
            assert len(ingest.progress("a")) == 4
            assert ingest.streams == 4

    asyncio.run(scenario())


def test_a_silent_collector_is_left_after_a_while(monkeypatch):
    monkeypatch.setattr(client_module, "ACK_SECONDS", 0.2)

    async def scenario():
        async with serving() as ingest:
            ingest.silent = True
            client = Client(lambda: ingest.address, hello, lambda _: None)
            delivery = asyncio.create_task(client.deliver(report()))
            await until(lambda: ingest.streams >= 2)
            ingest.silent = False
            await delivery
            await client.close()

    asyncio.run(scenario())


def test_it_waits_for_a_collector_that_is_not_there_yet_and_finds_one_that_has_moved():
    async def scenario():
        addresses = [CollectorUnavailableError("none yet")]

        def address() -> str:
            if isinstance(addresses[0], Exception):
                raise addresses[0]
            return addresses[0]

        client = Client(address, hello, lambda _: None)
        delivery = asyncio.create_task(client.deliver(report(1)))
        await asyncio.sleep(0)
        async with serving() as first:
            addresses[0] = first.address
            await delivery
        async with serving() as second:
            addresses[0] = second.address
            await client.deliver(report(2))
            await client.close()
        assert [one.round for one in first.progress("a")] == [1]
        assert [one.round for one in second.progress("a")] == [2]

    asyncio.run(scenario())


def test_giving_up_is_left_to_the_caller():
    def nowhere() -> str:
        raise CollectorUnavailableError("nowhere")

    async def scenario():
        client = Client(nowhere, hello, lambda _: None)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(client.deliver(report()), 0.3)
        await client.close()

    asyncio.run(scenario())
