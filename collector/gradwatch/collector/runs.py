"""A job's runs and launches. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from gradwatch.collector.model import Launch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gradwatch.collector.draft import Draft
    from gradwatch.collector.model import Attempt, AttemptId, JobState, Journal
    from gradwatch.collector.observations import LaunchEnded, LaunchStarted

# `ended_by` of a launcher that was killed before it could say how its command ended.
LOST = "lost"


def start_launch(draft: Draft, started: LaunchStarted) -> None:
    """A launcher started its command; if all others have ended, this is the job's next run."""
    job = draft.job(started.job, started.generation)
    if job.launches and launches_ended(job):
        job = replace(
            job, run=job.run + 1, launches={}, unwatched=(), current=None, dropped_earlier=job.dropped
        )
    known = job.launches.get(started.launch)
    launch = Launch(
        id=started.launch,
        generation=started.generation,
        node=started.node,
        pid=started.pid,
        started_at=draft.now if known is None else known.started_at,
    )
    draft.jobs[job.name] = replace(
        job,
        generation=max(job.generation, started.generation),
        launches={**job.launches, launch.id: launch},
    )


def end_launch(draft: Draft, ended: LaunchEnded) -> None:
    """A launcher's command ended."""
    job = draft.job(ended.job, ended.generation)
    launch = job.launches.get(ended.launch) or Launch(
        id=ended.launch, generation=ended.generation, node=None, pid=None, started_at=None
    )
    _end(draft, job, replace(launch, exit_code=ended.exit_code, ended_by=ended.ended_by))


def lose_launch(draft: Draft, job_name: str, launch_id: str) -> None:
    """A launcher is gone; if it did not say how its command ended, that stays unknown."""
    job = draft.jobs[job_name]
    launch = job.launches.get(launch_id)
    if launch is not None and launch.ended_at is None:
        _end(draft, job, replace(launch, ended_by=LOST))


def keep_the_living(draft: Draft, job_name: str) -> None:
    """Let an attempt that was over before it was heard of not take the place of one that trains.

    What an earlier run could not ship is shipped by the next, beside its own.
    """
    before, job = draft.before(job_name), draft.jobs[job_name]
    if before is None or before.current is None or job.current is None or before.run != job.run:
        return
    if not _lives(draft, job.current) and _lives(draft, before.current):
        draft.jobs[job_name] = replace(job, current=before.current)


def launches_ended(job: JobState) -> bool:
    """Whether launches are known, and each has ended."""
    return bool(job.launches) and all(launch.ended_at is not None for launch in job.launches.values())


def is_over(job: JobState, current: Attempt | None, journals: Mapping[str, Journal]) -> bool:
    """Whether the job's run has ended: by its launches, or without any by its processes."""
    if job.launches:
        return launches_ended(job)
    if current is None or len(current.ranks) < current.world_size:
        return False
    ranks = (journals[incarnation].rank for incarnation in current.ranks.values())
    return all(rank is not None and rank.progress is not None and rank.progress.ended for rank in ranks)


def _end(draft: Draft, job: JobState, launch: Launch) -> None:
    launches = {**job.launches, launch.id: replace(launch, ended_at=draft.now)}
    before = draft.before(job.name)
    is_news = before is None or launch.id not in before.launches
    others = (other for id_, other in job.launches.items() if id_ != launch.id)
    if is_news and any(other.node == launch.node and other.ended_at is None for other in others):
        # A node runs a job once at a time: this is what an earlier run could not ship.
        del launches[launch.id]
    draft.jobs[job.name] = replace(job, launches=launches)


def _lives(draft: Draft, attempt: AttemptId) -> bool:
    ranks = (draft.journals[incarnation].rank for incarnation in draft.attempts[attempt].ranks.values())
    return any(rank is not None and (rank.progress is None or not rank.progress.ended) for rank in ranks)
