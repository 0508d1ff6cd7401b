"""Certificates and identities that are renewed under a collector that runs."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import pytest

from gradwatch.collector.access.admission import digest
from gradwatch.collector.access.config import Access
from gradwatch.collector.access.door import Door
from gradwatch.collector.app import running
from gradwatch.protos.v1 import gradwatch_pb2 as pb
from gradwatch.protos.v1 import gradwatch_pb2_grpc as rpc
from tests import certificates
from tests.certificates import TOKEN
from tests.collector.client import PATIENCE, Sidecar, one_bad_rank
from tests.collector.running import config, run

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from gradwatch.collector.statedir import CollectorInfo

METRIC = "gradwatch_access_last_reload_successful"
AGENT = "gw_the-token-of-an-agent-in-the-tests"
ENTRY = f"- {{name: node-a, role: agent, jobs: [a-*], token_sha256: {digest(AGENT).hex()}}}"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> certificates.Files:
    return certificates.make(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def access(files, tmp_path) -> Access:
    """Files of its own, with all that can be renewed."""
    given = {"cert": files.cert, "key": files.key, "client_ca": files.ca, "http_client_ca": files.ca}
    for name, source in given.items():
        put(tmp_path / name, source.read_bytes())
    put(tmp_path / "identities", f"identities:\n{ENTRY}\n".encode())
    return Access(**{name: tmp_path / name for name in (*given, "identities")}, token=TOKEN)


def put(path: Path, content: bytes) -> None:
    """In one step, as those who renew certificates do."""
    scratch = path.with_suffix(".new")
    scratch.write_bytes(content)
    scratch.replace(path)


async def until(condition: Callable[[], Any]) -> None:
    """Wait for what an awaitable gives, within a time that no machine needs."""
    deadline = asyncio.get_running_loop().time() + 30
    while not await condition():
        assert asyncio.get_running_loop().time() < deadline, "it did not come true"
        await asyncio.sleep(0.05)


async def shown(address: str) -> str:
    """The certificate that a new connection is shown."""
    host, _, port = address.removeprefix("https://").rpartition(":")
    return await asyncio.to_thread(ssl.get_server_certificate, (host, int(port)))


@contextlib.asynccontextmanager
async def reader(
    info: CollectorInfo, files: certificates.Files, pair: str
) -> AsyncIterator[httpx.AsyncClient]:
    context = ssl.create_default_context(cafile=files.ca)
    context.load_verify_locations(files.other_ca)
    context.load_cert_chain(getattr(files, f"{pair}_cert"), getattr(files, f"{pair}_key"))
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with httpx.AsyncClient(
        base_url=info.http, verify=context, trust_env=False, headers=headers, timeout=PATIENCE
    ) as client:
        yield client


@contextlib.asynccontextmanager
async def stream(
    info: CollectorInfo, files: certificates.Files, token: str = TOKEN, pair: str = "client"
) -> AsyncIterator[Sidecar]:
    paths = (files.ca, getattr(files, f"{pair}_key"), getattr(files, f"{pair}_cert"))
    secure = grpc.ssl_channel_credentials(*(path.read_bytes() for path in paths))
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.secure_channel(info.grpc, secure, options=options) as channel:
        call = rpc.IngestStub(channel).Stream(metadata=[("authorization", f"Bearer {token}")], timeout=60)
        it = Sidecar(call)
        await it.greet()
        yield it
        call.cancel()


async def metric(client: httpx.AsyncClient) -> float:
    text = (await client.get("/metrics")).text
    return float(next(line for line in text.splitlines() if line.startswith(METRIC)).split()[1])


def test_a_renewed_certificate_is_shown_to_new_connections_and_old_ones_go_on(
    tmp_path, files, access, caplog
):
    async def scenario() -> None:
        async with running(config(tmp_path, access=access)) as info:
            async with reader(info, files, "client") as client, stream(info, files) as sidecar:
                assert await metric(client) == 1
                assert await shown(info.grpc) == await shown(info.http) == files.cert.read_text()

                # A certificate without its key is of no use: what was before stays in force, and is said.
                put(access.cert, files.renewed_cert.read_bytes())

                async def noticed() -> bool:
                    return await metric(client) == 0

                await until(noticed)
                assert await shown(info.grpc) == await shown(info.http) == files.cert.read_text()

                put(access.key, files.renewed_key.read_bytes())

                async def renewed() -> bool:
                    new = files.renewed_cert.read_text()
                    return await shown(info.grpc) == await shown(info.http) == new

                await until(renewed)
                assert await metric(client) == 1
                await sidecar.send(one_bad_rank("a-1"))
            async with reader(info, files, "client") as client, stream(info, files) as sidecar:
                await sidecar.send(one_bad_rank("a-2"))
                assert len((await client.get("/api/v1/jobs")).json()) == 2

    with caplog.at_level("INFO", "gradwatch.collector.access"):
        run(scenario())
    said = [record.getMessage() for record in caplog.records if "certificates" in record.getMessage()]
    assert len(said) == 2
    assert "do not load, and those before stay in force: --tls-cert" in said[0]
    assert "have changed" in said[1]


def test_a_ca_that_is_replaced_lets_nobody_in_any_more(tmp_path, files, access):
    async def scenario() -> None:
        async with running(config(tmp_path, access=access)) as info:
            for path in (access.client_ca, access.http_client_ca):
                put(path, files.other_ca.read_bytes())

            async def replaced() -> bool:
                async with reader(info, files, "other") as client:
                    with contextlib.suppress(httpx.TransportError):
                        return (await client.get("/-/ready")).status_code == 200
                return False

            await until(replaced)
            async with reader(info, files, "client") as client:
                with pytest.raises(httpx.TransportError):
                    await client.get("/-/ready")
            async with stream(info, files, pair="other") as sidecar:
                await sidecar.send(one_bad_rank("a-1"))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async with stream(info, files):
                    pass
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE

    run(scenario())


def test_an_identity_that_is_taken_back_is_refused_on_the_stream_that_stands(tmp_path, files, access, caplog):
    async def scenario() -> None:
        async with (
            running(config(tmp_path, access=access)) as info,
            reader(info, files, "client") as client,
            stream(info, files, AGENT) as sidecar,
        ):
            await sidecar.send(one_bad_rank("a-1"))

            # What cannot be read changes nothing, and neither does a file that is gone.
            put(access.identities, f"identities: {TOKEN}".encode())

            async def noticed() -> bool:
                return await metric(client) == 0

            await until(noticed)
            access.identities.unlink()
            await sidecar.send(one_bad_rank("a-1"))

            put(access.identities, ENTRY.replace("a-*", "b-*").join(["identities:\n", "\n"]).encode())

            async def bound_to_others() -> bool:
                return await metric(client) == 1

            await until(bound_to_others)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await sidecar.send(pb.Report(batches=one_bad_rank("a-1").batches))
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED

            async with stream(info, files, AGENT) as again:
                put(access.identities, b"identities: []")

                async def refused() -> bool:
                    try:
                        await again.send(pb.Report())
                    except grpc.aio.AioRpcError as error:
                        return error.code() is grpc.StatusCode.UNAUTHENTICATED
                    return False

                await until(refused)

    with caplog.at_level("INFO", "gradwatch.collector.access"):
        run(scenario())
    assert "the identities do not load" in caplog.text
    assert not [token for token in (TOKEN, AGENT) if token in caplog.text]


def test_identities_that_nobody_can_prove_are_said(tmp_path, files, caplog):
    path = tmp_path / "identities.yaml"
    path.write_text("identities: [{name: node0, role: agent, certificate: node0}]")
    for ca, said in ((None, True), (files.ca, False)):
        caplog.clear()
        Door(Access(files.cert, files.key, http_client_ca=ca, identities=path))
        assert ("nobody is asked for one" in caplog.text) == said
