"""The timelines of all jobs, kept up from what changes. Not for several threads at once."""

from __future__ import annotations

import json
import zlib
from typing import TYPE_CHECKING

from gradwatch.collector.observations import NonFinite, Skipped
from gradwatch.collector.picture.timeline import MAX_ROWS, Cell, Reached, Timeline, as_json, from_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gradwatch.collector.model import Changes, RankState, State


class Gallery:
    """One timeline a job.

    Attributes:
        timelines: by job.
    """

    def __init__(self) -> None:
        self.timelines: dict[str, Timeline] = {}
        self._kept: dict[str, int] = {}

    def see(self, state: State, changes: Changes, now: float) -> None:
        """Take in what has changed.

        Args:
            state: after the changes.
            changes: of the state.
            now: the collector's time.
        """
        for event in changes.events:
            body = event.body
            if not isinstance(body, (NonFinite, Skipped)) or event.attempt is None or event.rank is None:
                continue
            journal = state.journals.get(event.incarnation)
            if journal is not None and journal.rank is not None:
                self._timeline(state, journal.rank).mark(
                    (event.attempt.generation, event.attempt.number),
                    event.rank,
                    journal.rank.hello.node,
                    step=body.step,
                    cell=_cell(body),
                    now=now,
                )
        for journal in changes.journals.values():
            if journal.rank is not None and journal.rank.progress is not None:
                self._reach(state, journal.rank, now)

    def unkept(self) -> dict[str, bytes]:
        """The timelines that have changed since they were last asked for, to be stored."""
        news = {
            job: timeline
            for job, timeline in self.timelines.items()
            if self._kept.get(job) != timeline.version
        }
        self._kept.update((job, timeline.version) for job, timeline in news.items())
        return {
            job: zlib.compress(json.dumps(as_json(timeline), separators=(",", ":")).encode(), level=1)
            for job, timeline in news.items()
        }

    def hang(self, kept: Mapping[str, bytes]) -> None:
        """Bring back what was stored; what cannot be read is left out, and begins anew."""
        for job, packed in kept.items():
            try:
                self.timelines[job] = from_json(json.loads(zlib.decompress(packed)))
            except (zlib.error, ValueError, KeyError, TypeError):
                continue
            self._kept[job] = self.timelines[job].version

    def _reach(self, state: State, rank: RankState, now: float) -> None:
        progress = rank.progress
        if progress is None:
            return
        self._timeline(state, rank).reach(
            (rank.attempt.generation, rank.attempt.number),
            rank.hello.rank,
            rank.hello.node,
            Reached(progress.step, progress.round, progress.bad_rounds, progress.ended),
            magnitude=progress.magnitude,
            now=now,
        )

    def _timeline(self, state: State, rank: RankState) -> Timeline:
        job = rank.attempt.job
        if job not in self.timelines:
            world_size = state.attempts[rank.attempt].world_size
            self.timelines[job] = Timeline(ranks_per_row=-(-world_size // MAX_ROWS))
        return self.timelines[job]


def _cell(body: NonFinite | Skipped) -> Cell:
    # What a GradScaler skips is its normal work.
    skipped = isinstance(body, Skipped) or body.loss_scale_overflow
    return Cell.SKIPPED if skipped else Cell.BAD
