"""A script that is not watched is told so loudly, with the cause."""

from __future__ import annotations

import sys

import pytest

from tests.e2e.jobs import SCRIPTS, Job, torchrun

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize(
    ("script", "env", "cause"),
    [
        ("ddp", {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}, "TORCH_DEVICE_BACKEND_AUTOLOAD=0"),
        ("fsdp1", {}, "FSDP1"),
    ],
)
def test_cause(tmp_path, script, env, cause):
    job = Job(tmp_path, torchrun(script), "--require-watch", **env)
    result = job.finish()
    assert result.returncode == 2
    assert job.report["ended_by"] == "require_watch"
    assert job.report["ranks_watched"] == 0
    assert any("NOT WATCHED" in line and cause in line for line in result.ours)
    assert any(cause in warning for warning in job.report["warnings"])


def test_a_process_that_trains_alone(tmp_path):
    job = Job(tmp_path, [sys.executable, SCRIPTS / "alone.py"])
    result = job.finish()
    assert result.returncode == 0
    assert any("NOT WATCHED" in line and "alone" in line for line in result.ours)


def test_a_python_without_gradwatch(tmp_path):
    """As in another environment: the entry point's metadata cannot be seen."""
    code = (
        "import importlib.metadata as m; real = m.entry_points; "
        "m.entry_points = lambda **k: [] if k.get('group') == 'torch.backends' else real(**k); "
        f"import runpy; runpy.run_path({str(SCRIPTS / 'alone.py')!r})"
    )
    job = Job(tmp_path, [sys.executable, "-c", code])
    result = job.finish()
    assert result.returncode == 0
    assert any("gradwatch is not installed in the Python that runs it" in line for line in result.ours)
