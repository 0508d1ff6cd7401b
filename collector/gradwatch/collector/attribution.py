"""Who was first: from an incident's evidence and the ranks' watermarks to a verdict. Pure.

"First" is decided by logical time, never by clocks. A rank is called clean only when all
of its first round has been looked at, and nothing of that was lost.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from gradwatch.collector import other_causes, sentences
from gradwatch.collector.evidence import (
    first_step,
    is_local,
    is_of_weights,
    made_weights_bad,
    position,
    suspects,
)
from gradwatch.collector.likely import Case, likely
from gradwatch.collector.model import Cause, Kind, UnknownReason, Verdict, WhichModel
from gradwatch.collector.observations import Phase
from gradwatch.collector.replays import judge, operator_of, own, recurrence
from gradwatch.collector.words import STEPS, is_part

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from gradwatch.collector.model import Evidence, KnownModel, Own, RankState, Sighting
    from gradwatch.collector.observations import Flight

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


def attribute(
    evidence: Evidence,
    clean: Sequence[int],
    unknown: Mapping[int, UnknownReason],
    models: Sequence[KnownModel] = (),
) -> Verdict:
    """Name the origins, the clean and the unknown.

    Args:
        evidence: the incident's.
        clean: ranks that were clean in its first round, in order.
        unknown: ranks of which that is not known, and why. Origins are in neither.
        models: that the attempt trains.
    """
    if is_of_weights(evidence):
        return _of_weights(evidence, clean, unknown, models)
    if not is_local(evidence):
        return _of_reduction(evidence, clean, unknown)
    kinds = {one.kind for one in evidence.earliest.values() if one.round == evidence.first_round}
    if Kind.GRADIENT in kinds:
        return _of_gradients(evidence, clean, unknown, models)
    if Kind.OVERFLOW in kinds:
        return _of_overflow(evidence, clean, unknown)
    return _of_replicas(evidence, clean, unknown)


def is_waiting(verdict: Verdict) -> bool:
    """Whether some rank may still be heard of."""
    return UnknownReason.WAITING in verdict.unknown_ranks.values()


def _of_weights(
    evidence: Evidence,
    clean: Sequence[int],
    unknown: Mapping[int, UnknownReason],
    models: Sequence[KnownModel],
) -> Verdict:
    """Weights were bad first: an update had made them so, or they were found so."""
    seen = [_told(evidence, one, models) for one in suspects(evidence).values()]
    # An update that is known is the reason of what others only found.
    in_order = sorted(seen, key=lambda one: (one.kind is not Kind.UPDATE, *position(one), one.rank))
    origins = _group_of_first(in_order)
    first = origins[0]
    # Of the step before which they were found bad: its round is a later one.
    arrived = evidence.earliest.get(first.rank) or evidence.later.get(first.rank)
    if first.gradient is None and arrived is not None and arrived.step == first.step:
        first = replace(first, gradient=arrived.gradient)
        origins = (first, *origins[1:])
    cause = Cause.UPDATE if first.kind is Kind.UPDATE else Cause.PARAMETER
    all_at_once = len(origins) > 1 and not (clean or unknown)
    guesses = likely(
        Case(
            cause=cause,
            first=first,
            all_at_once=all_at_once,
            single=_is_single(origins, clean, unknown),
            judgement=None,
            flight=_flight_of(evidence, first),
            tie=len(origins) > 1,
        )
    )
    named = {one.rank for one in origins}
    others = evidence.contaminated.union(evidence.earliest, evidence.weights, evidence.later) - named
    contaminated = tuple(sorted(others))
    return Verdict(
        cause=cause,
        first=first,
        origins=origins,
        tie=len(origins) > 1,
        clean_ranks=tuple(clean),
        unknown_ranks=unknown,
        contaminated_ranks=contaminated,
        sentences=(
            *other_causes.explain_weights(
                origins,
                clean,
                unknown,
                contaminated,
                guesses,
                made_bad=made_weights_bad(evidence, first),
            ),
            *sentences.tell_skips(evidence),
        ),
        likely=guesses,
    )


def _of_gradients(
    evidence: Evidence,
    clean: Sequence[int],
    unknown: Mapping[int, UnknownReason],
    models: Sequence[KnownModel],
) -> Verdict:
    """Some rank's own gradients were bad first."""
    bad = [one for one in evidence.earliest.values() if one.kind is Kind.GRADIENT]
    made = [one for one in bad if (one.rank, one.round) not in evidence.received]
    if not any(one.round == evidence.first_round for one in made):
        # Whoever was first has said that it got it from another: of whom is not known.
        made = bad
    received = sorted({one.rank for one in bad} - {one.rank for one in made})
    origins = _group_of_first(_in_order([_told(evidence, one, models) for one in made]))
    first = origins[0]
    judged = judge(evidence.replayed, evidence.rehearsed, first)
    cause = cause_of(first.phase)
    tie = len(origins) > 1 and position(origins[1]) == position(first)
    same_round = all(one.round == evidence.first_round for one in origins)
    guesses = likely(
        Case(
            cause=cause,
            first=first,
            all_at_once=len(origins) > 1 and same_round and not (clean or unknown or received),
            single=_is_single(origins, clean, unknown) and not received,
            judgement=judged.judgement,
            flight=_flight_of(evidence, first),
            tie=tie,
            finite_on=judged.finite_on,
            by_clean_pass=judged.by_clean_pass,
        )
    )
    # Weights that are bad afterwards are so by the update.
    named = {one.rank for one in origins}
    contaminated = tuple(sorted((evidence.contaminated | evidence.weights.keys()) - named - {*received}))
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
            *sentences.tell_again(first, _again(evidence, first)),
            *sentences.tell_doubts(first, judged.doubts),
            *sentences.tell_skips(evidence),
        ),
        judgement=judged.judgement,
        likely=guesses,
        doubts=judged.doubts,
    )


