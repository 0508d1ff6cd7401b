"""`gradwatch run` around commands that have nothing to do with torch."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import termios
import textwrap

import psutil
import pytest

from gradwatch.cli.launcher import collector_state
from tests.cli.command import (
    GRADWATCH,
    child_of,
    environment,
    finish,
    gradwatch,
    processes_with,
    spools,
    start,
    until,
)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code)]


@pytest.fixture
def run(tmp_path):
    def run(*arguments: object, **options: str):
        return gradwatch("run", "--state-dir", tmp_path / "state", *arguments, **options)

    return run


@pytest.fixture
def marker(tmp_path) -> str:
    """Something by which all processes of a test can be told from all others."""
    return str(tmp_path)


# ---------------------------------------------------------------- exit codes


@pytest.mark.parametrize(
    ("command", "exit_code", "ended_by"),
    [
        # the command's own
        (["true"], 0, "command"),
        (python("raise SystemExit(7)"), 7, "command"),
        # one that could be taken for ours is told apart by the report
        (python("raise SystemExit(93)"), 93, "command"),
        (python("raise SystemExit(2)"), 2, "command"),
        # 128 + n
        (python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"), 137, "signal"),
        (python("import os, signal; os.kill(os.getpid(), signal.SIGTERM)"), 143, "signal"),
        # as a shell says it
        (["no-such-command-anywhere"], 127, "not_found"),
        (["/no/such/file"], 127, "not_found"),
        (["/"], 126, "not_executable"),
        (["{tmp}/data"], 126, "not_executable"),
    ],
)
def test_exit_code_and_what_ended_the_run(run, tmp_path, command, exit_code, ended_by):
    (tmp_path / "data").write_text("")
    result = run("--report", tmp_path / "r.json", "--", *(word.format(tmp=tmp_path) for word in command))
    report = json.loads((tmp_path / "r.json").read_text())
    assert result.returncode == exit_code
    assert (report["exit_code"], report["ended_by"]) == (exit_code, ended_by)
    assert set(report) >= {
        "job", "exit_code", "ended_by", "generations", "ranks_watched", "world_size", "incidents",
        "decisions", "overhead", "warnings",
    }  # fmt: skip
    assert not spools(tmp_path / "state")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["no-such-command-anywhere"], "command not found: no-such-command-anywhere"),
        (["/no/such/file"], "no such file"),
        (["/"], "is a folder"),
        (["{tmp}/data"], "is not executable"),
    ],
)
def test_a_command_that_cannot_be_started_is_explained(run, tmp_path, command, said):
    (tmp_path / "data").write_text("")
    result = run("--", *(word.format(tmp=tmp_path) for word in command))
    assert said in result.stderr
    assert len(result.ours) == 1


def test_a_script_whose_interpreter_is_missing(run, tmp_path):
    script = tmp_path / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    result = run("--", script)
    assert result.returncode == 127
    assert "cannot start" in result.stderr
    assert not spools(tmp_path / "state")


def test_a_report_that_cannot_be_written_is_an_error_before_the_command_starts(run, tmp_path):
    result = run("--report", "/no/such/folder/r.json", "--", "touch", tmp_path / "started")
    assert result.returncode == 2
    assert "/no/such/folder/r.json" in result.stderr
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--collector", "nonsense", "--", "true"], "HOST:PORT"),
        (["--http", "127.0.0.1:99999", "--", "true"], "HOST:PORT"),
        (["--http", "0.0.0.0:0", "--", "true"], "loopback"),
        (["--collector", "127.0.0.1:1", "--http", "127.0.0.1:0", "--", "true"], "leave out"),
        (["--job", "a b", "--", "true"], "--job"),
        (["--no-such-flag", "--", "true"], "--no-such-flag"),
        ([], "CMD"),
    ],
)
def test_wrong_use_is_2(run, arguments, said):
    result = run(*arguments)
    assert result.returncode == 2
    assert said in result.stderr


def test_an_explicit_port_that_is_taken_is_an_error_before_the_command_starts(run, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = run("--http", f"127.0.0.1:{port}", "--", "touch", tmp_path / "started")
    assert result.returncode == 2
    assert str(port) in result.stderr
    assert not (tmp_path / "started").exists()


def test_default_ports_that_are_taken_are_replaced(tmp_path):
    """Two runs on two state folders at once: at most one of them has the default ports."""
    first = start("run", "--state-dir", tmp_path / "a", "--", "sleep", "600")
    second = start("run", "--state-dir", tmp_path / "b", "--", "sleep", "600")
    try:
        a = until(lambda: collector_state.ready(tmp_path / "a"))
        b = until(lambda: collector_state.ready(tmp_path / "b"))
        assert a.http != b.http
        assert a.grpc != b.grpc
    finally:
        for process in (first, second):
            process.terminate()
        results = [finish(process) for process in (first, second)]
    for info, result in zip((a, b), results, strict=True):
        assert f"metrics at {info.http}/metrics" in result.stderr


# ---------------------------------------------------------------- without a place to write


@pytest.mark.parametrize("where", ["file", "proc"])
def test_without_a_spool_the_job_runs_unwatched_and_that_is_loud(tmp_path, where):
    if where == "file":
        (tmp_path / "file").write_text("")
        state_dir = tmp_path / "file" / "state"
    else:
        state_dir = "/proc/gradwatch"
    code = "import os; print('GRADWATCH_SPOOL' in os.environ)"
    result = gradwatch("run", "--state-dir", state_dir, "--", *python(code))
    assert (result.returncode, result.stdout) == (0, "False\n")
    assert "THIS RUN IS UNWATCHED" in result.stderr
    assert str(state_dir) in result.stderr


def test_without_a_spool_require_watch_refuses_to_start(tmp_path):
    (tmp_path / "file").write_text("")
    result = gradwatch(
        "run", "--state-dir", tmp_path / "file", "--require-watch", "--", "touch", tmp_path / "started"
    )
    assert result.returncode == 2
    assert not (tmp_path / "started").exists()


def test_a_full_disk_under_the_spool_is_loud_too(tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(full)]
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        with (full / "ballast").open("wb", buffering=0) as ballast:
            ballast.write(b"x" * 8192)
        result = gradwatch("run", "--state-dir", full, "--", "true")
    finally:
        subprocess.run(["umount", str(full)], check=True)
    assert result.returncode == 0
    assert "THIS RUN IS UNWATCHED" in result.stderr


# ---------------------------------------------------------------- streams


def test_stdin_and_stdout_are_the_commands(run):
    result = run("--", *python("import sys; print(sys.stdin.read()[::-1])"), stdin="abc")
    assert result.stdout == "cba\n"


def test_options_after_the_command_are_the_commands(run):
    code = "import sys; print(sys.argv[1:])"
    result = run(*python(code), "--report", "x", "--quiet")
    assert result.stdout == "['--report', 'x', '--quiet']\n"


def test_a_run_says_at_most_three_lines_and_quiet_says_none(run, tmp_path):
    # A command that wraps no model is told so; that line is a warning, not one of the three.
    lines = [line for line in run("--", "true").ours if "WARNING" not in line]
    assert len(lines) <= 3
    assert [line for line in run("--quiet", "--", "true").ours if "WARNING" not in line] == []


def test_the_environment_of_the_command(run, tmp_path):
    code = """
        import json, os
        print(json.dumps({k: v for k, v in os.environ.items() if "GRADWATCH" in k or "RDZV" in k}))
    """
    env = json.loads(
        run("--job", "j", "--quiet", "--", *python(code), GRADWATCH_REPORT=str(tmp_path / "r")).stdout
    )
    assert env.pop("GRADWATCH_SPOOL").startswith(str(tmp_path / "state" / "spool"))
    assert env == {
        "GRADWATCH_JOB": "j",
        "GRADWATCH_GENERATION": "0",
        "GRADWATCH_AUTOPSY": "on",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }


def test_every_flag_has_its_variable(run, tmp_path):
    result = run(
        "--",
        "true",
        GRADWATCH_JOB="from-env",
        GRADWATCH_REPORT=str(tmp_path / "r.json"),
        GRADWATCH_QUIET="1",
        GRADWATCH_REQUIRE_WATCH="1",
        GRADWATCH_DRAIN_TIMEOUT="5",
    )
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["job"], report["ended_by"], result.returncode) == ("from-env", "require_watch", 2)


def test_a_nested_run_is_a_job_of_its_own(run, tmp_path):
    inner = [
        *GRADWATCH,
        "run",
        "--state-dir",
        tmp_path / "inner",
        "--report",
        tmp_path / "i.json",
        "--",
        "true",
    ]
    run("--job", "outer", "--report", tmp_path / "o.json", "--", *inner)
    assert json.loads((tmp_path / "o.json").read_text())["job"] == "outer"
    assert json.loads((tmp_path / "i.json").read_text())["job"].startswith("true-")


def test_what_is_not_watched_is_loud(run, tmp_path):
    result = run("--report", tmp_path / "r.json", "--", "true")
    assert "NOT WATCHED: no rank was watched: no process loaded gradwatch" in result.stderr
    (warning,) = json.loads((tmp_path / "r.json").read_text())["warnings"]
    assert warning.startswith("NOT WATCHED")


# ---------------------------------------------------------------- signals

ECHO_SIGNALS = """
    import signal, sys, time
    count = 0
    def got(number, frame):
        global count
        count += 1
        print(signal.Signals(number).name, flush=True)
        if number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            time.sleep(0.5)
            print("count", count, flush=True)
            sys.exit(5)
    for name in ('TERM', 'INT', 'HUP', 'QUIT', 'USR1', 'USR2'):
        signal.signal(getattr(signal, 'SIG' + name), got)
    print("ready", flush=True)
    while True:
        time.sleep(0.05)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_signals_are_passed_on_and_the_exit_code_is_the_commands(tmp_path, number):
    process = start("run", "--state-dir", tmp_path, "--", *python(ECHO_SIGNALS))
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    assert process.stdout.readline() == "SIGUSR1\n"
    process.send_signal(signal.SIGUSR2)
    assert process.stdout.readline() == "SIGUSR2\n"
    process.send_signal(number)
    result = finish(process)
    assert result.returncode == 5
    assert result.stdout == f"{number.name}\ncount 3\n"


