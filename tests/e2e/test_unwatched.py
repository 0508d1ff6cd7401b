"""A script that is not watched is told so loudly, with the cause; one that trains alone is watched."""

from __future__ import annotations

import sys

import pytest

from tests.e2e.jobs import SCRIPTS, torchrun, verdict

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize(
    ("script", "env", "cause"),
    [
        ("ddp", {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}, "TORCH_DEVICE_BACKEND_AUTOLOAD=0"),
        ("fsdp1", {}, "FSDP1"),
    ],
)
def test_cause(new_job, script, env, cause):
    job = new_job(torchrun(script), "--require-watch", **env)
    result = job.finish()
    assert result.returncode == 2
    assert job.report["ended_by"] == "require_watch"
    assert job.report["ranks_watched"] == 0
    assert any("NOT WATCHED" in line and cause in line for line in result.ours)
    assert any(cause in warning for warning in job.report["warnings"])


def test_a_process_that_trains_alone_is_watched(new_job):
    job = new_job([sys.executable, SCRIPTS / "alone.py"], "--require-watch", BAD_RANK="0", BAD_STEPS="3")
    result = job.finish()
    assert result.returncode == 0
    assert any("watching 1 of 1 ranks" in line for line in result.ours)
    assert verdict(job.report) == (0, 3, "2.weight")
    assert job.report["ranks_watched"] == 1


def test_one_of_several_that_wraps_nothing(new_job):
    job = new_job(torchrun("alone"))
    assert job.finish().returncode == 0
    assert job.report["ranks_watched"] == 0
    assert any("one of several" in warning for warning in job.report["warnings"])


def test_a_python_without_gradwatch(new_job):
    """As in another environment: the entry point's metadata cannot be seen."""
    code = (
        "import importlib.metadata as m; real = m.entry_points; "
        "m.entry_points = lambda **k: [] if k.get('group') == 'torch.backends' else real(**k); "
        f"import runpy; runpy.run_path({str(SCRIPTS / 'alone.py')!r})"
    )
    job = new_job([sys.executable, "-c", code])
    result = job.finish()
    assert result.returncode == 0
    assert any("gradwatch is not installed in the Python that runs it" in line for line in result.ours)
