"""What the end-to-end tests share."""

from __future__ import annotations

import pytest

from tests.e2e.jobs import Job


@pytest.fixture
def new_job(tmp_path):
    """Starts jobs as `Job` does, and leaves none behind when the test fails."""
    jobs: list[Job] = []

    def new(command: list[object], *flags: object, **options) -> Job:
        jobs.append(Job(tmp_path, command, *flags, **options))
        return jobs[-1]

    yield new
    for job in jobs:
        job.kill()
