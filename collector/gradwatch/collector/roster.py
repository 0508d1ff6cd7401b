"""The ranks of an attempt, as seen from a round: who passed it, and of whom nothing more will come. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradwatch.collector.attribution import standing
from gradwatch.collector.evidence import suspects
from gradwatch.collector.model import UnknownReason
from gradwatch.collector.progress import has_all_records
from gradwatch.collector.runs import launches_ended

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gradwatch.collector.draft import Draft
    from gradwatch.collector.model import Attempt, Evidence, JobState, Journal, RankState


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
        self._over = attempt.id != job.current or is_rolled_back(job, attempt)
        self._launches_ended = launches_ended(job)
        running = {launch.node for launch in job.launches.values() if launch.ended_at is None}
        self._ended_nodes = {launch.node for launch in job.launches.values()} - running

    def standing(self, rank: int, round_: int, since: float) -> UnknownReason | None:
        """Why it is not known whether a rank was clean in a round; None when it is.

        Args:
            rank: of the attempt's world.
            round_: the round.
            since: from when on a rank that says nothing counts as silent.
        """
        incarnation = self._attempt.ranks.get(rank)
        journal = None if incarnation is None else self._journals[incarnation]
        if journal is not None and journal.rank is not None:
            reason = standing(journal.rank, round_)
            if reason is not UnknownReason.WAITING:
                return reason
        return self._gone(journal, since)

    def is_waited_for(self, ranks: Iterable[int], round_: int, since: float) -> bool:
        """Whether one of these ranks may still be heard of; the other arguments as for `standing`."""
        return any(self.standing(rank, round_, since) is UnknownReason.WAITING for rank in ranks)

    def sorted_out(
        self, evidence: Evidence, since: float
    ) -> tuple[tuple[int, ...], dict[int, UnknownReason]]:
        """The ranks that were clean in the evidence's first round, and those of which it is not known.

        An origin is in neither: it is known to be bad, however far it came.
        """
        clean: list[int] = []
        unknown: dict[int, UnknownReason] = {}
        bad = suspects(evidence)
        for rank in range(self._attempt.world_size):
            if rank in bad:
                continue
            reason = self.standing(rank, evidence.first_round, since)
            if reason is None:
                clean.append(rank)
            else:
                unknown[rank] = reason
        return tuple(clean), unknown

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


def is_rolled_back(job: JobState, attempt: Attempt) -> bool:
    """Whether the job's present run has left the attempt's generation behind."""
    return attempt.run == job.run and attempt.id.generation < job.generation


def _is_done(rank: RankState, high_seq: int) -> bool:
    """Whether the process is gone, and all that it wrote is here."""
    return rank.progress is not None and rank.progress.ended and has_all_records(rank, high_seq)
