"""Promise three on the whole chain: real ranks, sidecar and collector, killed by SIGKILL again and again."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import threading
import time
from typing import Any

import psutil
import pytest

from tests.campaign.run import mistakes
from tests.cli.command import gradwatch
from tests.e2e.jobs import Job
from tests.recovery import STANDALONE

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(720)]

KILLS = int(os.environ.get("KILLS", "8"))


def ended_well(job: Job) -> list[dict[str, Any]]:
    """Wait for its end; its incidents."""
    result = job.finish(400)
    assert result.returncode == 0, result.stderr
    return job.report["incidents"]


def bad_steps(job: Job) -> list[int]:
    """The step of each non-finite record that the collector remembers, read from its state after the end."""
    log = gradwatch("events", "killed", "--json", "--state-dir", job.state_dir).stdout
    events = [json.loads(line) for line in log.splitlines()]
    return [event["body"]["step"] for event in events if event["kind"] == "nonfinite"]


def test_a_culprit_killed_straight_after_its_event_is_named_every_time(tmp_path):
    planted = tmp_path / "planted.json"
    command = [sys.executable, "-m", "tests.training.dying_culprits", KILLS, planted]
    job = Job(tmp_path, command, "--job", "killed")
    incidents = sorted(ended_well(job), key=lambda incident: incident["attempt"])

    named = [{"rank": incident["first"]["rank"], "step": incident["step"]} for incident in incidents]
    assert named == json.loads(planted.read_text())
    for incident in incidents:
        # The other rank had looked at its own gradients of that round, and said so, before it died.
        assert incident["clean_ranks"] == [1 - incident["first"]["rank"]]
        assert incident["unknown_ranks"] == []
    assert len(bad_steps(job)) == KILLS


def kill_at_random(job: Job, role: str, killed: list[int]) -> None:
    """SIGKILL the launcher's child of that role, at random moments, KILLS times."""
    launcher = psutil.Process(job.process.pid)
    while len(killed) < KILLS and job.process.poll() is None:
        time.sleep(random.uniform(0.2, 1.5))
        # One that we killed may not be reaped yet, or be reaped just now.
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in launcher.children():
                if child.pid not in killed and role in child.cmdline():
                    child.send_signal(signal.SIGKILL)
                    killed.append(child.pid)


def test_killing_sidecar_and_collector_at_any_time_loses_no_event_and_counts_none_twice(tmp_path):
    planted, stop = tmp_path / "planted.json", tmp_path / "stop"
    seed = random.SystemRandom().randrange(1 << 30)
    script = ["-m", "tests.training.campaign", seed, 60, 5, planted, stop]
    job = Job(tmp_path, [*STANDALONE, 2, *script], "--job", "killed")
    killed: dict[str, list[int]] = {"sidecar": [], "collector": []}
    killers = [threading.Thread(target=kill_at_random, args=(job, role, killed[role])) for role in killed]
    for killer in killers:
        killer.start()
    for killer in killers:
        killer.join()
    stop.touch()
    incidents = ended_well(job)

    assert {role: len(pids) for role, pids in killed.items()} == {"sidecar": KILLS, "collector": KILLS}
    cases = json.loads(planted.read_text())
    assert list(mistakes(2, cases, incidents)) == [], f"seed {seed}"
    assert sorted(bad_steps(job)) == [
        case["planted"]["step"] for case in cases if case["planted"] is not None
    ]
