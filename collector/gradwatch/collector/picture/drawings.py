"""Pictures as they are handed out: drawn at most once a second each, however many look."""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING, NamedTuple

from gradwatch.collector.picture.picture import picture
from gradwatch.collector.picture.timeline import Timeline
from gradwatch.collector.policy.dossier import Dossier

if TYPE_CHECKING:
    from gradwatch.collector.engine import Engine

_SECONDS = 1.0
# Jobs whose newest picture is kept.
_JOBS = 32


class Drawing(NamedTuple):
    """A picture's JSON.

    Attributes:
        etag: the same for the same JSON.
        at: monotonic seconds.
    """

    json: bytes
    etag: str
    at: float


class Drawings:
    """Of an engine's jobs.

    Args:
        engine: whose.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._drawn: dict[str, Drawing] = {}

    def of(self, job: str) -> Drawing:
        """The picture of a known job, a second old at most."""
        known = self._drawn.pop(job, None)
        if known is None or time.monotonic() - known.at >= _SECONDS:
            known = self._draw(job)
        self._drawn[job] = known
        while len(self._drawn) > _JOBS:
            del self._drawn[next(iter(self._drawn))]
        return known

    def _draw(self, job: str) -> Drawing:
        engine = self._engine
        timeline = engine.gallery.timelines.get(job) or Timeline()
        dossier = engine.dossiers.get(job, Dossier(job))
        drawn = picture(engine.state, engine.state.jobs[job], dossier, timeline)
        text = drawn.model_dump_json().encode()
        return Drawing(text, f'"{hashlib.sha256(text).hexdigest()[:32]}"', time.monotonic())
