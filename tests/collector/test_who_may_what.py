"""Who may do what: one table, over real TLS, against a collector in a process of its own."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import pytest
from grpc._cython.cygrpc import SSLSessionCacheLRU

from gradwatch.cli.launcher import collector_state
from gradwatch.collector.access.admission import digest
from gradwatch.collector.access.http_gate import MAX_BODY_BYTES, MAX_HEADER_BYTES
from gradwatch.collector.service import MAX_REPORT_BYTES
from gradwatch.protos.v1 import gradwatch_pb2 as pb
from gradwatch.protos.v1 import gradwatch_pb2_grpc as rpc
from tests import certificates
from tests.certificates import TOKEN
from tests.cli.command import gradwatch, start, until
from tests.cli.obeying import Launcher
from tests.collector.client import batch, launch_started, nonfinite, one_bad_rank
from tests.sidecar.test_sidecar_checkpoints import case
from tests.sidecar.test_sidecar_process import stop

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from gradwatch.collector.statedir import CollectorInfo

# One for each identity that is known by a token.
TOKENS = {name: f"gw_the-token-of-{name}-in-the-tests" for name in ("node-a", "anna", "vera", "olga")}
IDENTITIES = f"""
identities:
  - {{name: node-a, role: agent, jobs: ["a-*"], token_sha256: {digest(TOKENS["node-a"]).hex()}}}
  - {{name: anna, role: viewer, jobs: ["a-*"], token_sha256: {digest(TOKENS["anna"]).hex()}}}
  - {{name: vera, role: viewer, token_sha256: {digest(TOKENS["vera"]).hex()}}}
  - {{name: olga, role: operator, jobs: ["a-*", c], token_sha256: {digest(TOKENS["olga"]).hex()}}}
  - {{name: trainer, role: agent, jobs: a-1, certificate: trainer.example}}
  - {{name: wallboard, role: viewer, jobs: a-1, certificate: wallboard}}
