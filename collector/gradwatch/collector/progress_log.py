"""Which progress the log of events keeps: what it takes to come to the same incidents again. Pure.

A healthy run has none of it in its log. With an incident that opens comes one row for each rank, how
far it had come (two for a rank that lost something, or whose records are late). While it is open follow

- of each rank each step ahead until it is 10 rounds past the bad ones, of which at most 64 count:
  about 10 rows, and at most 75; of a rank that is then still waited for, what it reports
  within the confirm timeout;
- of each rank, its end;
- a row at the time at which it is confirmed, and one when it is closed;
- of bad rounds that were only counted, the first 64, and then one row for each 64th more of them.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import TYPE_CHECKING

from gradwatch.collector.evidence import CLEAN_ROUNDS
from gradwatch.collector.model import Event, Status
from gradwatch.collector.progress import has_lost
from gradwatch.collector.settle import following

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gradwatch.collector.draft import Draft
    from gradwatch.collector.model import Attempt, AttemptId, Evidence, Incident, Journal, RankState
    from gradwatch.collector.observations import Progress

# Bad rounds of which each is logged; then so many rows for each time that their number grows e-fold.
_FINE = 64


def log_progress(draft: Draft) -> None:
    """Add to the draft's events how far ranks have come; ask when all else has been folded in."""
    touched = draft.attempts.maps[0].keys() | {rank.attempt for rank in draft.progressed.values()}
    touched |= {incident.attempt for incident in draft.incidents.maps[0].values()}
    for attempt_id in sorted(touched):
        for rank, progress in [*_rows(draft, attempt_id)]:
            attempt = draft.attempts[attempt_id]
            incarnation = attempt.ranks[rank]
            # Records count up from 0, so these count down from -1.
            number = attempt.progress_logged + 1
            draft.attempts[attempt_id] = replace(attempt, progress_logged=number)
            draft.events.append(_event(draft, draft.journals[incarnation], progress, -number))


def log_end(draft: Draft, journal: Journal, progress: Progress) -> None:
    """Add that a launcher is gone that did not say how its command ended."""
    draft.events.append(_event(draft, journal, progress, -1))


def _rows(draft: Draft, attempt_id: AttemptId) -> Iterator[tuple[int, Progress]]:
    before, attempt = draft.state.attempts.get(attempt_id), draft.attempts[attempt_id]
    known = () if before is None else before.incidents
    opened = [draft.incidents[id_] for id_ in attempt.incidents[len(known) :]]
    if opened:
        yield from _all_ranks(draft, attempt, min(one.evidence.first_round for one in opened))
    elif before is not None:
        yield from _moved_ranks(draft, before, attempt)
    elif _is_gone(draft, attempt):
        # It was over before it was heard of: who trains now depends on who lives.
        yield from _all_ranks(draft, attempt, 0)


def _all_ranks(draft: Draft, attempt: Attempt, from_round: int) -> Iterator[tuple[int, Progress]]:
    """How far each rank has come.

    Args:
        draft: the state and the report.
        attempt: the ranks'.
        from_round: rounds from here on matter.
    """
    for number, incarnation in sorted(attempt.ranks.items()):
        rank = draft.journals[incarnation].rank
        if rank is not None:
            yield from ((number, progress) for progress in _of_rank(rank, from_round))


def _of_rank(rank: RankState, from_round: int) -> Iterator[Progress]:
    """How far a rank has come, for those who were told nothing of it lately."""
    if rank.relied is not None:
        if has_lost(rank.relied):
            yield _before_losses(rank, rank.relied, from_round)
        yield rank.relied
    if rank.progress is not None and rank.progress != rank.relied:
        yield rank.progress


def _before_losses(rank: RankState, relied: Progress, from_round: int) -> Progress:
    """What to tell first, so that something counts as lost in those rounds only in which it was."""
    gap = next((gap for gap in rank.gaps if gap[1] >= from_round), None)
    bare = replace(relied, reduced_round=0, last_bad_round=None, bad_rounds=0, journal_records=0, ended=False)
    if gap is not None:
        return replace(bare, round=gap[0], dropped={}, malformed_lines=0)
    return replace(bare, round=max(0, min(from_round, relied.round) - 1))


