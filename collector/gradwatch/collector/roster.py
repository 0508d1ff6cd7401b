"""The ranks of an attempt, as seen from a round: who passed it, and of whom nothing more will come. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradwatch.collector.attribution import standing
from gradwatch.collector.model import UnknownReason
from gradwatch.collector.progress import has_all_records
from gradwatch.collector.runs import launches_ended

if TYPE_CHECKING:
    from gradwatch.collector.draft import Draft
    from gradwatch.collector.model import Attempt, JobState, Journal, RankState


class Roster:
    """An attempt's ranks at one moment.

    Args:
        draft: the state and the time.
        job: the attempt's.
        attempt: whose ranks.
    """

    def __init__(self, draft: Draft, job: JobState, attempt: Attempt) -> None:
        self._journals = draft.journals
        self._now = draft.now
        self._timeout = draft.config.confirm_timeout
        self._attempt = attempt
        self._over = attempt.id != job.current
        self._launches_ended = launches_ended(job)
        running = {launch.node for launch in job.launches.values() if launch.ended_at is None}
        self._ended_nodes = {launch.node for launch in job.launches.values()} - running

    def standings(self, round_: int, since: float) -> list[UnknownReason | None]:
        """By rank, why it is not known whether it was clean in the round; None when it is.

        Args:
            round_: the round.
            since: from when on a rank that says nothing counts as silent.
        """
        ranks, journals = self._attempt.ranks, self._journals
        standings: list[UnknownReason | None] = []
        for number in range(self._attempt.world_size):
            incarnation = ranks.get(number)
            journal = None if incarnation is None else journals[incarnation]
            reason = (
                UnknownReason.WAITING
                if journal is None or journal.rank is None
                else standing(journal.rank, round_)
            )
            if reason is UnknownReason.WAITING:
                reason = self._gone(journal, since)
            standings.append(reason)
        return standings

    def _gone(self, journal: Journal | None, since: float) -> UnknownReason:
        """Why no more is to be expected of a rank; `WAITING` when it is."""
        rank = None if journal is None else journal.rank
        if journal is not None and rank is not None and _is_done(rank, journal.high_seq):
            return UnknownReason.PROCESS_ENDED
        if self._over:
            return UnknownReason.ATTEMPT_OVER
        if self._launches_ended or (rank is not None and rank.hello.node in self._ended_nodes):
            return UnknownReason.LAUNCH_ENDED
        if rank is None:
            late = self._now - since >= self._timeout
            return UnknownReason.NEVER_SEEN if late else UnknownReason.WAITING
        late = self._now - max(since, rank.heard_at) >= self._timeout
        return UnknownReason.SILENT if late else UnknownReason.WAITING


def _is_done(rank: RankState, high_seq: int) -> bool:
    """Whether the process is gone, and all that it wrote is here."""
    return rank.progress is not None and rank.progress.ended and has_all_records(rank, high_seq)
