"""Who was first: from an incident's evidence and the ranks' watermarks to a verdict. Pure.

"First" is decided by logical time, never by clocks. A rank is called clean only when all
of its first round has been looked at, and nothing of that was lost.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from gradwatch.collector import sentences
from gradwatch.collector.evidence import first_step, is_local, position
from gradwatch.collector.likely import Case, likely
from gradwatch.collector.model import Cause, Kind, UnknownReason, Verdict
from gradwatch.collector.observations import Phase
from gradwatch.collector.replays import judge, operator_of, own

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from gradwatch.collector.model import Evidence, RankState, Sighting

# Shares in a gradient that are within this factor of the largest are named with it.
_ALIKE = 2.0

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
    if not is_local(evidence):
        return _of_reduction(evidence, clean, unknown)
    kinds = {one.kind for one in evidence.earliest.values() if one.round == evidence.first_round}
    if Kind.GRADIENT in kinds:
        return _of_gradients(evidence, clean, unknown)
    if Kind.OVERFLOW in kinds:
        return _of_overflow(evidence, clean, unknown)
    return _of_replicas(evidence, clean, unknown)


def is_waiting(verdict: Verdict) -> bool:
    """Whether some rank may still be heard of."""
    return UnknownReason.WAITING in verdict.unknown_ranks.values()


def _of_gradients(evidence: Evidence, clean: Sequence[int], unknown: Mapping[int, UnknownReason]) -> Verdict:
    """Some rank's own gradients were bad first."""
    bad = [one for one in evidence.earliest.values() if one.kind is Kind.GRADIENT]
    made = [one for one in bad if (one.rank, one.round) not in evidence.received]
    if not any(one.round == evidence.first_round for one in made):
        # Whoever was first has said that it got it from another: of whom is not known.
        made = bad
    received = sorted({one.rank for one in bad} - {one.rank for one in made})
    origins = _in_order([_told(evidence, one) for one in made])
    first = origins[0]
    judgement = judge(evidence.replayed, first)
    cause = cause_of(first.phase)
    alone = len(origins) == 1 and bool(clean or received)
    guesses = likely(
        Case(
            cause=cause,
            first=first,
            all_at_once=len(origins) > 1 and not (clean or received),
            alone=alone,
            judgement=judgement,
            flight=next((flown.flight for flown in evidence.flown if flown.rank == first.rank), None),
        )
    )
    tie = len(origins) > 1 and position(origins[1]) == position(first)
    contaminated = tuple(sorted(evidence.contaminated))
    return Verdict(
        cause=cause,
        first=first,
        origins=origins,
        tie=tie,
        clean_ranks=tuple(clean),
        unknown_ranks=unknown,
        contaminated_ranks=tuple(sorted({*contaminated, *received})),
        sentences=(
            *sentences.explain(
                origins, tie, clean, unknown, contaminated, received=received, guesses=guesses
            ),
            *sentences.tell_skips(evidence),
        ),
        judgement=judgement,
        likely=guesses,
    )


def _of_reduction(evidence: Evidence, clean: Sequence[int], unknown: Mapping[int, UnknownReason]) -> Verdict:
    """Every rank that is known of was clean, and what the reduction gave was not."""
    # Until the step is over, its gradients are added to what was reduced; later ones stand for themselves.
    step = first_step(evidence)
    added = {rank for rank, seen in evidence.earliest.items() if seen.step == step}
    later = _in_order(seen for rank, seen in evidence.earliest.items() if rank not in added)
    return Verdict(
        # A rank that is not known of may have made it.
        cause=None if unknown else Cause.REDUCTION,
        first=None,
        origins=(),
        tie=False,
        clean_ranks=tuple(clean),
        unknown_ranks=unknown,
        contaminated_ranks=tuple(sorted(evidence.contaminated | added)),
        sentences=(
            *sentences.explain_reduction(evidence, clean, unknown, later),
            *sentences.tell_skips(evidence),
        ),
    )


def _of_overflow(evidence: Evidence, clean: Sequence[int], unknown: Mapping[int, UnknownReason]) -> Verdict:
    """A finite gradient was too large for the optimizer: who had the largest share in it."""
    seen = [one for one in evidence.earliest.values() if one.kind is Kind.OVERFLOW]
    shares = {one.rank: one.overflow.own for one in seen if one.overflow and one.overflow.own is not None}
    largest = max(shares.values(), default=0.0)
    origins = tuple(
        sorted(
            (one for one in seen if shares.get(one.rank, -1.0) >= largest / _ALIKE),
            key=lambda one: (-shares[one.rank], one.rank),
        )
    )
    others = {one.rank for one in seen}.difference(one.rank for one in origins)
    first = origins[0] if origins else None
    return Verdict(
        cause=Cause.OPTIMIZER_STATE,
        first=first,
        origins=origins,
        tie=len(origins) > 1 and shares[origins[1].rank] == largest,
        clean_ranks=tuple(sorted({*clean, *others})),
        unknown_ranks=unknown,
        contaminated_ranks=tuple(sorted(evidence.contaminated)),
        sentences=(
            *sentences.explain_overflow(
                _in_order(seen)[0],
                origins,
                first_step(evidence),
                unknown,
                alone=len(seen) == 1 and not (clean or unknown),
            ),
            *sentences.tell_skips(evidence),
        ),
    )


def _of_replicas(evidence: Evidence, clean: Sequence[int], unknown: Mapping[int, UnknownReason]) -> Verdict:
    """Some rank's parameters are not those of the others."""
    origins = _in_order([one for one in evidence.earliest.values() if one.kind is Kind.REPLICA])
    return Verdict(
        cause=Cause.REPLICA_DIVERGENCE,
        first=origins[0],
        origins=origins,
        tie=len(origins) > 1,
        clean_ranks=tuple(clean),
        unknown_ranks=unknown,
        contaminated_ranks=tuple(sorted(evidence.contaminated)),
        sentences=sentences.explain_replicas(origins, [*clean, *unknown]),
    )


def _in_order(sightings: Iterable[Sighting]) -> tuple[Sighting, ...]:
    return tuple(sorted(sightings, key=lambda sighting: (*position(sighting), sighting.rank)))


def _told(evidence: Evidence, sighting: Sighting) -> Sighting:
    """The sighting with what its replay told."""
    autopsy = own(evidence.replayed, sighting)
    if autopsy is None:
        return sighting
    phase = sighting.phase
    if phase is None and autopsy.phase is not None and autopsy.operator is not None:
        phase = autopsy.phase
    return replace(sighting, phase=phase, operator=operator_of(autopsy))
