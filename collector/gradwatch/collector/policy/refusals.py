"""What is not decided, or not performed any more, because something else came first. Pure."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, NamedTuple

from gradwatch.collector.model import CloseReason
from gradwatch.collector.policy.decision import Outcome
from gradwatch.collector.policy.model import Action

if TYPE_CHECKING:
    from gradwatch.collector.model import Incident, JobState, State
    from gradwatch.collector.policy.decision import Decision
    from gradwatch.collector.policy.dossier import Dossier

_STANDS = {Outcome.PENDING, Outcome.PERFORMED}


class Silence(str, enum.Enum):
    """Why nothing is decided."""

    NOT_CONFIRMED = "not_confirmed"
    NO_MATCH = "no_match"  # so far
    MAY_YET_MATCH = "may_yet_match"  # an earlier rule
    COOLDOWN = "cooldown"
    # What follows is refused for good.
    ALREADY_DECIDED = "already_decided"
    STALE_GENERATION = "stale_generation"
    STALE_ATTEMPT = "stale_attempt"
    CONFLICT = "conflict"  # another rollback of this generation stands
    HALTED = "halted"
    JOB_ENDED = "job_ended"


class Refusal(NamedTuple):
    """Why nothing is decided, for good."""

    silence: Silence
    why: str


def refusal(job: JobState, dossier: Dossier, incident: Incident) -> Refusal | None:
    """Why nothing is to be decided about an incident; None when something may be."""
    decided = next((one for one in dossier.decisions if one.incident == incident.id), None)
    if decided is not None:
        taken = f"decision {decided.id}, to {decided.action.value}, was taken"
        return Refusal(Silence.ALREADY_DECIDED, taken)
    return _stale(job, incident) or _conflict(job, dossier) or _too_late(incident)


def refusal_to_perform(state: State, dossier: Dossier, decision: Decision) -> str | None:
    """Why a pending decision is not to be performed any more; None when it is."""
    job = state.jobs[dossier.job]
    if decision.outcome is not Outcome.PENDING:
        return f"decision {decision.id} is {decision.outcome.value}, and is performed at most once"
    if decision.generation != job.generation or decision.run != job.run:
        return (
            f"decision {decision.id} is about generation {decision.generation} of run {decision.run}; "
            f"the job is in generation {job.generation} of run {job.run} by now"
        )
    standing = _standing(job, dossier)
    if standing is not None and standing.id != decision.id:
        return f"decision {standing.id}, to {standing.action.value}, came first"
    return None


def _stale(job: JobState, incident: Incident) -> Refusal | None:
    attempt = incident.attempt
    if attempt.generation < job.generation:
        why = (
            f"it is of generation {attempt.generation}, and the job is in generation {job.generation} by now"
        )
        return Refusal(Silence.STALE_GENERATION, why)
    if attempt != job.current:
        why = "another attempt trains by now; if it is poisoned too, it will show"
        return Refusal(Silence.STALE_ATTEMPT, why)
    return None


def _conflict(job: JobState, dossier: Dossier) -> Refusal | None:
    standing = _standing(job, dossier)
    if standing is None:
        return None
    if standing.action is Action.HALT:
        return Refusal(Silence.HALTED, f"decision {standing.id} stops the job")
    why = f"decision {standing.id} rolls generation {standing.generation} back already"
    return Refusal(Silence.CONFLICT, why)


def _too_late(incident: Incident) -> Refusal | None:
    if incident.close_reason is CloseReason.JOB_ENDED:
        return Refusal(Silence.JOB_ENDED, "the job has ended")
    return None


def _standing(job: JobState, dossier: Dossier) -> Decision | None:
    """The first decision that stops the job's present generation, or would, if there is one."""
    for one in dossier.decisions:
        if one.run != job.run:
            continue
        if one.action is Action.HALT and one.outcome in {*_STANDS, Outcome.DRY_RUN}:
            return one
        if one.action is Action.ROLLBACK and one.outcome in _STANDS and one.generation == job.generation:
            return one
    return None
