"""Who is who: which attempt a rank's hello belongs to, and which hellos are refused. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from gradwatch.collector.model import Attempt, AttemptId, RankState
from gradwatch.collector.observations import DropReason

if TYPE_CHECKING:
    from gradwatch.collector.draft import Draft
    from gradwatch.collector.model import JobState, Journal
    from gradwatch.collector.observations import Hello


def admit(draft: Draft, journal: Journal, hello: Hello) -> tuple[Journal, DropReason | None]:
    """Give the process that says hello its place, or refuse it.

    The journal of a refused one is remembered, so that its later records are refused for the same reason.
    """
    if journal.rank is not None:
        return journal, DropReason.REPEATED_HELLO
    job = draft.job(hello.job, hello.generation)
    # Known from here on, so that what is refused is counted for it.
    draft.jobs[job.name] = job
    journal = replace(journal, job=job.name, run=job.run)
    place = _refusal(job, hello) or _place(draft, job, hello)
    if isinstance(place, DropReason):
        return replace(journal, refused=place), place
    if place.id not in job.attempts:
        job = replace(
            job,
            generation=max(job.generation, hello.generation),
            attempts=(*job.attempts, place.id),
            current=place.id,
        )
        draft.jobs[job.name] = job
    draft.attempts[place.id] = replace(place, ranks={**place.ranks, hello.rank: journal.incarnation})
    rank = RankState(hello=hello, attempt=place.id, heard_at=draft.now)
    return replace(journal, refused=None, rank=rank), None


def _refusal(job: JobState, hello: Hello) -> DropReason | None:
    """Why the hello counts in no attempt at all."""
    if hello.duplicate_claim:
        return DropReason.DUPLICATE_RANK
    if hello.rank >= hello.world_size:
        return DropReason.WRONG_WORLD_SIZE
    return DropReason.STALE_GENERATION if hello.generation < job.generation else None


def _place(draft: Draft, job: JobState, hello: Hello) -> Attempt | DropReason:
    """The attempt for the hello, new if need be; or why there is none."""
    attempt = _candidate(draft, job, hello)
    if attempt is None:
        return _next(job, hello)
    holder = attempt.ranks.get(hello.rank)
    if holder is not None:
        if hello.attempt_key is not None and not _is_over(draft, holder):
            return DropReason.DUPLICATE_RANK
        return _next(job, hello)
    if hello.world_size != attempt.world_size:
        return DropReason.WRONG_WORLD_SIZE
    return attempt


def _candidate(draft: Draft, job: JobState, hello: Hello) -> Attempt | None:
    """The attempt with the hello's key; without one, the attempt that trains now."""
    attempts = [draft.attempts[id_] for id_ in job.attempts if id_.generation == hello.generation]
    if hello.attempt_key is None:
        return next((attempt for attempt in attempts if attempt.id == job.current), None)
    keyed = [attempt for attempt in attempts if attempt.key == hello.attempt_key]
    return keyed[-1] if keyed else None


def _next(job: JobState, hello: Hello) -> Attempt:
    number = sum(attempt.generation == hello.generation for attempt in job.attempts)
    return Attempt(
        id=AttemptId(job.name, hello.generation, number),
        run=job.run,
        key=hello.attempt_key,
        world_size=hello.world_size,
    )


def _is_over(draft: Draft, incarnation: str) -> bool:
    rank = draft.journals[incarnation].rank
    return rank is not None and rank.progress is not None and rank.progress.ended
