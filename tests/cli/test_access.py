"""TLS and the token from the command line: collector, sidecar, run, and the commands that read."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import ssl
import subprocess
import sys
from pathlib import Path

import grpc
import httpx
import psutil
import pytest

from gradwatch.agent.sidecar.access import Credentials
from gradwatch.agent.sidecar.client import Client
from gradwatch.cli.launcher import collector_state
from gradwatch.protos.v1 import gradwatch_pb2 as pb
from tests import certificates
from tests.certificates import TOKEN
from tests.cli.command import child_of, finish, gradwatch, start, until
from tests.sidecar.ingest import Ingest, serving

WAIT = [sys.executable, "-c", "import time; time.sleep(600)"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> certificates.Files:
    return certificates.make(tmp_path_factory.mktemp("certificates"))


@contextlib.contextmanager
def collector(state_dir, *arguments: object):
    """A collector of its own process, for all the world; the address of each of its servers."""
    process = start(
        "collector", "--state-dir", state_dir, "--grpc", "0.0.0.0:0", "--http", "0.0.0.0:0", *arguments
    )
    try:
        info = until(lambda: process.poll() is not None or collector_state.ready(state_dir))
        assert info is not True, process.communicate()
        yield info
    finally:
        process.terminate()
        _, stderr = process.communicate(timeout=30)
        assert TOKEN not in stderr


@pytest.fixture(scope="module")
def served(files, tmp_path_factory):
    """A collector that wants everything: token, and certificates of sidecars."""
    server = ("--tls-cert", files.cert, "--tls-key", files.key, "--token-file", files.token)
    state_dir = tmp_path_factory.mktemp("served")
    with collector(state_dir, *server, "--tls-ca", files.ca) as info:
        yield info


@pytest.fixture
def client(files) -> dict[str, object]:
    """The flags of a client that is let in."""
    return {
        "--tls-ca": files.ca,
        "--token-file": files.token,
        "--tls-cert": files.client_cert,
        "--tls-key": files.client_key,
    }


def flags(given: dict[str, object], *without: str, **changed: object) -> list[object]:
    kept = {name: value for name, value in given.items() if name not in without}
    kept |= {f"--{name.replace('_', '-')}": value for name, value in changed.items()}
    return [word for pair in kept.items() for word in pair]


def jobs(served, *arguments: object):
    return gradwatch("jobs", "--json", "--url", served.http, *arguments)


def job_names(served, files) -> set[str]:
    result = jobs(served, "--tls-ca", files.ca, "--token-file", files.token)
    assert result.returncode == 0, result.stderr
    return {job["job"] for job in result.json}


# ---------------------------------------------------------------- run


def test_a_run_reports_over_tls_with_the_token_and_keeps_it_to_itself(tmp_path, served, files, client):
    """Its command and its processes' arguments know nothing of the token, nor does any file it leaves."""
    process = start(
        "run", "--state-dir", tmp_path, "--job", "far", "--collector", served.grpc,
        *flags(client, "--token-file", "--tls-key"), "--", *WAIT,
        GRADWATCH_TOKEN_FILE=str(files.token), GRADWATCH_TLS_KEY=str(files.client_key),
    )  # fmt: skip
    try:
        until(lambda: "far" in job_names(served, files))
        sidecar = child_of(process.pid, "sidecar")
        assert sidecar is not None
        assert TOKEN not in " ".join(sidecar.cmdline())
        assert TOKEN not in "".join(sidecar.environ().values())
        (command,) = [child for child in psutil.Process(process.pid).children() if child != sidecar]
        assert "GRADWATCH_SPOOL" in command.environ()
        assert not {name for name in command.environ() if "TOKEN" in name or "_TLS_" in name}
        assert list(tmp_path.rglob("sidecar.log"))
        for path in tmp_path.rglob("*"):
            assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
    finally:
        process.terminate()
        result = finish(process)
    assert "not shipped" not in result.stderr
    assert TOKEN not in result.stderr


