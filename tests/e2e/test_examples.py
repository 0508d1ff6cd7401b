"""What lies in `examples/` works as it is."""

from __future__ import annotations

import pytest

from tests.cli.command import gradwatch
from tests.e2e.jobs import PYTHON_BIN
from tests.ranks import REPOSITORY

EXAMPLES = REPOSITORY / "examples"


@pytest.mark.e2e
def test_the_script_trains_under_the_policy(new_job, tmp_path):
    policy = tmp_path / "policy.yaml"
    policy.write_text((EXAMPLES / "policy.yaml").read_text().replace("/tmp/checkpoints", str(tmp_path)))
    assert gradwatch("policy", "check", policy).returncode == 0
    command = [PYTHON_BIN / "torchrun", "--standalone", "--nproc-per-node", 2, EXAMPLES / "resumable.py"]
    command += ["--folder", tmp_path / "checkpoints", "--steps", 20, "--resume", "{resume}"]
    job = new_job(command, "--policy", policy)
    result = job.finish()
    assert result.returncode == 0, result.stderr
    assert "trained from step 0 to 20" in result.stdout
    assert (tmp_path / "checkpoints" / "step-20.pt").exists()
    assert (job.report["ranks_watched"], job.report["decisions"]) == (2, [])
