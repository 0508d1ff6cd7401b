"""What the chart's documentation promises of a Pod, with real processes and no Kubernetes."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
import torch

from tests.cli.command import gradwatch, start, until
from tests.helm.pods import Pod, bring, make_image
from tests.ranks import REPOSITORY
from tests.recovery import Gate, Place, embedded, write_policy

if TYPE_CHECKING:
    from pathlib import Path

LAUNCHER = REPOSITORY / "docker" / "launcher.txt"
# Of whatever the launcher was brought, nothing may be in a training process.
STRANGERS = ("click", "google", "grpc", "platformdirs", "psutil", "pydantic", "rich", "typer", "yaml")

TRAINING = f"""
import atexit, os, sys
from pathlib import Path
def tell():
    found = [name for name in {STRANGERS!r} if name in sys.modules]
    seen = [path for path in sys.path if path.endswith("launcher")]
    Path(os.environ["SEEN"], str(os.getpid())).write_text(repr(found + seen))
atexit.register(tell)
from tests.training.resumable import main
main()
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    return make_image(tmp_path_factory.mktemp("image") / "python")


@pytest.fixture(scope="module")
def brought(tmp_path_factory):
    return bring(tmp_path_factory.mktemp("brought"))


@pytest.fixture
def collector(tmp_path):
    place = Place(tmp_path / "job")
    policy = write_policy(tmp_path / "policy.yaml", place.checkpoints)
    state = tmp_path / "collector"
    addresses = ["--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0"]
    process = start("collector", "--state-dir", state, *addresses, "--policy", policy)
    try:
        url = until(embedded(state))
        yield place, policy, state, url
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.mark.e2e
def test_a_pod_ends_with_75_and_the_one_after_it_goes_on_from_the_last_good_checkpoint(
    tmp_path, image, brought, collector
):
    place, policy, state, url = collector
    grpc = json.loads((state / "collector.json").read_bytes())["grpc"]
    seen = tmp_path / "seen"
    seen.mkdir()
    (tmp_path / "train.py").write_text(TRAINING.replace('os.environ["SEEN"]', repr(str(seen))))
    results, reports = [], []
    for number in (1, 2):
        pod = Pod(tmp_path / f"pod{number}", image, brought, node="node-a")
        pod.start_sidecar("--collector", grpc, "--checkpoints-root", place.checkpoints)
        report = pod.folder / "report.json"
        command = [
            *("python3", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2),
            *(tmp_path / "train.py", *place.arguments("--began", place.began, "--resume", "{resume}")),
            *("--bad-rank", 1, "--bad-step", 14),
        ]
        flags = ["--job", "pods", "--policy", policy, "--on-rollback", "exit", "--report", report]
        try:
            with Gate("pods", place.gate, lambda: url):
                results.append(pod.run(*flags, "--", *command))
        finally:
            drained = pod.end()
        reports.append(json.loads(report.read_text()))
        assert drained == 0, (pod.folder / "sidecar.log").read_text()
        assert not list((pod.folder / "state" / "spool").iterdir()), "all is shipped, and cleared away"
    first, second = results
    assert first.returncode == 75, first.stderr
    assert reports[0]["ended_by"] == "rollback_due"
    assert "watching 2 of 2 ranks" in first.stderr
    (incident,) = reports[0]["incidents"]
    assert (incident["first"]["rank"], incident["first"]["step"]) == (1, 14)
    assert incident["first"]["node"] == "node-a"
    assert second.returncode == 0, second.stderr
    assert [step for _, step in place.beginnings] == [0, 10]
    assert all(weight.isfinite().all() for weight in torch.load(place.weights).values())
    told = [path.read_text() for path in seen.iterdir()]
    # Those that the launcher stops take no leave.
    assert len(told) >= 2
    assert set(told) == {"[]"}


def test_a_run_that_no_sidecar_serves_goes_on_and_one_that_comes_later_ships_it(
    tmp_path, image, brought, collector
):
    _, _, state, _ = collector
    pod = Pod(tmp_path / "pod", image, brought, node="node-a")
    result = pod.run("--drain-timeout", 0, "--job", "earlier", "--", "sh", "-c", "exit 7")
    assert result.returncode == 7
    assert "not shipped to the collector" in result.stderr
    pod.start_sidecar("--collector", json.loads((state / "collector.json").read_bytes())["grpc"])
    try:
        until(lambda: not list((pod.folder / "state" / "spool").iterdir()))
    finally:
        assert pod.end() == 0
    jobs = gradwatch("jobs", "--state-dir", state, "--json").json
    assert [job["job"] for job in jobs] == ["earlier"]


def test_a_sidecar_that_is_killed_is_followed_by_one_that_goes_on(tmp_path, image, brought, collector):
    _, _, state, _ = collector
    grpc = json.loads((state / "collector.json").read_bytes())["grpc"]
    pod = Pod(tmp_path / "pod", image, brought, node="node-a")
    served, go = pod.folder / "state" / "spool", tmp_path / "go"
    pod.start_sidecar("--collector", grpc)
    with ThreadPoolExecutor() as pool:
        wait = f"while [ ! -e {go} ]; do sleep 0.05; done; exit 3"
        running = pool.submit(pod.run, "--job", "killed", "--", "sh", "-c", wait)
        # What only a sidecar in touch with the collector can have written.
        until(lambda: list(served.glob("*/status.json")))
        pod.kill_sidecar()
        pod.start_sidecar("--collector", grpc)
        go.touch()
        result = running.result()
    assert pod.end() == 0
    assert result.returncode == 3
    assert "not shipped" not in result.stderr, (pod.folder / "sidecar.log").read_text()
    assert not list(served.iterdir())


def test_a_launcher_wants_the_sidecar_or_its_own_collector_not_both(tmp_path):
    result = gradwatch(
        "run", "--no-sidecar", "--http", "127.0.0.1:0", "--state-dir", tmp_path, "--", "true", timeout=60
    )
    assert result.returncode == 2
    assert "--no-sidecar starts none" in result.stderr


def test_an_old_python_is_refused_with_its_name(tmp_path, brought):
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    env = {"PATH": "/usr/bin:/bin", "GRADWATCH_PYTHON": str(old)}
    done = subprocess.run([brought, "--help"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 127
    assert str(old) in done.stderr


def test_what_the_launcher_is_brought_has_the_ranges_of_the_package():
    project = (REPOSITORY / "pyproject.toml").read_text()
    asked = [line for line in LAUNCHER.read_text().splitlines() if line and not line.startswith("#")]
    for one in asked:
        assert f'  "{one.partition(",")[0]}' in project, one


def test_nothing_that_is_brought_is_bound_to_a_version_of_python(brought: Path):
    packages = brought.parent.parent / "launcher"
    version = f"cpython-{sys.version_info.major}{sys.version_info.minor}"
    bound = {path.relative_to(packages).parts[0] for path in packages.rglob("*.so") if version in path.name}
    # PyYAML goes on without its extension.
    assert bound <= {"yaml", "_yaml"}