@pytest.mark.parametrize(
    ("without", "changed", "says"),
    [
        ([], {"token_file": "other_token"}, "refuses this sidecar: this collector wants another token"),
        (["--token-file"], {}, "refuses this sidecar: this collector wants a token, and none was shown"),
        ([], {"tls_ca": "other_ca"}, "TLS with the collector failed: "),
        (["--tls-cert", "--tls-key"], {}, "TLS with the collector failed: .*(--tls-cert, --tls-key)"),
        (["--tls-ca", "--tls-cert", "--tls-key"], {}, "TLS with the collector failed: .*may want TLS"),
    ],
)
def test_a_run_that_is_not_let_in_says_so_and_goes_on(
    tmp_path, served, files, client, without, changed, says
):
    given = flags(client, *without, **{name: getattr(files, value) for name, value in changed.items()})
    marker = tmp_path / "go on"
    waits = (
        f"import os, time\nwhile not os.path.exists({str(marker)!r}): time.sleep(0.05)\nraise SystemExit(3)"
    )
    process = start(
        "run", "--state-dir", tmp_path, "--job", "stranger", "--collector", served.grpc,
        "--drain-timeout", "0", "--report", tmp_path / "report.json", *given,
        "--", sys.executable, "-c", waits,
    )  # fmt: skip
    assert any(
        re.search(f"gradwatch: WARNING: nothing is reported: .*{says}", line) for line in process.stderr
    )
    marker.touch()
    result = finish(process)
    assert result.returncode == 3
    assert "stranger" not in job_names(served, files)
    warnings = json.loads((tmp_path / "report.json").read_text())["warnings"]
    assert sum(bool(re.search(says, warning)) for warning in warnings) == 1


def test_a_sidecar_that_is_refused_again_and_again_says_so_once(caplog):
    class Refusing(Ingest):
        async def Stream(self, request_iterator, context):  # noqa: N802
            self.streams += 1
            if self.streams <= 6:
                await context.abort(grpc.StatusCode.UNAUTHENTICATED, "give a token")
            await super().Stream(request_iterator, context)

    async def scenario() -> None:
        shown = Credentials(token=TOKEN)
        async with serving(Refusing) as ingest:
            client = Client(lambda: ingest.address, lambda: pb.Sidecar(id="s"), lambda _: None, lambda: shown)
            await asyncio.wait_for(client.connect(), 60)
            await client.close()

    asyncio.run(scenario())
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said == ["the collector refuses this sidecar: give a token; trying again until it answers"]
    assert TOKEN not in caplog.text


def test_a_run_whose_own_collector_serves_others(tmp_path, files):
    """Its sidecar needs no CA: the gRPC side stays on this machine."""
    process = start(
        "run", "--state-dir", tmp_path, "--job", "own", "--http", "0.0.0.0:0", "--tls-cert", files.cert,
        "--tls-key", files.key, "--token-file", files.token, "--", *WAIT,
    )  # fmt: skip
    try:
        info = until(lambda: collector_state.ready(tmp_path))
        assert info.http.startswith("https://127.0.0.1:")
        until(lambda: "own" in job_names(info, files))
        refused = gradwatch("jobs", "--state-dir", tmp_path, "--tls-ca", files.ca)
        assert refused.returncode == 1
        assert "wants a token" in refused.stderr
        let_in = gradwatch("jobs", "--state-dir", tmp_path, "--tls-ca", files.ca, "--token-file", files.token)
        assert "own" in let_in.stdout
    finally:
        process.terminate()
        result = finish(process)
    assert "--http is not used" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--http", "0.0.0.0:0"], "needs TLS and a token. Give --tls-cert, --tls-key and --token-file"),
        (["--http", "0.0.0.0:0", "--token-file", "{token}"], "needs TLS and a token"),
        (["--collector", "far.example:7700", "--token-file", "{token}"], "in the clear: give --tls-ca"),
        (
            ["--collector", "127.0.0.1:7700", "--tls-cert", "{cert}", "--tls-key", "{key}"],
            "wants --tls-ca too",
        ),
        (["--tls-cert", "{cert}"], "give --tls-key too"),
        (["--tls-cert", "{cert}", "--tls-key", "{other_key}"], "its own private key"),
        (["--tls-ca", "{token}"], "holds no certificate in PEM form"),
        (["--tls-ca", "/absent.pem"], "--tls-ca: cannot read /absent.pem: No such file"),
        (["--token-file", "/absent"], "--token-file: cannot read /absent: No such file"),
        (["--token-file", "{short}"], "one token of 16 printable ASCII characters"),
        (["--token-file", "{two}"], "without blanks"),
        (["--token-file", "{umlaut}"], "printable ASCII"),
        (["--token-file", "{empty}"], "openssl rand -hex 32"),
    ],
)
def test_wrong_use_is_refused_before_the_command_starts(tmp_path, files, arguments, says):
    for name, text in (
        ("short", "x" * 15),
        ("two", "0123456789 abcdefghij"),
        ("umlaut", "ä" * 20),
        ("empty", ""),
    ):
        (tmp_path / name).write_text(text)

    def path(match: re.Match[str]) -> str:
        name = match[1]
        return str(tmp_path / name if (tmp_path / name).exists() else getattr(files, name))

    arguments = [re.sub(r"\{(\w+)\}", path, word) for word in arguments]
    result = gradwatch("run", "--state-dir", tmp_path / "s", *arguments, "--", "touch", tmp_path / "started")
    assert result.returncode == 2
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "started").exists()


