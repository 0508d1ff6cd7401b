"""A real Prometheus scrapes a real run, without honor_labels, and answers the README's queries."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.ranks import REPOSITORY, free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

README_QUERIES = re.findall(r"```promql\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)

CONFIG = """
global:
  scrape_interval: 500ms
scrape_configs:
  - job_name: gradwatch
    static_configs:
      - targets: ["127.0.0.1:{port}"]
"""


def until(look: Callable[[], Any], *, seconds: float = 60) -> Any:
    """Ask until the answer is true; the deadline is for a broken test only."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            found = look()
        except httpx.TransportError:
            found = None
        if found:
            return found
        time.sleep(0.2)
    raise AssertionError(f"not within {seconds} seconds")


@pytest.fixture
def job(tmp_path: Path) -> Iterator[int]:
    """A 2-rank job in which rank 1 goes bad at step 20; gives the port of its metrics."""
    port = free_port()
    env = {key: value for key, value in os.environ.items() if not key.startswith("GRADWATCH_")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    stop = tmp_path / "stop"
    run = subprocess.Popen(
        [
            *(sys.executable, "-m", "gradwatch.cli", "run", "--job", "scraped"),
            *("--state-dir", str(tmp_path / "state"), "--http", f"127.0.0.1:{port}", "--"),
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"),
            *("-m", "tests.training.until_told", str(stop), "1", "20"),
        ],
        env=env,
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    yield port
    stop.touch()
    _, said = run.communicate(timeout=120)
    assert run.returncode == 0, said


@pytest.fixture
def prometheus(tmp_path: Path, job: int) -> Iterator[str]:
    """A real server that scrapes the job; gives its address."""
    program = shutil.which("prometheus")
    assert program, "this test wants Debian's package prometheus"
    config = tmp_path / "prometheus.yml"
    config.write_text(CONFIG.format(port=job))
    address = f"127.0.0.1:{free_port()}"
    server = subprocess.Popen(
        [
            program,
            f"--config.file={config}",
            f"--storage.tsdb.path={tmp_path / 'tsdb'}",
            f"--web.listen-address={address}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    yield f"http://{address}"
    server.terminate()
    server.wait(30)


def ask(server: str, query: str) -> list[Any]:
    """The result of an instant query."""
    answer = httpx.get(f"{server}/api/v1/query", params={"query": query}).json()
    assert answer["status"] == "success", answer
    return list(answer["data"]["result"])


@pytest.mark.e2e
def test_the_readmes_queries_are_answered_from_a_real_scrape(prometheus: str, job: int) -> None:
    assert len(README_QUERIES) >= 5
    for query in README_QUERIES:
        rows = until(lambda query=query: ask(prometheus, query))
        for row in rows:
            assert row["metric"]["training_job"] == "scraped", row

    (first,) = until(lambda: ask(prometheus, "gradwatch_incident_first_rank"))
    assert first["value"][1] == "1"
    # Labels that a server rewrites must not be ours.
    (series,) = ask(prometheus, 'gradwatch_rank_nonfinite_events_total{rank="1"}')
    assert {"exported_job", "exported_instance"}.isdisjoint(series["metric"])
    assert series["metric"]["job"] == "gradwatch"
    assert series["metric"]["instance"] == f"127.0.0.1:{job}"

    text = httpx.get(f"http://127.0.0.1:{job}/metrics").text
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
    document = httpx.get(f"http://127.0.0.1:{job}/api/v1/incidents").json()
    assert [(incident["first"]["rank"], incident["step"]) for incident in document] == [(1, 20)], json.dumps(
        document
    )
