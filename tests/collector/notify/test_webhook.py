"""A collector tells a real receiver of each incident once, across refusals and its own restart."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import pytest
from standardwebhooks import Webhook as Verifier

from gradwatch.collector.app import running
from gradwatch.collector.notify.webhook import Webhook
from tests.collector.client import one_bad_rank, sidecar
from tests.collector.notify.receiver import Receiver, receiver
from tests.collector.notify.test_message import HANDED_OUT, SECRET
from tests.collector.running import config, http, run

if TYPE_CHECKING:
    from pathlib import Path


async def heard(it: Receiver, count: int) -> None:
    """Wait until so many messages came in."""
    while len(it.got) < count:
        it.event.clear()
        if len(it.got) < count:
            await asyncio.to_thread(it.event.wait, 30)


async def counted(client, outcome: str, count: int) -> None:
    """Wait until the metric says so."""
    line = f'gradwatch_notifications_total{{outcome="{outcome}"}} {count}.0'
    while line not in (await client.get("/metrics")).text:  # noqa: ASYNC110 - it is asked over HTTP
        await asyncio.sleep(0.05)


def test_a_receiver_that_is_away_is_tried_again_and_told_once(tmp_path: Path, caplog):
    caplog.set_level(logging.INFO, logger="gradwatch")

    async def scenario() -> None:
        with receiver(503, 429) as it:
            hook = Webhook(it.url, SECRET)
            async with running(config(tmp_path, webhook=hook)) as info, http(info) as client:
                async with sidecar(info.grpc) as rank:
                    await rank.send(one_bad_rank("a"))
                await heard(it, 3)
                await counted(client, "sent", 1)
                async with sidecar(info.grpc) as rank:
                    await rank.send(one_bad_rank("b"))
                await heard(it, 4)
                await counted(client, "sent", 2)
            # The next collector on the same state knows of whom it was told.
            async with running(config(tmp_path, webhook=hook)) as info, http(info) as client:
                async with sidecar(info.grpc) as rank:
                    await rank.send(one_bad_rank("c"))
                await heard(it, 5)
                await counted(client, "sent", 1)
            ids = [headers["webhook-id"] for headers, _ in it.got]
            assert len(set(ids[:3])) == 1
            assert len(set(ids)) == 3
            for headers, content in (it.got[0], it.got[-1]):
                assert Verifier(HANDED_OUT).verify(content, headers)["data"]["id"] == headers["webhook-id"]
            jobs = [
                Verifier(HANDED_OUT).verify(content, headers)["data"]["job"] for headers, content in it.got
            ]
            assert jobs == ["a", "a", "a", "b", "c"]

    run(scenario())
    assert "is tried again: it answers 503" in caplog.text
    assert "hook-secret-path" not in caplog.text


def test_a_receiver_that_refuses_is_not_asked_again(tmp_path: Path, caplog):
    async def scenario() -> None:
        with receiver(410) as it:
            async with (
                running(config(tmp_path, webhook=Webhook(it.url, SECRET))) as info,
                http(info) as client,
            ):
                async with sidecar(info.grpc) as rank:
                    await rank.send(one_bad_rank("a"))
                await counted(client, "refused", 1)
                # The next incident is told of all the same.
                async with sidecar(info.grpc) as rank:
                    await rank.send(one_bad_rank("b"))
                await counted(client, "sent", 1)
            assert len(it.got) == 2

    run(scenario())
    assert "was not told of incident" in caplog.text
    assert "410" in caplog.text


def test_nobody_listens_and_nothing_else_waits_for_that(tmp_path: Path):
    async def scenario() -> None:
        with receiver() as it:
            url = it.url
        async with running(config(tmp_path, webhook=Webhook(url, SECRET))) as info, http(info) as client:
            async with sidecar(info.grpc) as rank:
                await rank.send(one_bad_rank("a"))
            assert len((await client.get("/api/v1/incidents")).json()) == 1
            assert (await client.get("/-/ready")).is_success

    run(scenario())


@pytest.mark.parametrize(
    "text", [repr(Webhook("https://h/T0K3N", SECRET)), str(Webhook("https://h/T0K3N", SECRET))]
)
def test_a_webhook_shows_no_secret(text):
    assert "T0K3N" not in text
    assert "\\x" not in text
