"""Who was first: from an incident's evidence and the ranks' watermarks to a verdict. Pure.

"First" is decided by logical time, never by clocks. A rank is called clean only when all
of its first round has been looked at, and nothing of that was lost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradwatch.collector.evidence import position
from gradwatch.collector.model import Cause, UnknownReason, Verdict
from gradwatch.collector.observations import Phase
from gradwatch.collector.sentences import explain, tell_skips

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gradwatch.collector.model import Evidence, RankState

_CAUSE_OF_PHASE = {
    Phase.INPUT: Cause.INPUT,
    Phase.PARAMETER: Cause.PARAMETER,
    Phase.FORWARD: Cause.FORWARD,
    Phase.LOSS: Cause.LOSS,
    Phase.BACKWARD: Cause.BACKWARD,
}


def standing(rank: RankState, round_: int) -> UnknownReason | None:
    """Why it is not known whether the rank was clean in a round; None when it is known."""
    if rank.watermark <= round_:
        return UnknownReason.WAITING
    if any(first <= round_ <= last for first, last in rank.gaps):
        return UnknownReason.RECORDS_LOST
    return None


def cause_of(phase: Phase | None) -> Cause | None:
    """What a rank's phase says about the job's cause; None while the phase is not known."""
    return None if phase is None else _CAUSE_OF_PHASE[phase]


def attribute(evidence: Evidence, clean: Sequence[int], unknown: Mapping[int, UnknownReason]) -> Verdict:
    """Name the origins, the clean and the unknown.

    Args:
        evidence: the incident's.
        clean: ranks that were clean in its first round, in order.
        unknown: ranks of which that is not known, and why. Origins are in neither.
    """
    origins = sorted(evidence.earliest.values(), key=lambda sighting: (*position(sighting), sighting.rank))
    first = origins[0]
    tie = len(origins) > 1 and position(origins[1]) == position(first)
    contaminated = tuple(sorted(evidence.contaminated))
    return Verdict(
        cause=cause_of(first.phase),
        first=first,
        origins=tuple(origins),
        tie=tie,
        clean_ranks=tuple(clean),
        unknown_ranks=unknown,
        contaminated_ranks=contaminated,
        sentences=(*explain(origins, tie, clean, unknown, contaminated), *tell_skips(evidence)),
    )


def is_waiting(verdict: Verdict) -> bool:
    """Whether some rank may still be heard of."""
    return UnknownReason.WAITING in verdict.unknown_ranks.values()
