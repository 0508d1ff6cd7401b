"""The state while one report is folded into it: reads fall through, writes are kept apart. Pure."""

from __future__ import annotations

from collections import ChainMap, defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from gradwatch.collector.model import (
    AttemptId,
    Changes,
    Event,
    Flown,
    JobState,
    Journal,
    Move,
    Rehearsed,
    Replayed,
    Sighting,
    Skips,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gradwatch.collector.evidence import Stretch
    from gradwatch.collector.model import Attempt, FoldConfig, Incident, RankState, State
    from gradwatch.collector.observations import DropReason


@dataclass
class News:
    """What a report brought about one attempt."""

    sightings: list[Sighting] = field(default_factory=list)
    stretches: list[Stretch] = field(default_factory=list)
    skips: set[Skips] = field(default_factory=set)
    replayed: list[Replayed] = field(default_factory=list)
    flown: list[Flown] = field(default_factory=list)
    rehearsed: list[Rehearsed] = field(default_factory=list)
    models: bool = False
    ranks: set[int] = field(default_factory=set)


class Draft:
    """A state, and what one report changes of it.

    Args:
        state: is not touched.
        config: what the pure part can be told.
        now: the collector's time.

    Attributes:
        state: as it was before.
        progressed: by incarnation, the ranks whose progress arrived, as they were before.
    """

    def __init__(self, state: State, config: FoldConfig, now: float) -> None:
        self.state = state
        self.config = config
        self.now = now
        self.jobs: ChainMap[str, JobState] = _over(state.jobs)
        self.attempts: ChainMap[AttemptId, Attempt] = _over(state.attempts)
        self.journals: ChainMap[str, Journal] = _over(state.journals)
        self.incidents: ChainMap[str, Incident] = _over(state.incidents)
        self.strays: ChainMap[str, int] = _over(state.strays)
        self.parameters: ChainMap[tuple[AttemptId, int], tuple[str, ...]] = _over(state.parameters)
        self.news: defaultdict[AttemptId, News] = defaultdict(News)
        self.progressed: dict[str, RankState] = {}
        self.events: list[Event] = []
        self.moves: list[Move] = []

    def changes(self) -> Changes:
        """What is different from the state."""
        return Changes(
            jobs=self.jobs.maps[0],
            attempts=self.attempts.maps[0],
            journals=self.journals.maps[0],
            incidents=self.incidents.maps[0],
            strays=self.strays.maps[0],
            parameters=self.parameters.maps[0],
            events=tuple(self.events),
            moves=tuple(self.moves),
        )

    def touched_jobs(self) -> list[str]:
        """The jobs that something was said about."""
        return sorted(self.jobs.maps[0].keys() | {attempt.job for attempt in self.news})

    def before(self, job: str) -> JobState | None:
        """The job as it was before the report."""
        return self.state.jobs.get(job)

    def job(self, name: str, generation: int) -> JobState:
        """The job, new if nothing was heard of it before."""
        known = self.jobs.get(name)
        if known is not None:
            return known
        return JobState(name=name, generation=generation, first_seen=self.now, last_seen=self.now)

    def journal(self, incarnation: str) -> Journal:
        """The journal, new if nothing was heard of it before."""
        return self.journals.get(incarnation) or Journal(incarnation=incarnation, job=None)

    def drop(self, job: str | None, reason: DropReason) -> None:
        """Count something that is not, or not wholly, taken in."""
        known = None if job is None else self.jobs.get(job)
        if known is None:
            self.strays[reason.value] = self.strays.get(reason.value, 0) + 1
        else:
            self.jobs[known.name] = replace(known, dropped=counted(known.dropped, reason.value))


def counted(counts: Mapping[str, int], key: str) -> dict[str, int]:
    """The counts with one more of `key`."""
    return {**counts, key: counts.get(key, 0) + 1}


def _over(values: Mapping) -> ChainMap:  # type: ignore[type-arg]
    """An overlay; the mapping below is only read."""
    return ChainMap({}, values)  # type: ignore[arg-type]
