"""A real Prometheus and a real Alertmanager that watch a real job, and somebody who is paged."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import httpx
import yaml

from tests.ranks import REPOSITORY, free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

RULES = REPOSITORY / "helm/gradwatch/rules/gradwatch.rules.yaml"
ALERTMANAGER = REPOSITORY / "examples/alertmanager.yaml"


def until(look: Callable[[], Any], *, seconds: float = 200) -> Any:
    """Ask until the answer is true; the deadline is for a broken test only."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            found = look()
        except httpx.TransportError:
            found = None
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} seconds")


@dataclass
class Trained:
    """A job that trains until it is told to stop.

    Attributes:
        port: of its collector's HTTP.
        planted: where the script writes when the NaN was there.
    """

    port: int
    planted: Path


@contextlib.contextmanager
def training(
    folder: Path, *more: str, ranks: int, bad_step: int, policy: str | None = None
) -> Iterator[Trained]:
    """A job called `watched`, in which rank 1 goes bad at a step.

    Args:
        folder: for its state and its checkpoints.
        more: flags of `gradwatch run`.
        ranks: of one node.
        bad_step: the step.
        policy: the text of a policy; `{root}` in it becomes the folder of the checkpoints.
    """
    port, stop, checkpoints = free_port(), folder / "stop", folder / "checkpoints"
    checkpoints.mkdir()
    env = {key: value for key, value in os.environ.items() if not key.startswith("GRADWATCH_")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    flags = [*more]
    if policy is not None:
        file = folder / "policy.yaml"
        file.write_text(policy.replace("{root}", str(checkpoints)))
        flags += ["--policy", str(file)]
    run = subprocess.Popen(
        [
            *(sys.executable, "-m", "gradwatch.cli", "run", "--job", "watched", *flags),
            *("--state-dir", str(folder / "state"), "--http", f"127.0.0.1:{port}", "--"),
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)),
            *("--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"),
            *("-m", "tests.training.until_told", str(stop), "1", str(bad_step), str(checkpoints)),
        ],
        env=env,
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield Trained(port, stop.with_name("stop.planted"))
    finally:
        stop.touch()
        _, said = run.communicate(timeout=120)
    assert run.returncode == 0, said


@contextlib.contextmanager
def prometheus(folder: Path, targets: Sequence[int], alertmanager: int | None = None) -> Iterator[str]:
    """A server that scrapes and evaluates each second; gives its address.

    Args:
        folder: for its files.
        targets: ports of collectors.
        alertmanager: its port; None for none.
    """
    config: dict[str, Any] = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [
            {
                "job_name": "gradwatch",
                "static_configs": [{"targets": [f"127.0.0.1:{port}" for port in targets]}],
            }
        ],
    }
    if alertmanager is not None:
        to = {"static_configs": [{"targets": [f"127.0.0.1:{alertmanager}"]}]}
        config["alerting"] = {"alertmanagers": [to]}
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    flags = [
        f"--config.file={file}",
        f"--storage.tsdb.path={folder / 'tsdb'}",
        f"--web.listen-address={address}",
        "--enable-feature=exemplar-storage",
    ]
    with _server("prometheus", flags):
        yield f"http://{address}"


@contextlib.contextmanager
def alertmanager(folder: Path, pager: int) -> Iterator[int]:
    """One with the example's configuration, whose webhooks go to a port of the tests; gives its own port."""
    config = yaml.safe_load(ALERTMANAGER.read_text())
    for receiver in config["receivers"]:
        for hook in receiver["webhook_configs"]:
            hook["url"] = f"http://127.0.0.1:{pager}/{receiver['name']}"
    file = folder / "alertmanager.yml"
    file.write_text(yaml.safe_dump(config))
    port = free_port()
    flags = [
        f"--config.file={file}",
        f"--storage.path={folder / 'alertmanager'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--cluster.listen-address=",
    ]
    with _server("prometheus-alertmanager", flags):
        until(lambda: httpx.get(f"http://127.0.0.1:{port}/-/ready").is_success)
        yield port


@dataclass
class Pager:
    """Whoever the webhooks reach.

    Attributes:
        pages: when each came, in seconds since the epoch, by which way, and what it said.
    """

    port: int
    pages: list[tuple[float, str, dict[str, Any]]] = field(default_factory=list)

    def firing(self, alert: str) -> list[tuple[float, dict[str, Any]]]:
        """When an alert was said to fire, and how."""
        return [
            (at, one)
            for at, _, said in self.pages
            for one in said["alerts"]
            if one["status"] == "firing" and one["labels"]["alertname"] == alert
        ]


@contextlib.contextmanager
def pager() -> Iterator[Pager]:
    """A webhook that keeps what it is told."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            said = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            paged.pages.append((time.time(), self.path.strip("/"), said))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    paged = Pager(server.server_address[1])
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    try:
        yield paged
    finally:
        server.shutdown()
        serving.join()
        server.server_close()


def ask(server: str, query: str) -> list[Any]:
    """The result of an instant query."""
    answer = httpx.get(f"{server}/api/v1/query", params={"query": query}).json()
    assert answer["status"] == "success", (query, answer)
    return list(answer["data"]["result"])


@contextlib.contextmanager
def _server(program: str, flags: Sequence[str]) -> Iterator[None]:
    path = shutil.which(program)
    assert path, f"this wants Debian's package {program}"
    running = subprocess.Popen([path, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        running.terminate()
        running.wait(30)
