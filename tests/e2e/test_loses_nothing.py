"""Promise three on the whole chain: real ranks, sidecar and collector, killed by SIGKILL, 20 times each."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import psutil
import pytest

from tests.campaign.run import mistakes
from tests.ranks import REPOSITORY

if TYPE_CHECKING:
    from pathlib import Path

KILLS = 20


def gradwatch_run(folder: Path, *command: str) -> subprocess.Popen[str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("GRADWATCH_")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    options = [
        "--job",
        "killed",
        "--state-dir",
        str(folder / "state"),
        "--report",
        str(folder / "report.json"),
    ]
    return subprocess.Popen(
        [sys.executable, "-m", "gradwatch.cli", "run", *options, "--", *command],
        env=env,
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def ended_well(run: subprocess.Popen[str]) -> None:
    _, said = run.communicate(timeout=400)
    assert run.returncode == 0, said


def events(folder: Path) -> list[dict]:
    """What the collector remembers, read from its state after the end."""
    command = [
        sys.executable,
        "-m",
        "gradwatch.cli",
        "events",
        "killed",
        "--json",
        "--state-dir",
        str(folder / "state"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.e2e
@pytest.mark.timeout(720)
def test_a_culprit_killed_straight_after_its_event_is_named_every_time(tmp_path):
    planted = tmp_path / "planted.json"
    run = gradwatch_run(
        tmp_path, sys.executable, "-m", "tests.training.dying_culprits", str(KILLS), str(planted)
    )
    ended_well(run)

    incidents = json.loads((tmp_path / "report.json").read_text())["incidents"]
    incidents.sort(key=lambda incident: incident["attempt"])
    named = [{"rank": incident["first"]["rank"], "step": incident["step"]} for incident in incidents]
    assert named == json.loads(planted.read_text())
    for incident in incidents:
        # The other rank had looked at its own gradients of that round, and said so, before it died.
        assert incident["clean_ranks"] == [1 - incident["first"]["rank"]]
        assert incident["unknown_ranks"] == []
    bad = [event for event in events(tmp_path) if event["kind"] == "nonfinite"]
    assert len(bad) == KILLS


def kill_at_random(run: subprocess.Popen[str], role: str, killed: list[int], done: threading.Event) -> None:
    """SIGKILL the launcher's child of that role, at random moments, KILLS times."""
    launcher = psutil.Process(run.pid)
    while len(killed) < KILLS and not done.wait(random.uniform(0.2, 1.5)):
        try:
            children = launcher.children()
        except psutil.NoSuchProcess:
            return
        for child in children:
            # One that we killed may not be reaped yet, or be reaped just now.
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.pid not in killed and role in child.cmdline():
                    child.send_signal(signal.SIGKILL)
                    killed.append(child.pid)


@pytest.mark.e2e
@pytest.mark.timeout(720)
def test_killing_sidecar_and_collector_at_any_time_loses_no_event_and_counts_none_twice(tmp_path):
    planted = tmp_path / "planted.json"
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "0",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "127.0.0.1:0",
    ]
    seed = random.SystemRandom().randrange(1 << 30)
    stop = tmp_path / "stop"
    script = ["-m", "tests.training.campaign", str(seed), "60", "5", str(planted), str(stop)]
    run = gradwatch_run(tmp_path, sys.executable, *torchrun, *script)
    killed: dict[str, list[int]] = {"sidecar": [], "collector": []}
    done = threading.Event()
    killers = [
        threading.Thread(target=kill_at_random, args=(run, role, killed[role], done)) for role in killed
    ]
    for killer in killers:
        killer.start()
    for killer in killers:
        killer.join(timeout=540)
    stop.touch()
    ended_well(run)
    done.set()

    assert {role: len(pids) for role, pids in killed.items()} == {"sidecar": KILLS, "collector": KILLS}
    cases = json.loads(planted.read_text())
    incidents = json.loads((tmp_path / "report.json").read_text())["incidents"]
    assert list(mistakes(2, cases, incidents)) == [], f"seed {seed}"
    bad = [event["body"]["step"] for event in events(tmp_path) if event["kind"] == "nonfinite"]
    assert sorted(bad) == [case["planted"]["step"] for case in cases if case["planted"] is not None]
