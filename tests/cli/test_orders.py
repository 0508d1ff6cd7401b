"""The launcher obeys orders: real processes, real signals; the orders are left in its spool by hand."""

from __future__ import annotations

import json
import signal
import sys

import pytest

from tests.cli.command import gradwatch, until
from tests.cli.obeying import Launcher, alive


@pytest.fixture
def launcher(tmp_path):
    made: list[Launcher] = []

    def launcher(mode: str = "waits", *arguments: str, **rules: object) -> Launcher:
        made.append(Launcher(tmp_path, mode, *arguments, **rules))
        return made[-1]

    yield launcher
    for one in made:
        if one.process.poll() is None:
            one.process.terminate()
            one.process.communicate(timeout=60)


def checkpoint(one: Launcher, step: int) -> str:
    path = one.root / f"step_{step}"
    path.mkdir()
    (path / "model.pt").write_bytes(b"x")
    return str(path)


def test_a_rollback_from_the_first_start_to_the_users_end(launcher):
    one = launcher("waits", "--resume", "{resume}", "--lr", "1")
    assert one.records("launch_started")[0]["policy_hash"]
    one.order("START")
    (first,) = one.starts(1)
    assert first["argv"] == ["--lr", "1"]
    guard = json.loads(first["env"].pop("GRADWATCH_GUARD"))
    assert guard == {"on_nonfinite": "skip_step", "max_consecutive": 2, "max_per_1000_steps": None}
    assert first["env"] == {"GRADWATCH_GENERATION": "0"}
    # Orders that are not for now, or not for us, are refused; the valid one after them is the first to act.
    one.order("STOP", 1, "stale")
    one.order("START", 1, "early")
    one.order("STOP", 0, "foreign", launch="another")
    one.order("STOP", 0, "d", reason="rank 1 was first")
    (stopped,) = one.until_records("command_stopped")
    assert not alive(one.pids())
    assert (stopped["order"], stopped["generation"], stopped["launch"]) == ("d", 0, one.launch)
    assert "exit_code" not in stopped
    path = checkpoint(one, 30)
    one.order("START", 0, "too-low", resume_path=path)
    again = {"resume_path": path, "resume_step": "30", "skip_batches": 4}
    one.order("START", 1, "d", **again)
    second = one.starts(2)[1]
    assert second["argv"] == ["--resume", path, "--lr", "1"]
    assert second["env"].pop("GRADWATCH_GUARD")
    assert second["env"] == {
        "GRADWATCH_GENERATION": "1",
        "GRADWATCH_RESUME_PATH": path,
        "GRADWATCH_RESUME_STEP": "30",
        "GRADWATCH_SKIP_BATCHES": "4",
    }
    # The same order once more, while it runs and after it.
    one.order("START", 1, "d", **again)
    one.process.terminate()
    exit_code, said, report = one.end()
    assert exit_code == 143
    assert "rolling back: stopping the command: rank 1 was first" in said
    assert f"stopped; resuming from {path} (step 30) in generation 1" in said
    assert (report["ended_by"], report["generations"]) == ("signal", 2)
    assert report["resume"] == {"path": path, "step": 30, "generation": 1, "honoured": True}
    assert [one["generation"] for one in one.records("command_started")] == [0, 1]
    (ended,) = one.records("launch_ended")
    assert (ended["generation"], ended["exit_code"], ended["ended_by"]) == (1, 143, "signal")


def test_workers_that_ignore_sigterm_are_gone_before_the_command_is_said_to_be_stopped(launcher):
    one = launcher("workers")
    one.order("START")
    one.starts(1)
    workers = one.pids()
    assert len(alive(workers)) == 3
    one.order("STOP", 0, "d")
    one.until_records("command_stopped")
    assert not alive(workers)
    # Nothing to resume: the job starts from its beginning, in a later generation.
    one.order("START", 1, "d")
    assert one.starts(2)[1]["env"]["GRADWATCH_GENERATION"] == "1"


def test_a_handler_of_sigterm_may_save(launcher):
    one = launcher("saves")
    one.order("START")
    one.starts(1)
    one.order("STOP", 0, "d")
    one.until_records("command_stopped")
    assert one.log.with_name("j.log.saved").exists()
    # What was told to the command and not read by it is said.
    path = checkpoint(one, 5)
    one.order("START", 1, "d", resume_path=path, resume_step="5")
    one.starts(2)
    one.order("HALT", 1, "h", reason="the budget job is spent")
    exit_code, said, report = one.end()
    assert (exit_code, report["ended_by"]) == (93, "halted")
    assert "halted: the budget job is spent" in said
    assert "not honoured" in said
    assert report["resume"]["honoured"] is False


def test_a_job_that_is_halted_before_its_first_start_never_starts(launcher):
    one = launcher()
    one.order("HALT", 0, "h", reason="no good checkpoint")
    assert one.end()[0] == 93
    assert not one.log.exists()


def test_the_users_signal_while_the_command_is_stopped_ends_the_run(launcher):
    one = launcher()
    one.order("START")
    one.starts(1)
    one.order("STOP", 0, "d")
    one.until_records("command_stopped")
    one.process.send_signal(signal.SIGINT)
    # Whatever comes now, the user has asked for the end.
    one.order("START", 1, "d")
    exit_code, _, report = one.end()
    assert (exit_code, report["ended_by"]) == (130, "signal")
    assert len(one.starts(1)) == 1


