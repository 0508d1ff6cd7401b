"""Identities from the command line: tokens are made, a collector knows them, and each may do its own."""

from __future__ import annotations

import hashlib
import json
import ssl
from typing import TYPE_CHECKING

import httpx
import pytest

from gradwatch.cli.launcher import collector_state
from gradwatch.collector.access.identities_file import read_identities
from gradwatch.collector.access.identity import Identity, Role
from tests import certificates
from tests.certificates import TOKEN
from tests.cli.command import finish, gradwatch, start, until
from tests.cli.test_access import WAIT, collector

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> certificates.Files:
    return certificates.make(tmp_path_factory.mktemp("certificates"))


def new_token(file: Path, name: str, role: str, *jobs: str) -> Path:
    """A token for somebody, as a file beside the identities."""
    only = [word for job in jobs for word in ("--jobs", job)]
    made = gradwatch("token", "new", "--name", name, "--role", role, *only, "--file", file)
    assert made.returncode == 0, made.stderr
    path = file.parent / f"{name}.token"
    path.write_text(made.stdout)
    path.chmod(0o600)
    return path


@pytest.fixture(scope="module")
def served(files, tmp_path_factory):
    """A collector for all the world that knows nobody but by name; its address, and the tokens by name."""
    folder = tmp_path_factory.mktemp("served")
    identities = folder / "identities.yaml"
    tokens = {
        name: new_token(identities, name, role, *jobs)
        for name, role, jobs in (
            ("node", "agent", ["mine", "llm-*"]),
            ("anna", "viewer", ["mine"]),
            ("vera", "viewer", []),
        )
    }
    server = ("--tls-cert", files.cert, "--tls-key", files.key, "--identities", identities)
    with collector(folder / "state", *server) as info:
        yield info, tokens


def jobs_of(served, files, name: str) -> set[str]:
    info, tokens = served
    result = gradwatch(
        "jobs", "--json", "--url", info.http, "--tls-ca", files.ca, "--token-file", tokens[name]
    )
    assert result.returncode == 0, result.stderr
    return {job["job"] for job in result.json}


# ---------------------------------------------------------------- token new


def test_tokens_are_added_to_the_file_and_only_their_hashes(tmp_path):
    file = tmp_path / "identities.yaml"
    anna = new_token(file, "anna", "viewer", "llm-*", "gpt").read_text().strip()
    olga = new_token(file, "olga", "operator").read_text().strip()
    assert anna != olga
    assert all(len(token) == len("gw_") + 43 for token in (anna, olga))
    assert read_identities(file.read_bytes(), "f")[0] == {
        hashlib.sha256(anna.encode()).digest(): Identity("anna", Role.VIEWER, ("llm-*", "gpt")),
        hashlib.sha256(olga.encode()).digest(): Identity("olga", Role.OPERATOR, ("*",)),
    }
    assert file.stat().st_mode & 0o777 == 0o600
    assert anna not in file.read_text()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_without_a_file_the_entry_is_printed_beside_the_token():
    made = gradwatch("token", "new", "--name", "anna", "--role", "viewer", "--jobs", "a: [x]")
    (token,) = made.stdout.splitlines()
    known, _ = read_identities(f"identities:\n{made.stderr}".encode(), "f")
    assert known == {hashlib.sha256(token.encode()).digest(): Identity("anna", Role.VIEWER, ("a: [x]",))}
    assert token not in made.stderr


@pytest.mark.parametrize(
    ("content", "name", "says"),
    [
        ("identities:\n  - {name: anna, role: viewer, certificate: a}\n", "anna", "anna is there twice"),
        ('{"identities": []}\n', "anna", "cannot be added at the end of"),
        ("identities: [\n", "anna", "this is not YAML"),
        ("# nobody yet\n", "an na", "may hold letters"),
        ("\udcff", "anna", "cannot read"),
    ],
)
def test_a_file_that_would_not_be_good_stays_as_it_is(tmp_path, content, name, says):
    file = tmp_path / "identities.yaml"
    file.write_bytes(content.encode(errors="surrogateescape"))
    made = gradwatch("token", "new", "--name", name, "--role", "viewer", "--file", file)
    assert made.returncode == 2
    assert says in made.stderr
    assert not made.stdout
    assert file.read_bytes() == content.encode(errors="surrogateescape")


def test_an_indented_file_with_comments_is_added_to(tmp_path):
    file = tmp_path / "identities.yaml"
    before = "# ours\nidentities:\n    # the boss\n    - name: b\n      role: agent\n      certificate: b"
    file.write_text(before)
    file.chmod(0o640)
    new_token(file, "anna", "viewer")
    by_digest, by_certificate = read_identities(file.read_bytes(), "f")
    assert len(by_digest) == len(by_certificate) == 1
    assert file.read_text().startswith(f"{before}\n    - name: anna\n      role: viewer\n")
    assert file.stat().st_mode & 0o777 == 0o640


# ---------------------------------------------------------------- reporting, reading, ordering


