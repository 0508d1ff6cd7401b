"""The demo's run: a collector, `gradwatch run` around torchrun, and the comparison at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from gradwatch.cli import policy_files
from gradwatch.cli.demo import faults, shards
from gradwatch.cli.errors import CliError, UsageError
from gradwatch.cli.launcher import collector_state
from gradwatch.cli.launcher.environment import for_child
from gradwatch.collector.policy.model import Mode

if TYPE_CHECKING:
    from collections.abc import Iterator

_JOB = "demo"
_START_SECONDS = 60.0
_STOP_SECONDS = 10.0
_STEP = re.compile(r"step (\d+) loss (\S+)")
_FINITE = "trained: weights finite"
_CHECKPOINTS = "checkpoints"
_SHOWN_METRICS = re.compile(
    r"gradwatch_(incidents_total|incident_first_rank|nonfinite_events_total|rank_nonfinite_events_total|job_ranks"
    r"|decisions_total|rollbacks_total|last_good_checkpoint_step)\b"
)


class Display(Protocol):
    """Shows how the demo gets on."""

    def step(self, step: int, loss: str) -> None:
        """A training step is done."""

    def line(self, text: str) -> None:
        """The launcher, or torchrun, has said something."""

    def ended(self) -> None:
        """The training is over."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What was planted, and what was found.

    Attributes:
        report: as `--report` writes it.
        metrics: lines of /metrics, as scraped.
        finite: whether the weights were, in the end.
        healed: whether a policy was to see to that.
    """

    planted: faults.Planted
    incident: dict[str, Any] | None
    report: dict[str, Any]
    metrics_url: str
    metrics: list[str]
    finite: bool = False
    healed: bool = False

    @property
    def correct(self) -> bool:
        """Whether the verdict is right, and the policy did what it is for."""
        return self.named_right and (self.finite or not self.healed)

    @property
    def named_right(self) -> bool:
        """Whether the first verdict names what was planted, and nothing else."""
        only = self.planted.again_rank is None
        if only and len(self.report["incidents"]) > 1:
            return False
        return self.planted.is_told_by(self.incident)


def run_demo(seed: int, display: Display, fault: faults.Fault, policy: Path | None) -> Outcome:
    """Plant a fault, train, and read the verdict.

    Args:
        seed: where the fault lies.
        display: shows how it goes.
        fault: what is broken.
        policy: file of the policy to train under; None for none.

    Raises:
        CliError: there is no torch here, or the run itself failed.
        UsageError: the policy is of no use, or does not go with that fault.
    """
    if importlib.util.find_spec("torch") is None:
        raise CliError("the demo trains with torch, which is not installed: pip install 'gradwatch[torch]'")
    planted = faults.plant(seed, fault)
    if policy is not None and not planted.in_the_data:
        with_policy = ", ".join(one.value for one in faults.IN_THE_DATA)
        raise UsageError(f"--policy goes with faults of the data only: {with_policy}")
    enforced = policy is not None and policy_files.check(policy).mode is Mode.ENFORCE
    with tempfile.TemporaryDirectory(prefix="gradwatch-demo-") as name:
        folder = Path(name)
        shards.write(folder, planted, seed)
        with _collector(folder) as url:
            watched = _Scraping(display, url)
            report, finite = _train(folder, watched, planted, policy)
            display.ended()
            # While the incident is open if it could be had, since then a gauge names the rank.
            scraped = watched.at_verdict or _scrape(url)
            metrics = [line for line in scraped.splitlines() if _is_shown(line)]
    incidents = report["incidents"]
    return Outcome(
        planted, incidents[0] if incidents else None, report, f"{url}/metrics", metrics, finite, enforced
    )


class _Scraping:
    """A display that scrapes the metrics when the verdict is told."""

    def __init__(self, display: Display, url: str) -> None:
        self.at_verdict = ""
        self._display = display
        self._url = url

    def step(self, step: int, loss: str) -> None:
        self._display.step(step, loss)

    def ended(self) -> None:
        self._display.ended()

    def line(self, text: str) -> None:
        self._display.line(text)
        if text.startswith("gradwatch: incident "):
            self.at_verdict = _scrape(self._url)


def _is_shown(line: str) -> bool:
    return _SHOWN_METRICS.match(line) is not None and not line.endswith(" 0.0")


@contextlib.contextmanager
def _collector(folder: Path) -> Iterator[str]:
    """A collector that outlives the run, so that there is something to scrape afterwards."""
    command = [sys.executable, "-m", "gradwatch.cli", "collector"]
    command += ["--state-dir", str(folder), "--parent", str(os.getpid())]
    log = folder / "demo-collector.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            cwd=folder,
            env=for_child(os.environ),
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + _START_SECONDS
        while (info := collector_state.ready(folder)) is None:
            if process.poll() is not None or time.monotonic() > deadline:
                raise CliError(f"the demo's collector did not start:\n{log.read_text(errors='replace')}")
            time.sleep(0.05)
        yield info.http
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _train(
    folder: Path, display: Display, planted: faults.Planted, policy: Path | None
) -> tuple[dict[str, Any], bool]:
    """Train; the report, and whether the weights are finite in the end."""
    report = folder / "report.json"
    script = Path(__file__).with_name("train.py" if planted.in_the_data else "broken.py")
    command = [sys.executable, "-m", "gradwatch.cli", "run", "--job", _JOB]
    command += ["--state-dir", str(folder), "--report", str(report)]
    if planted.fault is faults.Fault.DIVERGED_REPLICA:
        command += ["--replica-check-every", str(faults.REPLICA_CHECK_EVERY)]
    if policy is not None:
        command += ["--policy", str(_here(policy, folder))]
    command += ["--"]
    command += [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(faults.RANKS), str(script), str(folder)]
    if not planted.in_the_data:
        command += ["--fault", planted.fault.value, "--step", str(planted.step)]
        command += ["--ranks", *map(str, planted.ranks)]
    if policy is not None:
        command += ["--checkpoints", str(folder / _CHECKPOINTS), "--resume", "{resume}"]
    env = {**for_child(os.environ), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        cwd=folder,
        env=env,
    )
    try:
        said, finite = _follow(process, display)
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if process.wait() != 0 or not report.exists():
        raise CliError(f"the training ended with exit code {process.returncode}:\n" + "\n".join(said))
    document: dict[str, Any] = json.loads(report.read_bytes())
    return document, finite


def _here(policy: Path, folder: Path) -> Path:
    """The policy with the demo's own folder of checkpoints: nothing else is touched."""
    import yaml  # type: ignore[import-untyped]

    document = yaml.safe_load(policy.read_bytes())
    if "checkpoints" in document:
        document["checkpoints"]["root"] = str(folder / _CHECKPOINTS)
    copy = folder / "policy.yaml"
    copy.write_text(yaml.safe_dump(document, sort_keys=False))
    return copy


def _follow(process: subprocess.Popen[str], display: Display) -> tuple[list[str], bool]:
    """Show what the run prints; the lines of stderr, and whether the weights are finite in the end."""
    said: list[str] = []
    finite = False

    def listen(stream: IO[str]) -> None:
        for line in stream:
            said.append(line.rstrip())
            if line.startswith("gradwatch: "):
                display.line(line.rstrip())

    if process.stdout is None or process.stderr is None:
        raise CliError("the run has no output to follow")
    listener = threading.Thread(target=listen, args=(process.stderr,), daemon=True)
    listener.start()
    with process.stdout, process.stderr:
        for line in process.stdout:
            match = _STEP.match(line)
            if match is not None:
                display.step(int(match[1]), match[2])
            elif line.startswith("trained: "):
                finite = line.strip() == _FINITE
        listener.join()
    return said, finite


def _scrape(url: str) -> str:
    import httpx

    try:
        with httpx.Client(trust_env=False) as client:
            return client.get(f"{url}/metrics").text
    except httpx.HTTPError as error:
        raise CliError(f"cannot scrape {url}/metrics: {error}") from None