def test_ctrl_c_on_a_terminal_reaches_the_command_once(tmp_path):
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [*GRADWATCH, "run", "--quiet", "--state-dir", str(tmp_path), "--", *python(ECHO_SIGNALS)],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 - no threads here
        env=environment(),
    )
    os.close(terminal)
    shown = b""
    sent = False
    try:
        while True:
            shown += os.read(controller, 4096)
            if b"ready" in shown and not sent:
                sent = True
                os.write(controller, b"\x03")
    except OSError:  # the terminal's other end is closed
        pass
    os.close(controller)
    assert process.wait(60) == 5
    assert b"count 1" in shown


# ---------------------------------------------------------------- leaving nothing behind

LEAVES_A_DAEMON = """
    import os, subprocess, sys, time
    script = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    subprocess.Popen([sys.executable, "-c", script, sys.argv[1]], start_new_session=True)
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(600)", sys.argv[1]])
        os._exit(0)
    os.wait()
    time.sleep(1)
"""


def test_no_process_is_left_behind_whatever_its_session(run, marker):
    result = run("--", *python(LEAVES_A_DAEMON), marker)
    assert result.returncode == 0
    assert "left 2 processes behind" in result.stderr
    assert not processes_with(marker)


def test_a_killed_launcher_leaves_nothing_of_ours_and_the_command_is_told(tmp_path, marker):
    process = start("run", "--state-dir", tmp_path / "state", "--", "sleep", "600")
    until(lambda: collector_state.ready(tmp_path / "state"))
    until(lambda: child_of(process.pid, "sidecar"))
    children = psutil.Process(process.pid).children()
    (sleeping,) = [child for child in children if child.name() == "sleep"]
    process.kill()
    process.wait()
    until(lambda: not processes_with(marker))
    # The command got a SIGTERM, which this one does not ignore.
    until(lambda: not sleeping.is_running())
    process.communicate()


