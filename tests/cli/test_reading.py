"""The commands that read: from a live collector, and from the folder one has left."""

from __future__ import annotations

import json
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from gradwatch.agent.probe import spool
from gradwatch.agent.probe.journal import Journal
from gradwatch.cli.launcher import collector_state
from tests.cli.command import gradwatch, start, until


def write_job(folder) -> None:
    """A job of two ranks, in which rank 1 goes bad in round 3; both have ended."""
    key = spool.new_incarnation()
    for rank in range(2):
        incarnation = spool.new_incarnation()
        journal = Journal(folder, spool.rank_journal_name(rank, incarnation))
        hello = {"incarnation": incarnation, "job": "job", "attempt_key": key, "rank": rank, "world_size": 2}
        journal.append("hello", hello | {"node": f"n{rank}", "pid": 1, "device": "cpu", "framework": "ddp"})
        if rank == 1:
            gradient = {"parameter": "head.weight", "module": "head", "value": "VALUE_NAN", "count": 2}
            bad = {"round": 3, "step": 3, "gradients": [gradient | {"numel": 4, "backward_position": 0}]}
            journal.append("nonfinite", bad | {"gradients_total": 1, "source": "ddp-bucket"})
        progress = {"incarnation": incarnation, "round": 5, "step": 5, "reduced_round": 5}
        journal.progress(progress | {"bad_rounds": rank, "journal_records": journal.records})
        journal.close()


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory):
    """A state folder with one job's incident in it, written by a real collector and sidecar."""
    folder = tmp_path_factory.mktemp("state")
    own = folder / "spool" / "mine"
    own.mkdir(parents=True)
    write_job(own)
    collector = start("collector", "--state-dir", folder, "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0")
    try:
        info = until(lambda: collector_state.ready(folder))
        assert gradwatch("sidecar", "--spool", own, "--state-dir", folder, "--drain").returncode == 0
        live = {
            command: gradwatch(*command.split(), "--json", "--url", info.http).stdout
            for command in ("jobs", "incidents", "events job")
        }
    finally:
        collector.terminate()
        collector.communicate(timeout=30)
    (folder / "live.json").write_text(json.dumps(live))
    return folder


@pytest.mark.parametrize("command", ["jobs", "incidents", "events job"])
def test_a_folder_answers_as_its_collector_did(state_dir, command):
    live = json.loads((state_dir / "live.json").read_text())
    left = gradwatch(*command.split(), "--json", "--state-dir", state_dir)
    assert left.returncode == 0
    assert left.stdout == live[command]
    assert left.stdout.strip()


def test_incidents_are_listed(state_dir):
    result = gradwatch("incidents", "--state-dir", state_dir)
    (row,) = result.stdout.splitlines()[1:]
    assert {"job", "1", "n1", "head.weight"} <= set(row.split())
    assert (
        gradwatch("incidents", "--job", "other", "--state-dir", state_dir).stdout
        == "no incidents of job other\n"
    )


def test_an_incident_is_told_as_a_person_would(state_dir):
    (incident,) = gradwatch("incidents", "--json", "--state-dir", state_dir).json
    result = gradwatch("incident", incident["id"], "--state-dir", state_dir)
    for sentence in incident["verdict"]:
        assert sentence in result.stdout
    assert "head.weight" in result.stdout.splitlines()[-1]
    assert gradwatch("incident", incident["id"], "--json", "--state-dir", state_dir).json == incident


def test_jobs_and_events_are_listed(state_dir):
    assert "2 of 2" in gradwatch("jobs", "--state-dir", state_dir).stdout
    events = gradwatch("events", "job", "--state-dir", state_dir).stdout
    assert "parameter=head.weight value=nan" in events
    rows = events.splitlines()[1:]
    # Beside the three records, the log says how far each rank had come.
    assert len(rows) == 3 + 2
    assert sum(" progress " in row for row in rows) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["incident", "nonsense"], 1, "nonsense"),
        (["events", "nonsense"], 1, "nonsense"),
        (["audit", "nonsense"], 1, "nonsense"),
        (["incidents", "--url", "nonsense"], 2, "is not a URL"),
        (["incidents", "--url", "http://127.0.0.1:1"], 1, "no collector answers at http://127.0.0.1:1"),
        (["incident"], 2, "ID"),
    ],
)
def test_errors_say_what_and_where(state_dir, arguments, code, said):
    result = gradwatch(*arguments, "--state-dir", state_dir)
    assert result.returncode == code
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_a_folder_without_state_says_so(tmp_path):
    result = gradwatch("jobs", "--state-dir", tmp_path)
    assert result.returncode == 1
    assert str(tmp_path) in result.stderr


def test_something_else_on_that_port_says_so():
    class Page(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, *_):
            return

    with HTTPServer(("127.0.0.1", 0), Page) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        result = gradwatch("jobs", "--url", f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
        thread.join()
    assert result.returncode == 1
    assert "is that a gradwatch collector?" in result.stderr


def test_a_second_collector_on_the_same_folder_is_refused(tmp_path):
    first = start("collector", "--state-dir", tmp_path, "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0")
    until(lambda: collector_state.ready(tmp_path))
    second = gradwatch("collector", "--state-dir", tmp_path)
    first.terminate()
    first.communicate(timeout=30)
    assert second.returncode == 2
    assert "in use" in second.stderr


# ---------------------------------------------------------------- doctor, help


def test_a_healthy_doctor(tmp_path):
    result = gradwatch("doctor", "--state-dir", tmp_path)
    assert result.returncode == 0, result.stdout
    report = gradwatch("doctor", "--json", "--state-dir", tmp_path).json
    assert report["ok"]
    assert {check["name"] for check in report["checks"]} == {
        "python", "torch", "entry point", "autoload", "spool", "ports", "collector",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "env", "name"),
    [
        ([], {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}, "autoload"),
        (["--url", "http://127.0.0.1:1"], {}, "collector"),
        (["--state-dir", "/proc/nowhere"], {}, "spool"),
    ],
)
def test_a_doctor_that_finds_something(tmp_path, arguments, env, name):
    result = gradwatch("doctor", "--json", "--state-dir", tmp_path, *arguments, **env)
    assert result.returncode == 1
    assert [check["name"] for check in result.json["checks"] if not check["ok"]] == [name]


def test_help_is_quick_because_it_imports_nothing_heavy():
    heavy = ("torch", "grpc", "fastapi", "httpx")
    code = f"import sys, gradwatch.cli.main; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    "command",
    ["run", "collector", "sidecar", "incidents", "incident", "events", "jobs", "doctor", "demo"],
)
def test_every_flag_names_its_variable(command):
    from typer.main import get_command

    from gradwatch.cli.main import app

    for parameter in get_command(app).commands[command].params:
        if parameter.param_type_name == "option" and parameter.name != "help":
            assert str(parameter.envvar).startswith("GRADWATCH_"), parameter.name