def _is_single(
    origins: Sequence[Sighting], clean: Sequence[int], unknown: Mapping[int, UnknownReason]
) -> bool:
    return len(origins) == 1 and not (clean or unknown)


def _flight_of(evidence: Evidence, first: Sighting) -> Flight | None:
    return next((flown.flight for flown in evidence.flown if flown.rank == first.rank), None)


def _again(evidence: Evidence, first: Sighting) -> tuple[Own, ...]:
    """Later rounds in which the first rank was bad by itself again."""
    rounds: dict[int, Own] = {}
    for one in evidence.own:
        itself = one.given or (one.root == first.root and one.model_step != first.model_step)
        if one.rank == first.rank and one.round > first.round and itself:
            rounds.setdefault(one.round, one)
    return tuple(rounds.values())[: STEPS + 1]


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
        contaminated_ranks=tuple(sorted(evidence.contaminated.union(added, evidence.weights))),
        sentences=(
            *other_causes.explain_reduction(evidence, clean, unknown, later),
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
            *other_causes.explain_overflow(
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
        sentences=other_causes.explain_replicas(origins, [*clean, *unknown]),
    )


def _in_order(sightings: Iterable[Sighting]) -> tuple[Sighting, ...]:
    return tuple(sorted(sightings, key=_place))


def _group_of_first(origins: Sequence[Sighting]) -> tuple[Sighting, ...]:
    """The origins with the process group of the first only: a group may list thousands of ranks."""
    first, *others = origins
    return (first, *(replace(one, group=()) for one in others))


def _place(sighting: Sighting) -> tuple[float, ...]:
    """Its place among the origins: what may have come from another rank comes after what began on a rank."""
    sent = sighting.phase is Phase.INPUT and is_part(sighting)
    round_, *rest = position(sighting)
    return (round_, sent, *rest, sighting.rank)


def _told(evidence: Evidence, sighting: Sighting, models: Sequence[KnownModel]) -> Sighting:
    """The sighting with what its replay told, and the model it is of."""
    own_models = [one for one in models if one.is_of(sighting.rank)]
    roots = sorted({one.root for one in own_models if one.module_class})
    known = next((one for one in own_models if one.root == sighting.root), None)
    if known is not None:
        which = None
        if known.root in roots and len(roots) > 1:
            which = WhichModel(known.root, known.module_class, roots.index(known.root))
        sighting = replace(sighting, model=which, group=known.group)
    elif any(one.root == sighting.root and one.group for one in models):
        sighting = replace(sighting, group_unknown=True)
    autopsy = own(evidence.replayed, sighting)
    if autopsy is None:
        return sighting
    phase = autopsy.phase if sighting.phase is None else sighting.phase
    again = recurrence(evidence.replayed, sighting) if autopsy.source is None else None
    return replace(sighting, phase=phase, operator=operator_of(autopsy, again))