def test_a_run_of_a_job_of_ones_own_is_reported_and_read_by_those_who_may(tmp_path, served, files):
    info, tokens = served
    result = gradwatch(
        "run", "--state-dir", tmp_path, "--job", "llm-7b", "--collector", info.grpc, "--tls-ca", files.ca,
        "--token-file", tokens["node"], "--", "true",
    )  # fmt: skip
    assert "not shipped" not in result.stderr
    assert "llm-7b" in jobs_of(served, files, "vera")
    assert "llm-7b" not in jobs_of(served, files, "anna")


def test_a_run_of_anothers_job_says_so_and_goes_on(tmp_path, served, files):
    info, tokens = served
    process = start(
        "run", "--state-dir", tmp_path, "--job", "theirs", "--collector", info.grpc, "--drain-timeout", "0",
        "--tls-ca", files.ca, "--token-file", tokens["node"], "--report", tmp_path / "report.json",
        "--", *WAIT,
    )  # fmt: skip
    assert any(
        "nothing is reported: the collector refuses this sidecar: identity 'node' may not report for job "
        "'theirs': it is bound to the jobs mine, llm-*" in line
        for line in process.stderr
    )
    process.terminate()
    finish(process)
    assert len(json.loads((tmp_path / "report.json").read_text())["warnings"]) >= 1
    assert "theirs" not in jobs_of(served, files, "vera")


def left_behind(state_dir: Path, job: str) -> Path:
    """The spool of a run that has ended, whose journal names its job."""
    folder = state_dir / "spool" / job
    folder.mkdir(parents=True)
    body = {"job": job, "launch": "l", "node": "n"}
    lines = (
        json.dumps({"seq": 0, "at": 1.0, "launch_started": body}),
        json.dumps({"seq": 1, "at": 2.0, "launch_ended": body | {"exit_code": 0, "ended_by": "command"}}),
    )
    name = f"launch-{hashlib.md5(job.encode(), usedforsecurity=False).hexdigest()}.000000.jsonl"
    (folder / name).write_text("".join(f"{line}\n" for line in lines))
    return folder


def test_what_a_run_of_anothers_job_left_behind_holds_nobody_up(tmp_path, served, files):
    info, tokens = served
    foreign, late = left_behind(tmp_path, "foreign"), left_behind(tmp_path, "llm-late")
    own = left_behind(tmp_path, "mine")
    process = start(
        "sidecar", "--spool", own, "--state-dir", tmp_path, "--collector", info.grpc, "--job", "mine",
        "--tls-ca", files.ca, "--token-file", tokens["node"],
    )  # fmt: skip
    until(lambda: not late.exists())
    until(lambda: "mine" in jobs_of(served, files, "anna"))
    process.terminate()
    log = finish(process).stderr
    assert log.count("leaving alone what an earlier run left in") == 1
    assert "identity 'node' may not report for job 'foreign'" in log
    assert list(foreign.glob("*.jsonl"))
    assert {"mine", "llm-late"} <= jobs_of(served, files, "vera")


def test_a_viewer_does_not_order(served, files):
    info, tokens = served
    refused = gradwatch(
        "rollback", "mine", "--to", "last-good", "--url", info.http, "--tls-ca", files.ca,
        "--token-file", tokens["anna"],
    )  # fmt: skip
    assert refused.returncode == 1
    assert "403 identity 'anna' has the role viewer: only operators order" in refused.stderr


# ---------------------------------------------------------------- run


def test_a_run_lets_others_look_by_their_own_tokens(tmp_path, files):
    identities = tmp_path / "identities.yaml"
    anna = new_token(identities, "anna", "viewer", "own").read_text().strip()
    process = start(
        "run", "--state-dir", tmp_path / "state", "--job", "own", "--http", "0.0.0.0:0",
        "--tls-cert", files.cert, "--tls-key", files.key, "--token-file", files.token,
        "--identities", identities, "--", *WAIT,
    )  # fmt: skip
    try:
        info = until(lambda: collector_state.ready(tmp_path / "state"))

        trusting = ssl.create_default_context(cafile=files.ca)

        def seen() -> list[str]:
            shown = {"Authorization": f"Bearer {anna}"}
            answer = httpx.get(f"{info.http}/api/v1/jobs", headers=shown, verify=trusting, trust_env=False)
            return [job["job"] for job in answer.json()]

        assert until(seen) == ["own"]
    finally:
        process.terminate()
        result = finish(process)
    assert TOKEN not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--identities", "{file}"], "--identities wants --token-file too"),
        (["--identities", "{file}", "--token-file", "{token}"], "identities.yaml:1: "),
        (["--identities", "/absent", "--token-file", "{token}"], "--identities: cannot read /absent"),
    ],
)
def test_a_run_with_a_file_of_no_use_does_not_start(tmp_path, files, arguments, says):
    file = tmp_path / "identities.yaml"
    file.write_text("identities: nobody")
    given = [word.format(file=file, token=files.token) for word in arguments]
    result = gradwatch("run", "--state-dir", tmp_path / "s", *given, "--", "touch", tmp_path / "started")
    assert result.returncode == 2
    assert says in result.stderr
    assert not (tmp_path / "started").exists()