# ---------------------------------------------------------------- sidecar, collector


def test_a_sidecar_that_finds_its_collector_speaks_as_that_does(tmp_path, files):
    own = tmp_path / "spool" / "mine"
    own.mkdir(parents=True)
    server = ("--tls-cert", files.cert, "--tls-key", files.key, "--token-file", files.token)
    ship = ("sidecar", "--spool", own, "--state-dir", tmp_path, "--drain", "--drain-timeout")
    (own / "launch-00000000000000000000000000000000.000000.jsonl").write_text("{}\n")
    with collector(tmp_path, *server):
        let_in = gradwatch(*ship, 60, "--tls-ca", files.ca, "--token-file", files.token)
        assert let_in.returncode == 0, let_in.stderr
        (own / "launch-11111111111111111111111111111111.000000.jsonl").write_text("{}\n")
        without = gradwatch(*ship, 1, "--token-file", files.token)
        assert without.returncode == 1
        assert "TLS with the collector failed: it wants --tls-ca" in without.stderr


def test_renewed_files_are_taken_up_at_the_next_connect(tmp_path, files):
    """A token that the collector does not know, put right while the sidecar tries."""
    own = tmp_path / "spool" / "mine"
    own.mkdir(parents=True)
    (own / "launch-00000000000000000000000000000000.000000.jsonl").write_text("{}\n")
    token = tmp_path / "token"
    token.write_bytes(files.other_token.read_bytes())
    token.chmod(0o600)
    server = ("--tls-cert", files.cert, "--tls-key", files.key, "--token-file", files.token)
    with collector(tmp_path, *server) as info:
        process = start(
            "sidecar", "--spool", own, "--state-dir", tmp_path, "--drain", "--drain-timeout", 60,
            "--collector", info.grpc, "--tls-ca", files.ca, "--token-file", token,
        )  # fmt: skip
        assert any("the collector refuses this sidecar" in line for line in process.stderr)
        new = tmp_path / "new"
        new.write_bytes(files.token.read_bytes())
        new.replace(token)
        result = finish(process)
    assert result.returncode == 0
    assert "connected to the collector" in result.stderr


def test_a_token_that_others_can_read_is_a_warning(tmp_path, files):
    token = tmp_path / "token"
    token.write_text(TOKEN)
    for mode, warned in ((0o644, True), (0o640, True), (0o600, False), (0o400, False)):
        token.chmod(mode)
        result = gradwatch("jobs", "--url", "http://127.0.0.1:1", "--token-file", token)
        assert ("chmod 600" in result.stderr) == warned


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--grpc", "0.0.0.0:0"], "Give --tls-cert, --tls-key, --token-file or --identities too"),
        (["--tls-cert", "/absent.pem", "--tls-key", "/absent.pem"], "--tls-cert: cannot read /absent.pem"),
        (["--token-file", os.devnull], "--token-file: /dev/null must hold one token"),
    ],
)
def test_a_collector_that_cannot_be_safe_does_not_start(tmp_path, arguments, says):
    result = gradwatch("collector", "--state-dir", tmp_path, *arguments)
    assert result.returncode == 2
    assert says in result.stderr
    assert "Traceback" not in result.stderr


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("command", ["jobs", "incidents", "doctor"])
def test_reading_over_tls(served, files, tmp_path, command):
    ask = (command, "--json", "--state-dir", tmp_path)
    by_flag = gradwatch(*ask, "--url", served.http, "--tls-ca", files.ca, "--token-file", files.token)
    assert by_flag.returncode == 0, by_flag.stdout + by_flag.stderr
    by_environment = gradwatch(
        *ask,
        GRADWATCH_URL=served.http,
        GRADWATCH_TLS_CA=str(files.ca),
        GRADWATCH_TOKEN_FILE=str(files.token),
    )
    assert by_environment.returncode == 0
    assert gradwatch(*ask, "--url", served.http, "--tls-ca", files.ca).returncode == 1