@pytest.mark.parametrize("name", ["sidecar", "collector"])
def test_a_killed_child_of_ours_is_replaced(tmp_path, name):
    process = start("run", "--state-dir", tmp_path, "--", "sleep", "600")
    until(lambda: collector_state.ready(tmp_path))
    for _ in range(2):
        child = until(lambda: child_of(process.pid, name))
        child.kill()
        until(lambda child=child: (found := child_of(process.pid, name)) and found.pid != child.pid)
    until(lambda: collector_state.ready(tmp_path))
    process.terminate()
    result = finish(process)
    assert result.returncode == 143
    assert not spools(tmp_path)


def test_two_runs_share_a_collector_and_the_second_takes_over(tmp_path):
    first = start("run", "--state-dir", tmp_path, "--", "sleep", "600")
    info = until(lambda: collector_state.ready(tmp_path))
    second = start("run", "--state-dir", tmp_path, "--", "sleep", "600")
    until(lambda: child_of(second.pid, "sidecar"))
    assert child_of(second.pid, "collector") is None
    first.terminate()
    finish(first)
    until(lambda: (now := collector_state.ready(tmp_path)) and now.pid != info.pid)
    assert child_of(second.pid, "collector") is not None
    second.terminate()
    finish(second)
    assert not spools(tmp_path)


def test_without_a_collector_the_rest_stays_and_the_next_run_ships_it(tmp_path):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        result = gradwatch(
            "run",
            "--state-dir",
            tmp_path,
            "--collector",
            address,
            "--drain-timeout",
            "0.5",
            "--job",
            "lost",
            "--",
            "true",
        )
    (left,) = spools(tmp_path)
    assert f"in {left}; the next run ships them" in result.stderr
    gradwatch("run", "--state-dir", tmp_path, "--", "sleep", "4")
    assert not spools(tmp_path)
    assert "lost" in {job["job"] for job in gradwatch("jobs", "--json", "--state-dir", tmp_path).json}
