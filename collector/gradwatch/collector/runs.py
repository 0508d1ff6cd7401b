"""A job's runs and launches. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from gradwatch.collector.model import CommandState, Launch
from gradwatch.collector.observations import CommandStarted, CommandStopped

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gradwatch.collector.draft import Draft
    from gradwatch.collector.model import Attempt, AttemptId, JobState, Journal
    from gradwatch.collector.observations import LaunchEnded, LaunchStarted

# `ended_by` of a launcher that was killed before it could say how its command ended.
LOST = "lost"


def start_launch(draft: Draft, started: LaunchStarted) -> None:
    """A launcher began; if all others have ended, this is the job's next run.

    A node runs a job once at a time: another launch there that did not say how it ended was killed. A
    framework's controller runs beside the launcher that started it.
    """
    job = draft.job(started.job, started.generation)
    obeys = started.policy_hash is not None
    if job.launches and launches_ended(job):
        job = replace(
            job, run=job.run + 1, launches={}, unwatched=(), current=None, dropped_earlier=job.dropped
        )
        if not obeys:
            # Nobody tells it a generation: it begins anew.
            job = replace(job, generation=started.generation)
    launch = job.launches.get(started.launch) or Launch(
        id=started.launch,
        generation=started.generation,
        node=started.node,
        pid=started.pid,
        started_at=draft.now,
        command=CommandState.WAITING if obeys else CommandState.RUNNING,
        policy_hash=started.policy_hash,
        whole_job=started.whole_job,
    )
    launches = {
        id_: replace(other, ended_at=draft.now, ended_by=LOST, command=CommandState.ENDED)
        if obeys
        and other.obeys
        and other.node == launch.node
        and other.whole_job == launch.whole_job
        and other.ended_at is None
        else other
        for id_, other in job.launches.items()
    }
    draft.jobs[job.name] = replace(
        job,
        generation=max(job.generation, started.generation),
        launches={**launches, launch.id: launch},
    )


def see_command(draft: Draft, body: CommandStarted | CommandStopped) -> None:
    """A launcher's command was started, or does not run any more."""
    job = draft.job(body.job, body.generation)
    launch = job.launches.get(body.launch)
    if launch is None or launch.ended_at is not None:
        return
    if isinstance(body, CommandStarted):
        unasked = launch.whole_job and body.generation > launch.generation and not launch.stopped_for
        launch = replace(
            launch,
            by_itself=body.generation if unasked else launch.by_itself,
            generation=body.generation,
            command=CommandState.RUNNING,
            stopped_for=None,
            stopped_code=None,
            restarts=False,
            no_restart=body.no_restart,
        )
    else:
        launch = replace(
            launch,
            command=CommandState.STOPPED,
            stopped_for=body.order,
            stopped_code=body.exit_code,
            restarts=body.restarts,
        )
    draft.jobs[job.name] = replace(
        job,
        generation=max(job.generation, body.generation),
        launches={**job.launches, launch.id: launch},
    )


def end_launch(draft: Draft, ended: LaunchEnded) -> None:
    """A launcher has ended, after its command."""
    job = draft.job(ended.job, ended.generation)
    launch = job.launches.get(ended.launch) or Launch(
        id=ended.launch, generation=ended.generation, node=None, pid=None, started_at=None
    )
    _end(draft, job, replace(launch, exit_code=ended.exit_code, ended_by=ended.ended_by))


def lose_launch(draft: Draft, job_name: str, launch_id: str) -> bool:
    """A launcher is gone; if it did not say how its command ended, that stays unknown.

    Returns:
        Whether that is news.
    """
    job = draft.jobs[job_name]
    launch = job.launches.get(launch_id)
    if launch is None or launch.ended_at is not None:
        return False
    _end(draft, job, replace(launch, ended_by=LOST))
    return True


def keep_the_living(draft: Draft, job_name: str) -> None:
    """Let an attempt that was over before it was heard of not take the place of one that trains.

    What an earlier run could not ship is shipped by the next, beside its own.
    """
    before, job = draft.before(job_name), draft.jobs[job_name]
    if before is None or before.current is None or job.current is None or before.run != job.run:
        return
    if not _lives(draft, job.current) and _lives(draft, before.current):
        draft.jobs[job_name] = replace(job, current=before.current)


def commanding(job: JobState) -> tuple[Launch, ...]:
    """The launches that are ordered what to do: a controller of all workers, else each that has not ended."""
    living = tuple(launch for launch in job.launches.values() if launch.ended_at is None)
    return tuple(launch for launch in living if launch.whole_job) or living


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
    ended = replace(launch, ended_at=draft.now, command=CommandState.ENDED)
    launches = {**job.launches, launch.id: ended}
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
