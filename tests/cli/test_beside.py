"""What a launcher says of the sidecar that ought to run beside it. Time is passed in."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from gradwatch.agent.probe import spool
from gradwatch.cli.launcher import policy_file
from gradwatch.cli.launcher.beside import Beside
from gradwatch.cli.launcher.config import RunConfig
from gradwatch.cli.launcher.spools import RunSpool

HOLD = """
import sys
from pathlib import Path
from gradwatch.agent.probe import spool
assert spool.try_lock(Path(sys.argv[1])) is not None
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def locked(path):
    """Another process holds it."""
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        yield


@pytest.fixture
def run(tmp_path):
    config = RunConfig(command=("true",), job="j", state_dir=tmp_path / "state", sidecar=False)
    return config, RunSpool(tmp_path / "state", "run", job="j", generation=0, command=("true",))


def said_after(beside, *seconds):
    began = time.monotonic()
    for passed in seconds:
        beside.tick(began + passed)
    return beside.troubles()


def test_a_sidecar_that_does_not_come_is_missed(run):
    config, folder = run
    beside = Beside(config, folder)
    assert said_after(beside, 0, 29) == []
    (said,) = said_after(beside, 31)
    assert f"gradwatch sidecar --state-dir {config.state_dir}" in said


def test_one_that_comes_is_not(run):
    config, folder = run
    with locked(folder.folder / spool.SIDECAR_LOCK):
        assert said_after(Beside(config, folder), 0, 29, 31, 100) == []


@pytest.mark.parametrize("looks", [True, False])
def test_one_that_looks_after_no_checkpoints_is_said_under_a_policy_that_goes_back(run, tmp_path, looks):
    config, folder = run
    text = "apiVersion: gradwatch/v1\nmode: enforce\ncheckpoints: {root: /ckpts}\n"
    (tmp_path / "policy.yaml").write_text(text)
    config = dataclasses.replace(config, policy=policy_file.read(tmp_path / "policy.yaml"))
    if looks:
        name = spool.sidecar_journal_name(spool.new_incarnation())
        (folder.folder / spool.progress_filename(name)).touch()
    with locked(folder.folder / spool.SIDECAR_LOCK):
        said = said_after(Beside(config, folder), 0, 31)
    assert any("--checkpoints-root /ckpts" in line for line in said) is not looks
