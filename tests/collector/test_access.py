"""Who is let in: real servers, real certificates, real clients."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from gradwatch.collector.access.admission import Refused, admit
from gradwatch.collector.access.config import Access
from gradwatch.collector.app import CollectorConfig, running
from gradwatch.collector.errors import AccessError, NotLoopbackError
from gradwatch.protos.v1 import gradwatch_pb2 as pb
from gradwatch.protos.v1 import gradwatch_pb2_grpc as rpc
from tests import certificates
from tests.certificates import TOKEN

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine
    from pathlib import Path

    from gradwatch.collector.statedir import CollectorInfo

ANY = "127.0.0.1:0"
BEARER = {"authorization": f"Bearer {TOKEN}"}
PATIENCE = 60.0


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> certificates.Files:
    return certificates.make(tmp_path_factory.mktemp("certificates"))


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


@contextlib.asynccontextmanager
async def collector(tmp_path: Path, access: Access, **changes: Any) -> AsyncIterator[CollectorInfo]:
    config = {"state_dir": tmp_path / "state", "grpc": ANY, "http": ANY, "access": access, **changes}
    async with running(CollectorConfig(**config)) as info:
        yield info


@contextlib.asynccontextmanager
async def channel(
    info: CollectorInfo, ca: Path | None, cert: Path | None = None, key: Path | None = None
) -> AsyncIterator[grpc.aio.Channel]:
    options = [("grpc.use_local_subchannel_pool", 1)]
    if ca is None:
        made = grpc.aio.insecure_channel(info.grpc, options=options)
    else:
        read = [None if path is None else path.read_bytes() for path in (ca, key, cert)]
        made = grpc.aio.secure_channel(info.grpc, grpc.ssl_channel_credentials(*read), options=options)
    async with made as it:
        yield it


async def report(channel: grpc.aio.Channel, authorization: str | None = None) -> pb.Directive:
    """The first answer to a report."""
    metadata = () if authorization is None else (("authorization", authorization),)
    while True:
        call = rpc.IngestStub(channel).Stream(metadata=metadata, timeout=PATIENCE)
        try:
            # Refused, it may break on the way out or on the way back.
            with contextlib.suppress(asyncio.InvalidStateError):
                await call.write(pb.Report(id=1, sidecar=pb.Sidecar(id="s", node="n")))
            answer = await call.read()
        except grpc.aio.AioRpcError as error:
            # What grpc itself says of a message that met a stream which had just been refused.
            if "execute_batch" not in str(error.debug_error_string()):
                raise
        else:
            call.cancel()
            return answer


async def refusal(work: Coroutine[Any, Any, Any]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await work
    return caught.value


# ---------------------------------------------------------------- the token


def test_grpc_wants_the_token_and_health_does_not(tmp_path, files):
    async def scenario() -> None:
        async with collector(tmp_path, Access(token=TOKEN)) as info, channel(info, None) as it:
            assert (await report(it, f"Bearer {TOKEN}")).HasField("welcome")
            for shown, says in (
                (None, "none was shown"),
                ("Bearer not-the-token-at-all", "another token"),
                (f"Bearer {TOKEN}x", "another token"),
                ("Bearer ", "another token"),
                (f"Digest {TOKEN}", "none was shown"),
            ):
                error = await refusal(report(it, shown))
                assert error.code() is grpc.StatusCode.UNAUTHENTICATED
                assert says in str(error.details())
                assert "--token-file" in str(error.details())
                assert TOKEN not in str(error.details())
            health = health_pb2_grpc.HealthStub(it)
            answer = await health.Check(health_pb2.HealthCheckRequest(service=""))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            for shown, code in (((), grpc.StatusCode.UNAUTHENTICATED), (tuple(BEARER.items()), None)):
                call = reflection_pb2_grpc.ServerReflectionStub(it).ServerReflectionInfo(metadata=shown)
                asked = asyncio.gather(
                    call.write(reflection_pb2.ServerReflectionRequest(list_services="")), call.read()
                )
                if code is None:
                    (await asked)[1].list_services_response.service[0]
                    call.cancel()
                else:
                    assert (await refusal(asked)).code() is code

    run(scenario())


def test_http_wants_the_token_and_probes_do_not(tmp_path):
    async def scenario() -> None:
        async with (
            collector(tmp_path, Access(token=TOKEN)) as info,
            httpx.AsyncClient(base_url=info.http, trust_env=False) as client,
        ):
            for path in ("/-/healthy", "/-/ready"):
                assert (await client.get(path)).status_code == 200
            for path in (
                "/", "/metrics", "/openapi.json", "/api/v1/jobs", "/api/v1/incidents", "/nothing",
                "/-/healthy/", "/-/ready/../../metrics", "//-/healthy",
            ):  # fmt: skip
                refused = await client.get(path)
                assert refused.status_code == 401, path
                assert "--token-file" in refused.json()["detail"]
                assert refused.headers.get_list("www-authenticate")[0].startswith("Basic realm=")
                wrong = await client.get(path, headers={"authorization": "Bearer not-the-token-at-all"})
                assert wrong.status_code == 401
            for path in ("/", "/metrics", "/openapi.json", "/api/v1/jobs", "/api/v1/incidents"):
                assert (await client.get(path, headers=BEARER)).status_code == 200
                # As a browser does, and Prometheus can.
                assert (await client.get(path, auth=("anybody", TOKEN))).status_code == 200
                assert (await client.get(path, auth=(TOKEN, "not-the-token"))).status_code == 401
            # What another site could make a browser send is not taken for an order.
            assert (await client.post("/api/v1/jobs", auth=("anybody", TOKEN))).status_code == 401
            assert (await client.post("/api/v1/jobs", headers=BEARER)).status_code == 405
            assert (await client.post("/api/v1/jobs")).status_code == 401

    run(scenario())


@pytest.mark.parametrize(
    ("authorization", "let_in"),
    [
        (f"Bearer {TOKEN}", True),
        (f"bearer {TOKEN}", True),
        (f"Bearer  {TOKEN} ", True),
        (f"Basic {TOKEN}", False),
        ("Basic", False),
        ("Basic /w==", False),
        (TOKEN, False),
        ("Bearer", False),
        ("Bearer ähnlich", False),
        (f"Bearer {TOKEN[:-1]}", False),
        ("", False),
        (None, False),
    ],
)
def test_what_counts_as_the_token(authorization, let_in):
    found = admit(authorization, (), Access(token=TOKEN).known(), basic=True)
    assert (not isinstance(found, Refused)) == let_in
    assert TOKEN not in repr(found)


def test_the_token_is_in_no_repr_and_not_in_the_state_folder(tmp_path):
    async def scenario() -> None:
        access = Access(token=TOKEN)
        assert TOKEN not in repr(CollectorConfig(access=access))
        async with collector(tmp_path, access):
            for path in (tmp_path / "state").iterdir():
                assert TOKEN.encode() not in path.read_bytes(), path

    run(scenario())


# ---------------------------------------------------------------- TLS


def test_tls_on_both_and_only_for_those_who_trust_the_ca(tmp_path, files):
    async def scenario() -> None:
        async with collector(tmp_path, Access(files.cert, files.key)) as info:
            assert info.http.startswith("https://127.0.0.1:")
            assert info.grpc_tls
            assert json.loads((tmp_path / "state" / "collector.json").read_text())["grpc_tls"] is True
            async with channel(info, files.ca) as it:
                assert (await report(it)).HasField("welcome")
            for stranger in (files.other_ca, None):
                async with channel(info, stranger) as it:
                    assert (await refusal(report(it))).code() is grpc.StatusCode.UNAVAILABLE
            trusting = ssl.create_default_context(cafile=files.ca)
            async with httpx.AsyncClient(verify=trusting, trust_env=False) as client:
                assert (await client.get(info.http + "/-/ready")).status_code == 200
                with pytest.raises(httpx.HTTPError):
                    await client.get(info.http.replace("https", "http") + "/-/ready")
            suspicious = ssl.create_default_context(cafile=files.other_ca)
            async with httpx.AsyncClient(verify=suspicious, trust_env=False) as client:
                with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                    await client.get(info.http + "/-/ready")

    run(scenario())


def test_the_certificate_must_name_the_host(tmp_path, files):
    async def scenario() -> None:
        async with (
            collector(tmp_path, Access(files.elsewhere_cert, files.elsewhere_key)) as info,
            channel(info, files.ca) as it,
        ):
            assert (await refusal(report(it))).code() is grpc.StatusCode.UNAVAILABLE

    run(scenario())


def test_mutual_tls_lets_only_signed_sidecars_in_and_leaves_http_alone(tmp_path, files):
    async def scenario() -> None:
        async with collector(tmp_path, Access(files.cert, files.key, client_ca=files.ca)) as info:
            async with channel(info, files.ca, files.client_cert, files.client_key) as it:
                assert (await report(it)).HasField("welcome")
            for pair in ((), (files.other_cert, files.other_key)):
                async with channel(info, files.ca, *pair) as it:
                    assert (await refusal(report(it))).code() is grpc.StatusCode.UNAVAILABLE
            trusting = ssl.create_default_context(cafile=files.ca)
            async with httpx.AsyncClient(verify=trusting, trust_env=False) as client:
                assert (await client.get(info.http + "/metrics")).status_code == 200

    run(scenario())


def test_nothing_older_than_tls_12(files):
    made = Access(files.cert, files.key).certificates()
    assert made is not None
    assert made.http.minimum_version is ssl.TLSVersion.TLSv1_2


def test_default_addresses_stay_plain_for_this_machine(tmp_path, files, monkeypatch):
    monkeypatch.setattr("gradwatch.collector.app.DEFAULT_GRPC", ANY)

    async def scenario() -> None:
        async with collector(tmp_path, Access(files.cert, files.key, token=TOKEN), grpc=None) as info:
            assert not info.grpc_tls
            assert info.http.startswith("https://")
            async with channel(info, None) as it:
                assert (await report(it, f"Bearer {TOKEN}")).HasField("welcome")

    run(scenario())


# ---------------------------------------------------------------- addresses


@pytest.mark.parametrize("which", ["grpc", "http"])
@pytest.mark.parametrize(
    ("given", "lacking"),
    [
        ({}, "--tls-cert, --tls-key, --token-file or --identities"),
        ({"token": TOKEN}, "--tls-cert, --tls-key"),
        ({"cert", "key"}, "--token-file or --identities"),
        ({"cert", "token"}, "--tls-key"),
    ],
)
def test_others_are_served_only_with_tls_and_token(tmp_path, files, which, given, lacking):
    have = {"cert": files.cert, "key": files.key, "token": TOKEN}
    access = Access(**{name: have[name] for name in given})

    async def scenario() -> None:
        with pytest.raises(NotLoopbackError, match=f"TLS and a token. Give {lacking} too, or a loopback"):
            async with collector(tmp_path, access, **{which: "0.0.0.0:0"}):
                pass
        assert not (tmp_path / "state").exists()

    run(scenario())


@pytest.mark.parametrize("wildcard", ["0.0.0.0", "[::]"])
def test_everywhere_means_loopback_for_those_on_this_machine(tmp_path, files, wildcard):
    if wildcard == "[::]" and not has_ipv6():
        pytest.skip("this machine has no IPv6")

    async def scenario() -> None:
        access = Access(files.cert, files.key, token=TOKEN)
        async with collector(tmp_path, access, grpc=f"{wildcard}:0", http=f"{wildcard}:0") as info:
            host = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}[wildcard]
            assert info.grpc.rpartition(":")[0] == host
            assert info.http.rpartition(":")[0] == f"https://{host}"
            async with channel(info, files.ca) as it:
                assert (await report(it, f"Bearer {TOKEN}")).HasField("welcome")
                assert (await refusal(report(it))).code() is grpc.StatusCode.UNAUTHENTICATED
            trusting = ssl.create_default_context(cafile=files.ca)
            async with httpx.AsyncClient(verify=trusting, trust_env=False) as client:
                assert (await client.get(info.http + "/metrics", headers=BEARER)).status_code == 200

    run(scenario())


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as it:
            it.bind(("::1", 0))
    except OSError:
        return False
    return True


# ---------------------------------------------------------------- files


def locked(files: certificates.Files, tmp_path: Path) -> Path:
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(files.key.read_bytes(), None)
    path = tmp_path / "locked.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    return path


def nonsense(_files: certificates.Files, tmp_path: Path) -> Path:
    path = tmp_path / "nonsense.pem"
    path.write_bytes(b"\xff nonsense")
    return path


def absent(_files: certificates.Files, tmp_path: Path) -> Path:
    return tmp_path / "absent.pem"


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"cert": nonsense}, "nonsense.pem.*in PEM form"),
        ({"key": nonsense}, "nonsense.pem.*in PEM form"),
        ({"client_ca": nonsense}, "nonsense.pem is no certificate"),
        ({"cert": absent}, "--tls-cert: cannot read .*absent.pem: No such file"),
        ({"key": absent}, "--tls-key: cannot read .*absent.pem: No such file"),
        ({"client_ca": absent}, "--tls-ca: cannot read .*absent.pem: No such file"),
        ({"key": lambda files, _: files.other_key}, "cert.pem with .*other_key.pem.*its own private key"),
        ({"key": locked}, "passphrase"),
        ({"cert": None}, "give --tls-cert too"),
        ({"key": None}, "give --tls-key too"),
        ({"cert": None, "key": None, "client_ca": lambda files, _: files.ca}, "--tls-cert and --tls-key"),
    ],
)
def test_files_of_no_use_are_named_before_anything_starts(tmp_path, files, changed, says):
    good: dict[str, Any] = {"cert": files.cert, "key": files.key, "token": TOKEN}
    for name, make in changed.items():
        good[name] = None if make is None else make(files, tmp_path)

    async def scenario() -> None:
        with pytest.raises(AccessError, match=says):
            async with collector(tmp_path, Access(**good)):
                pass
        assert not (tmp_path / "state").exists()

    run(scenario())
