"""The references of the docs are what the code says."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gradwatch.collector.metrics import catalogue
from scripts.reference.metrics import uses
from tests.ranks import REPOSITORY

USES = uses()


def test_the_references_are_up_to_date():
    command = [sys.executable, "-m", "scripts.reference", "--check"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("metric", catalogue.ALL, ids=lambda metric: metric.name)
def test_each_metric_is_in_an_alert_or_a_dashboard_or_says_why_not(metric):
    used = USES[metric.name]
    # One or the other: a reason that no longer holds is to go.
    assert bool(used.alerts or used.dashboards) != bool(metric.unwatched), used
