"""The incident's state machine: all of it is the table below. Pure.

Late records may revise a verdict in any state; they never bring an incident back.
"""

from __future__ import annotations

import enum
import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

from gradwatch.collector.errors import IllegalTransitionError
from gradwatch.collector.model import CloseReason, Incident, Status

if TYPE_CHECKING:
    from gradwatch.collector.model import Attempt, Evidence, Verdict


class Step(enum.Enum):
    """What can happen to an incident."""

    OPEN = "open"
    REVISE = "revise"
    CONFIRM = "confirm"
    CLOSE = "close"


TRANSITIONS: dict[tuple[Status | None, Step], Status] = {
    (None, Step.OPEN): Status.SUSPECTED,
    (Status.SUSPECTED, Step.REVISE): Status.SUSPECTED,
    (Status.SUSPECTED, Step.CONFIRM): Status.CONFIRMED,
    (Status.CONFIRMED, Step.REVISE): Status.CONFIRMED,
    (Status.CONFIRMED, Step.CLOSE): Status.CLOSED,
    (Status.CLOSED, Step.REVISE): Status.CLOSED,
}


def next_status(status: Status | None, step: Step) -> Status:
    """Look the step up.

    Raises:
        IllegalTransitionError: the table has no such step.
    """
    try:
        return TRANSITIONS[status, step]
    except KeyError:
        state = "no incident" if status is None else f"a {status.value} incident"
        raise IllegalTransitionError(f"cannot {step.value} {state}") from None


def incident_id(attempt: Attempt) -> str:
    """The id of the attempt's next incident; the same whenever it is asked for."""
    place = "\0".join(
        [
            attempt.id.job,
            str(attempt.id.generation),
            str(attempt.id.number),
            attempt.key or "",
            str(len(attempt.incidents)),
        ]
    )
    return hashlib.sha256(place.encode()).hexdigest()[:12]


def open_incident(attempt: Attempt, evidence: Evidence, verdict: Verdict, now: float) -> Incident:
    """Open the attempt's next incident."""
    return Incident(
        id=incident_id(attempt),
        attempt=attempt.id,
        run=attempt.run,
        status=next_status(None, Step.OPEN),
        evidence=evidence,
        verdict=verdict,
        opened_at=now,
    )


def revise(incident: Incident, evidence: Evidence, verdict: Verdict) -> Incident:
    """Take in what has become known since."""
    status = next_status(incident.status, Step.REVISE)
    return replace(incident, status=status, evidence=evidence, verdict=verdict)


def confirm(incident: Incident, now: float) -> Incident:
    """Nothing more is waited for."""
    status = next_status(incident.status, Step.CONFIRM)
    return replace(incident, status=status, confirmed_at=now)


def close(incident: Incident, reason: CloseReason, now: float) -> Incident:
    """It is over."""
    status = next_status(incident.status, Step.CLOSE)
    return replace(incident, status=status, closed_at=now, close_reason=reason)
