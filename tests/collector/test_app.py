"""The collector as a process: addresses, signals, its state folder, and what a reader finds there."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from gradwatch.collector import reader, statedir
from gradwatch.collector.app import running, serve
from gradwatch.collector.errors import (
    BindError,
    NoStateError,
    NotLoopbackError,
    PortTakenError,
    StateDirError,
    StateDirInUseError,
)
from tests.collector.client import (
    one_bad_rank,
    sidecar,
)
from tests.collector.running import config, http, run

if TYPE_CHECKING:
    from pathlib import Path


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
                "id": (state_dir / "collector.id").read_text().strip(),
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