@pytest.mark.parametrize(
    ("rules", "more", "said"),
    [
        ({"restarts": False}, {}, "a rollback is due"),
        ({}, {"exclude_node": "gpu-7"}, "go on without host gpu-7"),
    ],
)
def test_a_restart_that_is_left_to_the_supervisor(launcher, rules, more, said):
    one = launcher("waits", **rules)
    one.order("START")
    one.starts(1)
    one.order("STOP", 0, "d")
    one.until_records("command_stopped")
    one.order("START", 1, "d", **more)
    exit_code, lines, report = one.end()
    assert (exit_code, report["ended_by"]) == (75, "rollback_due")
    assert said in lines
    assert report["exclude_node"] == more.get("exclude_node")
    assert len(one.starts(1)) == 1


def test_a_command_that_fails_waits_for_what_is_decided(launcher):
    one = launcher("fails", verdict_seconds=60.0)
    one.order("START")
    (failed,) = one.until_records("command_stopped")
    assert (failed["exit_code"], failed["order"]) == (3, "")
    # It failed of what is rolled back.
    one.order("STOP", 0, "d")
    assert one.until_records("command_stopped", 2)[1]["order"] == "d"
    one.order("START", 1, "d")
    one.starts(2)


@pytest.mark.parametrize("released", [True, False])
def test_a_command_that_fails_ends_with_its_own_code_when_nothing_is_due(launcher, released):
    one = launcher("fails", verdict_seconds=600.0 if released else 0.2)
    one.order("START")
    one.until_records("command_stopped")
    if released:
        one.order("RELEASE")
    exit_code, _, report = one.end()
    assert (exit_code, report["ended_by"]) == (3, "command")


@pytest.mark.parametrize("where", ["/etc/hostname", "step_9"])
def test_it_never_starts_without_what_it_is_to_resume(launcher, where):
    one = launcher()
    one.order("START")
    one.starts(1)
    one.order("STOP", 0, "d")
    one.until_records("command_stopped")
    one.order("START", 1, "d", resume_path=str(one.root / where))
    exit_code, said, report = one.end()
    assert (exit_code, report["ended_by"]) == (93, "halted")
    assert f"halted: {one.root / where}" in said
    assert len(one.starts(1)) == 1


def test_without_an_answer_training_does_not_wait(launcher):
    one = launcher("waits", start_seconds=0.2)
    assert one.starts(1)[0]["env"]["GRADWATCH_GENERATION"] == "0"
    one.process.terminate()
    _, said, _ = one.end()
    assert "no order came from the collector" in said


def test_a_stopped_command_does_not_wait_for_ever(launcher):
    one = launcher("waits", answer_seconds=0.2)
    one.order("START")
    one.starts(1)
    one.order("STOP", 0, "d")
    exit_code, said, report = one.end()
    assert (exit_code, report["ended_by"]) == (93, "halted")
    assert "the collector did not answer" in said


def test_what_a_killed_launcher_left_is_ended_by_the_next_one_and_nothing_else(launcher):
    killed = launcher("workers")
    killed.order("START")
    killed.starts(1)
    left = killed.pids()
    other = launcher("workers", job="other", start_seconds=0.0)
    other.starts(1)
    killed.process.kill()
    killed.process.wait()
    # The command itself is told by the kernel; its workers have sessions of their own and ignore SIGTERM.
    until(lambda: len(alive(left)) == 2)
    next_one = launcher("waits", start_seconds=0.0)
    assert not alive(left)
    killed.process.communicate()
    # A live launcher of the same job keeps its processes, too.
    third = launcher("waits", start_seconds=0.0)
    third.starts(3)
    assert len(alive(other.pids())) == 3
    assert len(alive(next_one.pids())) == 2
    next_one.process.terminate()
    _, said, _ = next_one.end()
    assert "an earlier launcher of job j was killed and left 2 processes" in said


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("apiVersion: gradwatch/v1\nmod: enforce\n", ["policy.yaml:2: mod: "]),
        # all that is wrong at once
        ("apiVersion: gradwatch/v2\nmode: x\n", ["policy.yaml:1: apiVersion: ", "policy.yaml:2: mode: "]),
        (None, ["policy.yaml cannot be read"]),
    ],
)
def test_a_policy_that_is_of_no_use_is_an_error_before_the_command_starts(tmp_path, text, said):
    if text is not None:
        (tmp_path / "policy.yaml").write_text(text)
    result = gradwatch(
        "run", "--state-dir", tmp_path / "s", "--policy", tmp_path / "policy.yaml", "--",
        "touch", tmp_path / "started",
    )  # fmt: skip
    assert result.returncode == 2
    assert all(one in result.stderr for one in said)
    assert not (tmp_path / "started").exists()


def test_the_mark_inside_a_shell_string_is_an_error_before_the_command_starts(tmp_path):
    result = gradwatch("run", "--state-dir", tmp_path, "--", "bash", "-c", f"touch {tmp_path}/x {{resume}}")
    assert result.returncode == 2
    assert "{resume} stands inside a shell string" in result.stderr
    assert not (tmp_path / "x").exists()


def test_the_collector_of_the_state_folder_is_told_of_the_policy_file(tmp_path, monkeypatch):
    (tmp_path / "policy.yaml").write_text("apiVersion: gradwatch/v1\n")
    told = tmp_path / "s" / "policies" / "j.json"
    code = f"import pathlib; print(pathlib.Path({str(told)!r}).read_text())"
    monkeypatch.chdir(tmp_path)
    run = ["run", "--state-dir", tmp_path / "s", "--job", "j"]
    result = gradwatch(*run, "--policy", "policy.yaml", "--", sys.executable, "-c", code)
    assert result.json == {"file": str(tmp_path / "policy.yaml")}
    # A run without a policy takes it back.
    assert gradwatch(*run, "--", "true").returncode == 0
    assert not told.exists()