def _moved_ranks(draft: Draft, before: Attempt, attempt: Attempt) -> Iterator[tuple[int, Progress]]:
    """Those ranks of which something matters that this report said."""
    newest = draft.incidents[attempt.incidents[-1]] if attempt.incidents else None
    known = None if newest is None else draft.state.incidents.get(newest.id)
    was_open = known is not None and known.status is not Status.CLOSED
    moved = newest is not None and any(move.incident == newest.id for move in draft.moves)
    if moved and not draft.progressed:
        # Time alone may have done it: the row says when.
        yield from itertools.islice(_all_ranks(draft, attempt, 0), 1)
    waited_for = _waited_for(attempt, newest) if newest is not None and was_open else -1
    runs_on = was_open and _runs_on(known, newest)
    cleared = _cleared(draft, attempt.id)
    for incarnation, was in draft.progressed.items():
        rank = draft.journals[incarnation].rank
        progress = None if rank is None else rank.progress
        if rank is None or rank.attempt != attempt.id or progress is None or progress == was.progress:
            continue
        ends = progress.ended and not (was.progress is not None and was.progress.ended)
        stretches = runs_on and rank.bad_rounds_unlisted > was.bad_rounds_unlisted
        matters = was_open and (moved or ends or was.watermark <= waited_for or stretches)
        if matters or rank.hello.rank in cleared:
            runs_on = runs_on and not stretches
            yield rank.hello.rank, progress
        elif not was_open and _cleans(before, attempt, progress):
            told = _of_rank(rank, attempt.skips[-1].first_round)
            yield from ((rank.hello.rank, one) for one in told)


def _cleared(draft: Draft, attempt: AttemptId) -> set[int]:
    """The ranks of which more is known by now than an incident knew, or why it does not know it."""
    cleared: set[int] = set()
    for id_, incident in draft.incidents.maps[0].items():
        before = draft.state.incidents.get(id_)
        if incident.attempt == attempt and before is not None:
            now = incident.verdict.unknown_ranks
            unknown = before.verdict.unknown_ranks.items()
            cleared.update(rank for rank, reason in unknown if now.get(rank) != reason)
    return cleared


def _waited_for(attempt: Attempt, incident: Incident) -> int:
    """The last of the rounds that all ranks are, or may be, waited for to pass."""
    evidence = incident.evidence
    # Who falls silent that near to it may be waited for, should there be more bad rounds.
    soon = min(evidence.last_round, evidence.first_round + _FINE) + CLEAN_ROUNDS
    beyond = following(attempt, evidence)
    if beyond is None:
        return soon
    return max(soon, min(evidence.last_round + CLEAN_ROUNDS, beyond - 1))


def _cleans(before: Attempt, attempt: Attempt, progress: Progress) -> bool:
    """Whether it is the first to tell of a clean round after skips that no incident came of."""
    if not attempt.skips:
        return False
    last_bad = max(attempt.skips[-1].last_round, attempt.last_bad_round or 0)
    return before.reduced_round <= last_bad + 1 < progress.reduced_round


def _runs_on(known: Incident | None, now: Incident | None) -> bool:
    """Whether bad rounds that were only counted are many more by now."""
    if known is None or now is None:
        return False
    return _level(known.evidence) < _level(now.evidence)


def _level(evidence: Evidence) -> int:
    rounds = evidence.last_round - evidence.first_round
    return rounds if rounds < _FINE else int(_FINE * (1 + math.log(rounds / _FINE)))


def _is_gone(draft: Draft, attempt: Attempt) -> bool:
    """Whether all ranks of a new attempt have ended, of a job that had another before it."""
    job = draft.before(attempt.id.job)
    if job is None or job.current is None:
        return False
    ranks = (draft.journals[incarnation].rank for incarnation in attempt.ranks.values())
    return all(rank is not None and rank.progress is not None and rank.progress.ended for rank in ranks)


def _event(draft: Draft, journal: Journal, progress: Progress, seq: int) -> Event:
    rank = journal.rank
    if rank is not None and rank.relied == progress:
        # All that it speaks of has arrived; of that the log does not have each checksum.
        records = min(progress.journal_records, journal.logged_seq + 1)
        progress = replace(progress, journal_records=records)
    return Event(
        job=journal.job or "",
        attempt=None if rank is None else rank.attempt,
        rank=None if rank is None else rank.hello.rank,
        incarnation=journal.incarnation,
        seq=seq,
        at=None,
        received_at=draft.now,
        body=progress,
    )
