"""Scripts that never heard of gradwatch: the culprit is named."""

from __future__ import annotations

import json
import sys

import pytest

from gradwatch.cli.launcher import collector_state
from tests.cli.command import child_of, gradwatch, processes_with, spools, until
from tests.e2e.jobs import FIRST_PARAMETER, PYTHON_BIN, SCRIPTS, torchrun, verdict
from tests.ranks import free_port

pytestmark = pytest.mark.e2e


def test_torchrun(new_job, tmp_path):
    job = new_job(torchrun("ddp", 3), BAD_RANK="1", BAD_STEPS="4")
    result = job.finish()
    assert result.returncode == 0
    assert verdict(job.report) == (1, 4, FIRST_PARAMETER)
    (incident,) = job.report["incidents"]
    assert (incident["status"], incident["tie"]) == ("closed", False)
    assert (incident["clean_ranks"], incident["unknown_ranks"]) == ([0, 2], [])
    assert (job.report["ranks_watched"], job.report["world_size"], job.report["warnings"]) == (3, 3, [])
    assert job.report["overhead"]["ratio"] >= 0
    # What a watched process must not have loaded.
    assert sorted(result.stdout.splitlines()) == [f"rank {rank} loaded []" for rank in range(3)]
    # Three lines and the verdict.
    assert len(result.ours) == 4
    assert "watching 3 of 3 ranks" in result.stderr
    assert any("Rank 1" in line and FIRST_PARAMETER in line and "step 4" in line for line in result.ours)
    assert not spools(job.state_dir)
    assert not processes_with(str(tmp_path))
    # And the reading commands tell it without a collector.
    told = gradwatch("incident", incident["id"], "--state-dir", job.state_dir).stdout
    assert "Rank 1" in told
    assert FIRST_PARAMETER in told


def test_a_healthy_run_says_three_lines_and_reports_no_incident(new_job):
    job = new_job(torchrun("ddp"), "--require-watch")
    result = job.finish()
    assert result.returncode == 0
    assert job.report["incidents"] == []
    assert len(result.ours) == 3
    assert "2 of 2 ranks watched, no incident, overhead" in result.ours[-1]


def test_accelerate(new_job):
    command = [PYTHON_BIN / "accelerate", "launch", "--multi_gpu", "--num_processes", 2]
    command += ["--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", free_port(), SCRIPTS / "with_accelerate.py"]
    job = new_job(command, BAD_RANK="1", BAD_STEPS="3")
    assert job.finish().returncode == 0
    assert verdict(job.report) == (1, 3, FIRST_PARAMETER)


def test_spawned_children(new_job):
    job = new_job([sys.executable, SCRIPTS / "spawn.py", free_port()], BAD_RANK="0", BAD_STEPS="5")
    assert job.finish().returncode == 0
    assert verdict(job.report) == (0, 5, FIRST_PARAMETER)


def test_two_jobs_at_once_on_one_collector(new_job):
    first = new_job(torchrun("ddp"), "--job", "a", BAD_RANK="0", BAD_STEPS="3", PAUSE="0.2")
    second = new_job(torchrun("ddp"), "--job", "b", BAD_RANK="1", BAD_STEPS="6", PAUSE="0.2")
    until(lambda: collector_state.ready(first.state_dir))
    # Both may have begun to start one; whoever came second finds the folder taken, and uses it.
    both = (first.process.pid, second.process.pid)
    until(lambda: sum(child_of(pid, "collector") is not None for pid in both) == 1)
    for job in (first, second):
        assert job.finish().returncode == 0
    assert verdict(first.report) == (0, 3, FIRST_PARAMETER)
    assert verdict(second.report) == (1, 6, FIRST_PARAMETER)


def test_a_job_that_torchrun_restarts(new_job):
    job = new_job(torchrun("ddp", 2, "--max-restarts=1"), FAIL="first_attempt", BAD_RANK="1", BAD_STEPS="5")
    assert job.finish().returncode == 0
    assert verdict(job.report) == (1, 5, FIRST_PARAMETER)
    assert job.report["attempts"] == 2
    assert job.report["incidents"][0]["attempt"] == 1
    assert job.report["warnings"] == []


def test_a_grad_scaler_at_work_raises_no_incident(new_job):
    job = new_job(torchrun("with_scaler"), STEPS="24")
    result = job.finish()
    assert result.returncode == 0
    skipped = {int(line.split()[2]) for line in result.stdout.splitlines()}
    assert min(skipped) >= 5
    assert job.report["incidents"] == []
    assert len(result.ours) == 3
    log = gradwatch("events", job.report["job"], "--json", "--state-dir", job.state_dir).stdout
    events = [json.loads(line) for line in log.splitlines()]
    overflows = [event["body"] for event in events if event["kind"] == "nonfinite"]
    assert len({body["step"] for body in overflows}) == max(skipped)
    assert all(body["loss_scale_overflow"] for body in overflows)


def test_bad_data_under_a_grad_scaler_is_an_incident_all_the_same(new_job):
    job = new_job(torchrun("with_scaler"), STEPS="24", BAD_RANK="1", BAD_STEPS="20")
    assert job.finish().returncode == 0
    assert verdict(job.report) == (1, 20, FIRST_PARAMETER)
    (incident,) = job.report["incidents"]
    assert incident["cause"] == "input"
    assert "The batch that it was given held NaN: bad data." in incident["verdict"]


def test_fsdp2(new_job):
    job = new_job(torchrun("fsdp2"), "--require-watch", BAD_RANK="1", BAD_STEPS="3")
    result = job.finish()
    assert result.returncode == 0
    assert any("watching 2 of 2 ranks" in line for line in result.ours)
    assert verdict(job.report) == (1, 3, FIRST_PARAMETER)
    assert job.report["incidents"][0]["first"]["look"] == "fsdp-unsharded"