"""
POLICY = "{apiVersion: gradwatch/v1, mode: enforce, checkpoints: {root: /ckpts}}"
ORDER = {"X-Gradwatch-Operator": "mallory"}

# Whose certificate is shown, and what stands in the header.
WHO: dict[str, tuple[str | None, str | None]] = {
    "no certificate": (None, f"Bearer {TOKEN}"),
    "wrong CA": ("other", f"Bearer {TOKEN}"),
    "expired": ("expired", f"Bearer {TOKEN}"),
    "no token": ("client", None),
    "unknown token": ("client", "Bearer gw_a-token-that-nobody-has-given"),
    "the shared token": ("client", f"Bearer {TOKEN}"),
    **{name: ("client", f"Bearer {token}") for name, token in TOKENS.items()},
    "trainer": ("trainer", None),
    "wallboard": ("wallboard", None),
    "wallboard with anna's token": ("wallboard", f"Bearer {TOKENS['anna']}"),
    "wallboard with the shared token": ("wallboard", f"Bearer {TOKEN}"),
    "wallboard with an unknown token": ("wallboard", "Bearer gw_a-token-that-nobody-has-given"),
    "olga by Basic": ("client", httpx.BasicAuth("olga", TOKENS["olga"])._auth_header),
}


@dataclass
class Served:
    """The collector, and all that it has answered."""

    info: CollectorInfo
    files: certificates.Files
    state_dir: Path
    heard: list[str] = field(default_factory=list)

    def answer(self, who: str, method: str, path: str, **more: Any) -> httpx.Response | None:
        """An answer over HTTPS; None when TLS lets nobody through."""
        shown, authorization = WHO[who]
        context = ssl.create_default_context(cafile=self.files.ca)
        if shown is not None:
            context.load_cert_chain(*self._pair(shown))
        headers = {} if authorization is None else {"Authorization": authorization}
        headers |= more.pop("headers", {})
        with httpx.Client(verify=context, trust_env=False, headers=headers, timeout=30) as client:
            try:
                answer = client.request(method, self.info.http + path, **more)
            except (httpx.NetworkError, httpx.ProtocolError):
                return None
        self.heard += [answer.text, str(answer.headers)]
        return answer

    def asks(self, who: str, method: str, path: str, **more: Any) -> str:
        """How a question ends, in a word."""
        answer = self.answer(who, method, path, **more)
        return "no TLS" if answer is None else str(answer.status_code)

    def orders(self, who: str, job: str) -> str:
        """How an order ends: a rollback that is under way already would have been ordered too."""
        ended = self.asks(
            who, "POST", f"/api/v1/jobs/{job}/rollback", json={"to": "last-good"}, headers=ORDER
        )
        return "ordered" if ended in {"202", "409"} else ended

    def reports(self, who: str, *reports: pb.Report, sessions: object = None) -> str:
        """How reports on one stream end."""
        shown, authorization = WHO[who]
        cert, key = (None, None) if shown is None else (path.read_bytes() for path in self._pair(shown))
        secure = grpc.ssl_channel_credentials(self.files.ca.read_bytes(), key, cert)
        metadata = () if authorization is None else (("authorization", authorization),)
        for number, report in enumerate(reports):
            report.id = number + 1
        options: list[tuple[str, Any]] = [("grpc.use_local_subchannel_pool", 1)]
        if sessions is not None:
            options += [("grpc.ssl_session_cache", sessions), ("grpc.ssl_target_name_override", "localhost")]
        with grpc.secure_channel(self.info.grpc, secure, options=options) as channel:
            try:
                answers = rpc.IngestStub(channel).Stream(iter(reports), metadata=metadata, timeout=30)
                acked = [answer.acked for answer in answers if answer.HasField("acked")]
            except grpc.RpcError as error:
                self.heard.append(f"{error.details()} {error.debug_error_string()}")
                code: str = error.code().name
                return "no TLS" if code == "UNAVAILABLE" else code
        assert acked == [report.id for report in reports]
        return "taken"

    def _pair(self, name: str) -> tuple[Path, Path]:
        return getattr(self.files, f"{name}_cert"), getattr(self.files, f"{name}_key")


def recoverable(job: str) -> pb.Report:
    """A launch that obeys, and one good checkpoint."""
    started = launch_started(job)
    started.launch_started.policy_hash = "h"
    root = pb.CheckpointRoot(job=job, node="n0", root="/ckpts", launch="l")
    found = pb.CheckpointScanned(
        path="/ckpts/5.pt",
        layout="torch",
        completeness=pb.COMPLETENESS_COMPLETE,
        finite=True,
        steps=[pb.CheckpointStep(source="checkpoint", step=5), pb.CheckpointStep(source="name", step=5)],
        modified_at=1.0,
    )
    looked = [pb.Record(seq=0, checkpoint_root=root), pb.Record(seq=1, checkpoint_scanned=found)]
    return pb.Report(batches=[batch(f"{job}-l", started), batch(f"{job}-s", *looked)])


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    files = certificates.make(folder)
    (folder / "identities.yaml").write_text(IDENTITIES)
    (folder / "policy.yaml").write_text(POLICY)
    state_dir = folder / "state"
    process = start(
        "collector", "--state-dir", state_dir, "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0",
        "--tls-cert", files.cert, "--tls-key", files.key, "--tls-ca", files.ca, "--http-tls-ca", files.ca,
        "--token-file", files.token, "--identities", folder / "identities.yaml",
        "--policy", folder / "policy.yaml",
    )  # fmt: skip
    try:
        info = until(lambda: process.poll() is not None or collector_state.ready(state_dir))
        assert info is not True, process.communicate()
        it = Served(info, files, state_dir)
        for job in ("a-1", "b-1"):
            assert it.reports("the shared token", one_bad_rank(job), recoverable(job)) == "taken"
        yield it
    finally:
        process.terminate()
        _, log = process.communicate(timeout=30)
    assert "incident" in log
    assert not [token for token in (TOKEN, *TOKENS.values()) if token in log]


MINE, THEIRS = one_bad_rank("a-1"), one_bad_rank("b-1")
# A line of a journal says nothing of its job: that is known from the journal's first.
IN_THEIR_JOURNAL = pb.Report(batches=[batch("b-1-0", nonfinite(2, 6))])
THEIR_PROGRESS = pb.Report(progress=[pb.Progress(incarnation="b-1-1", round=9)])
CLAIMED = pb.Report(batches=[batch("a-1-0", pb.Record(seq=9, launch_started=pb.LaunchStarted(job="b-1")))])
ASKS_OF_MINE = pb.Report(sidecar=pb.Sidecar(id="s", node="n", jobs=["a-1"], launches=["l"]))
ASKS_OF_THEIRS = pb.Report(sidecar=pb.Sidecar(id="s", node="n", jobs=["a-1", "b-1"], launches=["l"]))
TOO_LARGE = pb.Report(batches=[batch("x", pb.Record(fault=pb.Fault(error="x" * MAX_REPORT_BYTES)))])


@pytest.mark.parametrize(
    ("who", "reports", "ends"),
    [
        # Whom TLS does not know, and whom nothing else makes known.
        ("no certificate", [MINE], "no TLS"),
        ("wrong CA", [MINE], "no TLS"),
        ("expired", [MINE], "no TLS"),
        ("no token", [MINE], "UNAUTHENTICATED"),
        ("unknown token", [MINE], "UNAUTHENTICATED"),
        # Only agents report.
        ("anna", [MINE], "PERMISSION_DENIED"),
        ("olga", [MINE], "PERMISSION_DENIED"),
        ("wallboard", [MINE], "PERMISSION_DENIED"),
        ("the shared token", [MINE, THEIRS, ASKS_OF_THEIRS], "taken"),
        # And of their own jobs only, by token as by certificate.
        ("node-a", [ASKS_OF_MINE, MINE], "taken"),
        ("trainer", [ASKS_OF_MINE, MINE], "taken"),
        ("node-a", [THEIRS], "PERMISSION_DENIED"),
        ("trainer", [one_bad_rank("a-2")], "PERMISSION_DENIED"),
        ("node-a", [MINE, THEIRS], "PERMISSION_DENIED"),
        ("node-a", [IN_THEIR_JOURNAL], "PERMISSION_DENIED"),
        ("node-a", [THEIR_PROGRESS], "PERMISSION_DENIED"),
        ("node-a", [ASKS_OF_THEIRS], "PERMISSION_DENIED"),
        ("wallboard with anna's token", [MINE], "UNAUTHENTICATED"),
        ("olga by Basic", [MINE], "UNAUTHENTICATED"),
        ("node-a", [TOO_LARGE], "RESOURCE_EXHAUSTED"),
    ],
)
def test_who_may_report_what(served, who, reports, ends):
    assert served.reports(who, *reports) == ends


@pytest.mark.parametrize(
    ("who", "path", "ends"),
    [
        ("no certificate", "/api/v1/jobs", "no TLS"),
        ("wrong CA", "/api/v1/jobs", "no TLS"),
        ("expired", "/api/v1/jobs", "no TLS"),
        # With a certificate of its own, a supervisor needs no token.
        ("no certificate", "/-/healthy", "no TLS"),
        ("no token", "/-/healthy", "200"),
        ("no token", "/-/ready", "200"),
        ("no token", "/api/v1/jobs", "401"),
        ("no token", "/api/v1/me", "401"),
        ("no token", "/", "401"),
        ("no token", "/metrics", "401"),
        ("no token", "/openapi.json", "401"),
        ("no token", "/nowhere", "401"),
        ("unknown token", "/api/v1/jobs", "401"),
        ("wallboard with an unknown token", "/api/v1/jobs", "401"),
        # Agents report, and do not read.
        ("node-a", "/api/v1/me", "200"),
        ("node-a", "/api/v1/jobs", "403"),
        ("node-a", "/api/v1/jobs/a-1", "403"),
        ("node-a", "/", "403"),
        ("trainer", "/metrics", "403"),
        # Viewers and operators read of their jobs; the others might as well not be.
        ("anna", "/api/v1/jobs/a-1", "200"),
        ("anna", "/api/v1/jobs/a-1/events", "200"),
        ("anna", "/api/v1/jobs/a-1/audit", "200"),
        ("anna", "/api/v1/jobs/a-1/picture", "200"),
        ("anna", "/", "200"),
        ("anna", "/api/v1/jobs/b-1", "404"),
        ("anna", "/api/v1/jobs/b-1/events", "404"),
        ("anna", "/api/v1/jobs/b-1/audit", "404"),
        ("anna", "/api/v1/jobs/b-1/picture", "404"),
        ("anna", "/api/v1/jobs/a-1/../b-1", "404"),
        ("anna", "/api/v1/jobs/a-1%2F..%2Fb-1", "404"),
        ("olga", "/api/v1/jobs/b-1", "404"),
        ("olga by Basic", "/api/v1/jobs/a-1", "200"),
        ("wallboard", "/api/v1/jobs/a-1", "200"),
        ("wallboard with the shared token", "/api/v1/jobs/b-1", "200"),
        ("wallboard with anna's token", "/api/v1/jobs/a-1", "401"),
        ("vera", "/api/v1/jobs/b-1", "200"),
        # Metrics tell of all jobs.
        ("anna", "/metrics", "403"),
        ("olga", "/metrics", "403"),
        ("vera", "/metrics", "200"),
        ("the shared token", "/metrics", "200"),
    ],
)
def test_who_may_read_what(served, who, path, ends):
    assert served.asks(who, "GET", path) == ends


@pytest.mark.parametrize(
    ("who", "job", "ends"),
    [
        ("no certificate", "a-1", "no TLS"),
        ("no token", "a-1", "401"),
        ("unknown token", "a-1", "401"),
        ("node-a", "a-1", "403"),
        ("trainer", "a-1", "403"),
        ("anna", "a-1", "403"),
        ("vera", "a-1", "403"),
        ("wallboard", "a-1", "403"),
        # What another site could make a browser send.
        ("olga by Basic", "a-1", "401"),
        ("olga", "b-1", "404"),
        ("olga", "no-such-job", "404"),
        ("olga", "a-1", "ordered"),
        ("the shared token", "b-1", "ordered"),
    ],
)
def test_who_may_order_what(served, who, job, ends):
    assert served.orders(who, job) == ends


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "POST"])
def test_whatever_is_no_question_is_an_order(served, method):
    assert served.asks("anna", method, "/api/v1/jobs/a-1") == "403"
    assert served.asks("olga", method, "/api/v1/jobs/a-1") == "405"


def chunks(size: int) -> Iterator[bytes]:
    yield from (b" " * 1000 for _ in range(size // 1000 + 1))


@pytest.mark.parametrize(
    ("more", "ends"),
    [
        ({"content": b" " * (MAX_BODY_BYTES + 1)}, "413"),
        ({"content": chunks(MAX_BODY_BYTES)}, "413"),
        ({"content": b" " * MAX_BODY_BYTES}, "422"),
    ],
)
def test_what_is_too_large_is_refused(served, more, ends):
    more["headers"] = {"content-type": "application/json", **ORDER, **more.get("headers", {})}
    assert served.asks("olga", "POST", "/api/v1/jobs/a-1/rollback", **more) == ends


def test_headers_without_end_are_not_read_to_their_end(served):
    # It hangs up; whether its answer still gets through is for the network to say.
    endless = {"x": "x" * 16 * MAX_HEADER_BYTES}
    assert served.asks("olga", "GET", "/api/v1/jobs", headers=endless) in {"400", "no TLS"}


def test_nobody_goes_on_with_a_certificate_that_is_not_looked_at_again(served):
    """Whoever resumes a TLS session shows none: it may have expired, or its CA been replaced."""
    sessions = SSLSessionCacheLRU(8)
    assert served.reports("node-a", MINE, sessions=sessions) == "taken"
    assert served.reports("node-a", MINE, sessions=sessions) == "UNAUTHENTICATED"
    assert "connect anew" in served.heard[-1]

    host, _, port = served.info.http.removeprefix("https://").rpartition(":")
    context = ssl.create_default_context(cafile=served.files.ca)
    context.load_cert_chain(served.files.client_cert, served.files.client_key)
    session = None
    for _ in range(2):
        with (
            socket.create_connection((host, int(port)), timeout=30) as plain,
            context.wrap_socket(plain, server_hostname=host, session=session) as it,
        ):
            it.sendall(b"GET /-/ready HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            assert it.recv(12) == b"HTTP/1.1 200"
            assert not it.session_reused
            session = it.session
    # Of TLS 1.2, OpenSSL would keep sessions by itself.
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection((host, int(port)), timeout=30) as plain, pytest.raises(OSError):
        context.wrap_socket(plain, server_hostname=host)


@pytest.mark.parametrize(
    ("who", "me", "jobs"),
    [
        ("the shared token", {"identity": None, "role": "operator", "jobs": ["*"]}, {"a-1", "b-1"}),
        ("anna", {"identity": "anna", "role": "viewer", "jobs": ["a-*"]}, {"a-1"}),
        ("vera", {"identity": "vera", "role": "viewer", "jobs": ["*"]}, {"a-1", "b-1"}),
        ("olga", {"identity": "olga", "role": "operator", "jobs": ["a-*", "c"]}, {"a-1"}),
        ("wallboard", {"identity": "wallboard", "role": "viewer", "jobs": ["a-1"]}, {"a-1"}),
        ("node-a", {"identity": "node-a", "role": "agent", "jobs": ["a-*"]}, None),
    ],
)
def test_everybody_sees_their_own_jobs_and_no_trace_of_others(served, who, me, jobs):
    assert served.answer(who, "GET", "/api/v1/me").json() == me
    if jobs is None:
        return
    assert {job["job"] for job in served.answer(who, "GET", "/api/v1/jobs").json()} == jobs
    incidents = served.answer("vera", "GET", "/api/v1/incidents").json()
    seen = {incident["id"]: incident["job"] for incident in incidents if incident["job"] in jobs}
    assert {one["id"]: one["job"] for one in served.answer(who, "GET", "/api/v1/incidents").json()} == seen
    assert not served.answer(who, "GET", "/api/v1/incidents?job=d").json()
    for incident in incidents:
        status = 200 if incident["id"] in seen else 404
        assert served.answer(who, "GET", f"/api/v1/incidents/{incident['id']}").status_code == status
    if "b-1" not in jobs:
        for path in ("/", "/api/v1/jobs/no-such-job", "/api/v1/incidents/no-such-incident"):
            assert "b-1" not in served.answer(who, "GET", path).text


def test_the_audit_trail_has_the_name_that_was_proved(served):
    assert served.orders("olga", "a-1") == "ordered"
    trail = json.dumps(served.answer("anna", "GET", "/api/v1/jobs/a-1/audit").json())
    assert "olga asked for it" in trail
    assert "mallory" not in trail


def test_refusals_say_who_was_refused_what_and_why(served):
    for who, path, says in (
        ("node-a", "/api/v1/jobs", "identity 'node-a' has the role agent: agents report"),
        ("anna", "/metrics", "identity 'anna' is bound to the jobs a-*, and metrics tell of all jobs"),
        (
            "wallboard with anna's token",
            "/",
            "the token is of identity 'anna' and the certificate of identity 'wallboard'",
        ),
    ):
        assert says in served.answer(who, "GET", path).json()["detail"]
    served.reports("node-a", THEIRS)
    assert "identity 'node-a' may not report for job 'b-1': it is bound to the jobs a-*" in served.heard[-1]
    served.reports("olga", MINE)
    assert "identity 'olga' has the role operator: only agents report" in served.heard[-1]


def test_a_doctor_says_who_one_is(served, tmp_path):
    token = tmp_path / "token"
    token.write_text(TOKENS["node-a"])
    token.chmod(0o600)
    files = served.files
    shown = ("--tls-ca", files.ca, "--tls-cert", files.client_cert, "--tls-key", files.client_key)
    result = gradwatch(
        "doctor", "--state-dir", tmp_path, "--url", served.info.http, *shown, "--token-file", token
    )
    assert result.returncode == 0, result.stdout
    assert "knows you as node-a, agent of a-*" in " ".join(result.stdout.split())
    served.heard.append(result.stdout + result.stderr)


def test_no_token_is_anywhere(served):
    """Not in what was answered above, nor in what is kept; the log is looked at when it ends."""
    assert served.heard
    kept = [
        path.read_bytes().decode(errors="replace") for path in served.state_dir.rglob("*") if path.is_file()
    ]
    for token in (TOKEN, *TOKENS.values()):
        assert not [text for text in (*served.heard, *kept) if token in text]


# ---------------------------------------------------------------- paths
# A collector that somebody else has got hold of, or that believes a false report, names these.

PATHS = {
    "outside the root": "{outside}/5.pt",
    "outside by ..": "{root}/../outside/5.pt",
    "a link to a file": "{root}/link.pt",
    "through a linked folder": "{root}/linked/5.pt",
    "beside the root, with its name": "{root}-of-others/5.pt",
    "the root itself": "{root}",
    "no absolute path": "5.pt",
}


def laid_out(folder: Path) -> dict[str, str]:
    """A root with one good checkpoint, and with ways out of it; what `PATHS` means there."""
    root, outside = folder / "ckpts", folder / "outside"
    for place in (root, outside, folder / "ckpts-of-others"):
        place.mkdir(exist_ok=True)
        (place / "5.pt").write_bytes(b"x")
    (root / "link.pt").symlink_to(outside / "5.pt")
    (root / "linked").symlink_to(outside)
    return {what: path.format(root=root, outside=outside) for what, path in PATHS.items()}


def test_no_sidecar_moves_what_is_not_below_its_root(tmp_path):
    async def scenario() -> None:
        paths = laid_out(tmp_path)
        root = tmp_path / "ckpts"
        before = sorted(tmp_path.rglob("*.pt"))
        async with case(tmp_path, root) as it, it.sidecar() as process:
            for number, (what, path) in enumerate(paths.items()):
                task = pb.Task(id=f"d{number}", job="job", kind=pb.TASK_KIND_QUARANTINE)
                task.paths.extend([str(root / "5.pt"), path])
                assert "below the root" in (await it.ask(task)).error, what
            assert sorted(tmp_path.rglob("*.pt")) == before
            mine = pb.Task(id="mine", job="job", kind=pb.TASK_KIND_QUARANTINE, paths=[str(root / "5.pt")])
            assert not (await it.ask(mine)).error
            await stop(process)
        assert not (root / "5.pt").exists()

    asyncio.run(scenario())


@pytest.mark.parametrize("what", ["outside the root", "outside by ..", "through a linked folder"])
def test_no_launcher_starts_from_what_is_not_below_its_root(tmp_path, what):
    one = Launcher(tmp_path)
    try:
        one.order("START", 0, "d", resume_path=laid_out(tmp_path)[what])
        exit_code, said, _ = one.end()
    finally:
        one.process.kill()
        one.process.wait()
    assert exit_code == 93
    assert "does not lie below checkpoints.root" in said
    assert not one.log.exists()