def test_reading_that_is_refused_says_what_to_give(served, files):
    for arguments, says in (
        (["--tls-ca", files.ca], "401 this collector wants a token, and none was shown: give --token-file"),
        (["--tls-ca", files.ca, "--token-file", files.other_token], "wants another token"),
        (
            ["--tls-ca", files.other_ca, "--token-file", files.token],
            "Give --tls-ca with the CA that signed it",
        ),
        (["--token-file", files.token], "Give --tls-ca with the CA that signed it"),
    ):
        refused = jobs(served, *arguments)
        assert refused.returncode == 1
        assert says in refused.stderr
        assert "Traceback" not in refused.stderr
    for command in (["incident", "x"], ["events", "x"]):
        unknown = gradwatch(*command, "--url", served.http, "--tls-ca", files.ca, "--token-file", files.token)
        assert "no " in unknown.stderr
        assert "'x'" in unknown.stderr


def test_a_token_is_not_sent_to_others_by_http(files):
    result = gradwatch("jobs", "--url", "http://far.example:7701", "--token-file", files.token)
    assert result.returncode == 2
    assert "in the clear: give an https:// URL" in result.stderr


def test_a_token_in_a_url_is_not_taken_and_not_repeated():
    for command in ("jobs", "doctor"):
        result = gradwatch(command, "--url", f"https://me:{TOKEN}@far.example:7701")
        assert result.returncode != 0
        assert "no password; give --token-file" in result.stdout + result.stderr
        assert TOKEN not in result.stdout + result.stderr


# ---------------------------------------------------------------- the documentation


def test_the_certificates_of_the_documentation_are_good(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "security.md").read_text()
    (commands,) = [block for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) if "openssl" in block]
    made = subprocess.run(
        ["bash", "-eu"], input=commands, cwd=tmp_path, text=True, capture_output=True, check=False
    )
    assert made.returncode == 0, made.stderr
    node0, node1, ca = tmp_path / "node0", tmp_path / "node1", tmp_path / "ca.pem"
    server = ("--tls-cert", f"{node0}.pem", "--tls-key", f"{node0}.key", "--token-file", tmp_path / "token")
    client = ("--tls-ca", ca, "--tls-cert", f"{node1}.pem", "--tls-key", f"{node1}.key")
    (identities,) = re.findall(r"```yaml\n(identities:\n[^`]*certificate: node1}\n)```", text)
    (tmp_path / "identities.yaml").write_text(identities)
    server = (*server, "--tls-ca", ca, "--identities", tmp_path / "identities.yaml")
    with collector(tmp_path / "state", *server) as info:
        run = ("run", "--collector", info.grpc, *client)
        by_name = gradwatch(*run, "--state-dir", tmp_path / "by-name", "--", "true")
        result = gradwatch(
            *run, "--state-dir", tmp_path / "run", "--token-file", tmp_path / "token", "--", "true"
        )
        strict = ssl.create_default_context(cafile=ca)
        strict.verify_flags |= ssl.VERIFY_X509_STRICT
        assert httpx.get(info.http + "/-/ready", verify=strict, trust_env=False).status_code == 200
    assert "not shipped" not in by_name.stderr + result.stderr
    assert "nothing is reported" not in by_name.stderr
    assert "chmod" not in result.stderr
