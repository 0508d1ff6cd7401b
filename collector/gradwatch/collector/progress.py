"""How far a rank has come, and how far that can be relied on. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from gradwatch.collector.evidence import Stretch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gradwatch.collector.draft import Draft
    from gradwatch.collector.model import Journal, RankState
    from gradwatch.collector.observations import Progress

# What the probe counts as dropped that cannot hide a rank's first sighting: rounds after many
# bad ones in a row, values of a later version, and the progress file itself.
_HARMLESS_DROPS = {"repeated", "unknown_enum", "progress_too_long", "progress_failed"}
# Records that were to be written and were not: `bad_rounds` tells whether one was a sighting.
_UNWRITTEN = {"journal_full", "disk_full", "write_failed"}
# Older gaps are forgotten: by then no incident is open that they could matter to.
_GAPS = 16
# Reasons and parts are few. An agent gone wild must not make of them as many time series.
_KEYS = 64


def see_progress(draft: Draft, journal: Journal, progress: Progress) -> Journal:
    """Take a progress in. An older one that arrives again changes nothing."""
    journal = replace(
        journal,
        malformed_lines=max(journal.malformed_lines, progress.malformed_lines),
        dropped=_largest(journal.dropped, progress.dropped),
        faults_counted=_largest(journal.faults_counted, progress.faults),
    )
    rank = journal.rank
    if rank is None:
        return journal
    before = rank.progress
    if before is not None:
        ended = before.ended or progress.ended
        progress = replace(max(progress, before, key=_age), ended=ended)
    moved = advance(draft, replace(rank, progress=progress, step=progress.step), journal.high_seq)
    if moved.watermark > rank.watermark:
        moved = replace(moved, heard_at=draft.now)
    if moved != rank:
        draft.news[rank.attempt].ranks.add(rank.hello.rank)
    _raise_attempt(draft, rank, progress)
    return replace(journal, rank=moved)


def advance(draft: Draft, rank: RankState, high_seq: int) -> RankState:
    """Rely on the newest progress, once the records that it speaks of have arrived."""
    progress = rank.progress
    if progress is None or progress == rank.relied or not has_all_records(rank, high_seq):
        return rank
    rank = _note_gap(rank, progress)
    rank = _note_unlisted(draft, rank, progress)
    return replace(rank, relied=progress, watermark=max(rank.watermark, progress.round))


def has_lost(progress: Progress) -> bool:
    """Whether something was not written, not read, or not looked at."""
    return _losses(progress) != (0, 0)


def has_all_records(rank: RankState, high_seq: int) -> bool:
    """Whether all that was journalled before the rank's newest progress is here."""
    progress = rank.progress
    return progress is not None and high_seq + 1 + progress.malformed_lines >= progress.journal_records


def _age(progress: Progress) -> tuple[float, ...]:
    return (progress.round, progress.reduced_round, progress.journal_records, progress.train_seconds)


def _note_gap(rank: RankState, progress: Progress) -> RankState:
    """Remember the rounds since the progress before, if something of them may be lost."""
    unwritten, unseen = _losses(progress)
    before = rank.relied
    unwritten_before, unseen_before = (0, 0) if before is None else _losses(before)
    missing = progress.bad_rounds > rank.bad_rounds_seen
    if unseen <= unseen_before and not (unwritten > unwritten_before and missing):
        return rank
    since = 0 if before is None else before.round
    return replace(rank, gaps=(*rank.gaps, (since, progress.round))[-_GAPS:])


def _losses(progress: Progress) -> tuple[int, int]:
    """Records that were not kept, and whatever else was not looked at."""
    unwritten = progress.malformed_lines + sum(progress.dropped.get(reason, 0) for reason in _UNWRITTEN)
    unseen = sum(
        count for reason, count in progress.dropped.items() if reason not in _HARMLESS_DROPS | _UNWRITTEN
    )
    return unwritten, unseen


def _note_unlisted(draft: Draft, rank: RankState, progress: Progress) -> RankState:
    """After many bad rounds in a row the probe only counts them: they follow directly on the last record."""
    more = progress.bad_rounds - rank.bad_rounds_seen - rank.bad_rounds_unlisted
    if more <= 0 or rank.last_round_seen is None or rank.bad_through is None:
        return rank
    through = max(rank.bad_through, min(rank.bad_through + more, progress.round - 1))
    draft.news[rank.attempt].stretches.append(Stretch(rank.last_round_seen, through))
    return replace(rank, bad_rounds_unlisted=rank.bad_rounds_unlisted + more, bad_through=through)


def _raise_attempt(draft: Draft, rank: RankState, progress: Progress) -> None:
    attempt = draft.attempts[rank.attempt]
    bad_rounds = [
        round_ for round_ in (attempt.last_bad_round, progress.last_bad_round) if round_ is not None
    ]
    raised = replace(
        attempt,
        reduced_round=max(attempt.reduced_round, progress.reduced_round),
        last_bad_round=max(bad_rounds, default=None),
        step=max(attempt.step, progress.step),
    )
    if raised != attempt:
        draft.attempts[rank.attempt] = raised


def _largest(one: Mapping[str, int], other: Mapping[str, int]) -> Mapping[str, int]:
    if all(one.get(key, 0) >= count for key, count in other.items()):
        return one
    keys = [*one, *(key for key in other if key not in one)][:_KEYS]
    return {key: max(one.get(key, 0), other.get(key, 0)) for key in keys}
