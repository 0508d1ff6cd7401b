"""Which incidents somebody is to be told of, and what an answer means. Pure."""

from __future__ import annotations

import enum
from http import HTTPStatus
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

    from gradwatch.collector.model import Incident, State

# An older one is no news: neither to a webhook that is new, nor to one that was away for long.
NEWS_SECONDS = 3600.0


class Outcome(str, enum.Enum):
    """What has become of a notification."""

    SENT = "sent"
    REFUSED = "refused"  # the receiver says that it will never take it
    GIVEN_UP = "given_up"  # nobody took it while it was news


def due(state: State, told: Collection[str], now: float) -> list[Incident]:
    """The confirmed incidents that nobody was told of, the oldest first.

    Args:
        state: the collector's.
        told: ids of those that are done with, one way or the other.
        now: seconds since the epoch.
    """
    news = [
        incident
        for incident in state.incidents.values()
        if incident.id not in told
        and incident.confirmed_at is not None
        and now - incident.confirmed_at < NEWS_SECONDS
    ]
    return sorted(news, key=lambda incident: (incident.confirmed_at or 0.0, incident.id))


def is_final(status: int) -> bool:
    """Whether an answer other than success will be the same next time."""
    passing = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS}
    return HTTPStatus.BAD_REQUEST <= status < HTTPStatus.INTERNAL_SERVER_ERROR and status not in passing
