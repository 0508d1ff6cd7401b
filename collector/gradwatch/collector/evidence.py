"""Which sightings belong together, and what of them a verdict needs. Pure.

Sightings are gathered by their rounds, never by the order in which they arrived: two
that have fewer than ten rounds between them belong to one incident, unless the guard skipped
the update of the earlier one and the next update attempt was clean.

Each rank journals a sighting, the skip of its update, and the next sighting in this order, and
all ranks skip the same updates. So whatever was skipped before a known sighting is known.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from gradwatch.collector.model import Evidence, Kind, Own, Skips
from gradwatch.collector.observations import Phase, Replay

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from gradwatch.collector.model import Flown, Rehearsed, Replayed, Sighting

# An incident is over after so many rounds with finite reduced gradients.
CLEAN_ROUNDS = 10
# Of the attempt's skipped updates; evidence remembers its own. Only a rank that reports later than
# so many others could be taken for part of the wrong incident.
_SKIPS = 64

# Of a thousand ranks that go bad at once a few tell as much as all.
_REPLAYED = 64
_FLOWN = 8
_REHEARSED = 64
_OWN = 64

_OF_WEIGHTS = (Kind.UPDATE, Kind.WEIGHTS)

_PHASE_ORDER = {phase: place for place, phase in enumerate(Phase)}


class Stretch(NamedTuple):
    """Rounds that directly follow a sighting in `round` and were bad too, without records of their own."""

    round: int
    through: int


def position(sighting: Sighting) -> tuple[float, ...]:
    """A sighting's place in its attempt's logical time; what is not known comes last."""
    return (
        sighting.round,
        _known(sighting.microbatch),
        _known(None if sighting.phase is None else _PHASE_ORDER[sighting.phase]),
        _known(sighting.backward_position),
    )


def near(one: Evidence, other: Evidence) -> bool:
    """Whether both belong together: they are near in rounds, and no skipped update has ended the first."""
    before, after = sorted((one, other), key=lambda evidence: evidence.first_round)
    return _goes_on(before, after.first_round, first_step(after))


def is_over_before(evidence: Evidence, round_: int, step: int) -> bool:
    """Whether its updates were skipped to the last, and the one after them was clean.

    Args:
        evidence: of earlier rounds.
        round_: that is bad again.
        step: of that round.
    """
    skips = evidence.skips
    return (
        skips is not None
        and skips.last_step >= evidence.last_step
        and step > skips.last_step + 1
        and round_ > skips.last_round + 1
    )


def first_step(evidence: Evidence) -> int:
    """The step of its first round."""
    return min(sighting.step for sighting in _of_first_round(evidence))


def is_local(evidence: Evidence) -> bool:
    """Whether something of the ranks' own was bad in the first round, or else only the reduced gradients."""
    return is_of_weights(evidence) or any(
        sighting.round == evidence.first_round for sighting in evidence.earliest.values()
    )


def is_of_weights(evidence: Evidence) -> bool:
    """Whether it began with weights: nothing else was bad before them, or in their round.

    Bad weights after bad gradients are what the update made of those.
    """
    since = min((sighting.round for sighting in evidence.weights.values()), default=None)
    if since is None:
        return False
    reduced = [] if evidence.reduced is None else [evidence.reduced]
    return not any(
        # A replica differs by its weights.
        sighting.round < since or (sighting.round == since and sighting.kind is not Kind.REPLICA)
        for sighting in (*evidence.earliest.values(), *reduced)
        if sighting.round < since or not is_explained(sighting)
    )


def had_bad_gradients(evidence: Evidence, round_: int) -> bool:
    """Whether gradients of some rank, or what they were reduced to, were bad in a round or around it."""
    if not evidence.first_round <= round_ <= evidence.last_round:
        return False
    seen = (*evidence.earliest.values(), *evidence.later.values())
    return evidence.reduced is not None or any(one.kind is Kind.GRADIENT for one in seen)


def is_explained(sighting: Sighting) -> bool:
    """Whether bad weights explain it, if they were seen before it or in its round."""
    return sighting.kind is Kind.GRADIENT and sighting.phase is Phase.PARAMETER


def made_weights_bad(evidence: Evidence, sighting: Sighting) -> bool | None:
    """Whether the weights are bad since a sighting of weights; None when that is not known.

    An update may be skipped, or leave out the gradient that is bad.

    Args:
        evidence: the incident's.
        sighting: of bad weights, or of an update that was about to make them bad.
    """
    if sighting.kind is not Kind.UPDATE or sighting.bad_weights:
        return True
    after = [
        one.weights_finite
        for one in (*evidence.weights.values(), *evidence.earliest.values(), *evidence.later.values())
        if one.round > sighting.round and one.step > sighting.step
    ]
    # One that was skipped may have been followed by one that was not.
    if False in after:
        return True
    skips = evidence.skips
    if skips is not None and skips.first_step <= sighting.step <= skips.last_step:
        return False
    return False if True in after else None


def suspects(evidence: Evidence) -> Mapping[int, Sighting]:
    """By rank, what may be where it began; nothing if that is the reduction."""
    if is_of_weights(evidence):
        first, weights = evidence.first_round, evidence.weights
        # Where both are known of a rank, its weights tell more.
        seen = {**{rank: one for rank, one in evidence.earliest.items() if is_explained(one)}, **weights}
        return {rank: one for rank, one in seen.items() if one.round == first}
    return evidence.earliest if is_local(evidence) else {}


def stands_for_itself(later: Sighting, first: Sighting) -> bool:
    """Whether gradients of a later round are shown to be bad by themselves.

    An update makes all weights bad, and what was reduced stays in gradients that are added to.
    """
    if later.weights_finite is not True:
        return False
    if later.phase is Phase.INPUT:
        return True
    known = None not in {later.model_step, first.model_step}
    return known and later.root == first.root and later.model_step != first.model_step


def clusters(sightings: Iterable[Sighting], skips: Sequence[Skips] = ()) -> tuple[Evidence, ...]:
    """Evidence from sightings, whatever their order; what belongs together is in one.

    Args:
        sightings: of any ranks.
        skips: all that are known, in logical order.
    """
    rounds: dict[int, list[Sighting]] = {}
    for sighting in sightings:
        rounds.setdefault(sighting.round, []).append(sighting)
    return gather([_of(part) for part in rounds.values()], skips)


def merge(one: Evidence, other: Evidence) -> Evidence:
    """Evidence from both."""
    return _sorted_out(
        Evidence(
            first_round=min(one.first_round, other.first_round),
            last_round=max(one.last_round, other.last_round),
            earliest=_earliest([*one.earliest.values(), *other.earliest.values()]),
            contaminated=one.contaminated | other.contaminated,
            reduced=_first_reduced([one.reduced, other.reduced]),
            replayed=_replayed([*one.replayed, *other.replayed]),
            received=one.received | other.received,
            flown=(*one.flown, *other.flown),
            weights=_earliest([*one.weights.values(), *other.weights.values()]),
            later=_earliest([*one.later.values(), *other.later.values()]),
            own=tuple(sorted({*one.own, *other.own})[:_OWN]),
            rehearsed=_rehearsed([*one.rehearsed, *other.rehearsed]),
            last_step=max(one.last_step, other.last_step),
            skips=max(
                with_skips((), [skips for skips in (one.skips, other.skips) if skips is not None]),
                default=None,
            ),
        )
    )


def gather(evidences: Iterable[Evidence], skips: Sequence[Skips] = ()) -> tuple[Evidence, ...]:
    """Merge what belongs together; the result is in logical order.

    Args:
        evidences: in any order.
        skips: all that are known, in logical order.
    """
    gathered: list[Evidence] = []
    for evidence in sorted(evidences, key=lambda evidence: evidence.first_round):
        part = skipped(evidence, skips)
        if gathered and near(gathered[-1], part):
            gathered[-1] = skipped(merge(gathered[-1], part), skips)
        else:
            gathered.append(part)
    return tuple(gathered)


def stretched(evidence: Evidence, stretch: Stretch) -> Evidence:
    """The evidence with those rounds in it, if it holds the sighting before them."""
    if evidence.first_round <= stretch.round <= evidence.last_round < stretch.through:
        return replace(evidence, last_round=stretch.through)
    return evidence


def skipped(evidence: Evidence, skips: Sequence[Skips]) -> Evidence:
    """The evidence with those of its updates that were skipped, and the rounds up to the last of them.

    Args:
        evidence: is left as it is by what was skipped before it, or apart from it.
        skips: in logical order.
    """
    known = evidence
    for run in skips:
        if run.last_step < first_step(known) and run.last_round < known.first_round:
            continue
        if not _goes_on(known, run.first_round, run.first_step):
            break
        own = () if known.skips is None else (known.skips,)
        known = replace(
            known,
            last_round=max(known.last_round, run.last_round),
            last_step=max(known.last_step, run.last_step),
            skips=max(with_skips(own, [run])),
        )
    return known


def with_skips(known: Sequence[Skips], more: Iterable[Skips]) -> tuple[Skips, ...]:
    """The newest skipped updates of both, in logical order; what lies side by side is one run."""
    runs: list[Skips] = []
    for run in sorted({*known, *more}):
        before = runs[-1] if runs else None
        if before is not None and (
            run.first_step <= before.last_step + 1 or run.first_round <= before.last_round + 1
        ):
            runs[-1] = Skips(
                before.first_round,
                before.first_step,
                max(before.last_round, run.last_round),
                max(before.last_step, run.last_step),
            )
        else:
            runs.append(run)
    return tuple(runs[-_SKIPS:])


def _goes_on(evidence: Evidence, round_: int, step: int) -> bool:
    """Whether a bad round that is not before the evidence belongs to it."""
    return round_ <= evidence.last_round + CLEAN_ROUNDS and not is_over_before(evidence, round_, step)


def _of(sightings: Sequence[Sighting]) -> Evidence:
    """Evidence from sightings of one round."""
    round_ = sightings[0].round
    last_step = max(sighting.step for sighting in sightings)
    reduced = _first_reduced([sighting for sighting in sightings if sighting.kind is Kind.REDUCED])
    weights = _earliest(sighting for sighting in sightings if sighting.kind in _OF_WEIGHTS)
    earliest = _earliest(
        sighting
        for sighting in sightings
        if sighting.kind is not Kind.REDUCED and sighting.kind not in _OF_WEIGHTS
    )
    return Evidence(
        round_,
        round_,
        earliest,
        last_step=last_step,
        reduced=reduced,
        weights=weights,
        # Of all buckets of a round, since they may arrive apart.
        own=tuple(sorted(_own(sightings))[:_OWN]),
    )


def _own(sightings: Iterable[Sighting]) -> set[Own]:
    """Those that the weights do not explain."""
    return {
        Own(
            sighting.round,
            sighting.rank,
            sighting.step,
            sighting.root,
            sighting.model_step,
            sighting.phase is Phase.INPUT,
            sighting.batch_hash,
        )
        for sighting in sightings
        if sighting.kind is Kind.GRADIENT and sighting.weights_finite
        if sighting.root is not None and sighting.model_step is not None
    }


def with_replayed(evidence: Evidence, replayed: Iterable[Replayed]) -> Evidence:
    """The evidence with those replays that are of its sightings."""
    own = [one for one in replayed if evidence.first_round <= one.autopsy.round <= evidence.last_round]
    if not own:
        return evidence
    # All ranks of a job may say so, and who does not is an origin: none of them is left out.
    received = {
        (one.by_rank, one.autopsy.round)
        for one in own
        if one.autopsy.replay is Replay.RECEIVED and one.by_rank == one.autopsy.of_rank
    }
    made = [one for one in own if one.autopsy.replay is not Replay.RECEIVED]
    return replace(
        evidence,
        replayed=_replayed([*evidence.replayed, *made]),
        received=evidence.received | received,
    )


def with_rehearsed(evidence: Evidence, rehearsed: Iterable[Rehearsed]) -> Evidence:
    """The evidence with those replays of clean passes that speak for replays of its rounds."""
    first, last = evidence.first_round, evidence.last_round
    own = [one for one in rehearsed if first <= one.rehearsal.of_round <= last]
    if not own:
        return evidence
    return replace(evidence, rehearsed=_rehearsed([*evidence.rehearsed, *own]))


def with_flown(evidence: Evidence, flown: Iterable[Flown]) -> Evidence:
    """The evidence with how it came to its earliest sightings."""
    more = tuple(flown)
    return _with_first_flown(replace(evidence, flown=(*evidence.flown, *more))) if more else evidence


def _of_first_round(evidence: Evidence) -> list[Sighting]:
    reduced = [] if evidence.reduced is None else [evidence.reduced]
    seen = [*evidence.earliest.values(), *evidence.weights.values(), *reduced]
    return [sighting for sighting in seen if sighting.round == evidence.first_round]


def _first_reduced(sightings: Iterable[Sighting | None]) -> Sighting | None:
    known = [sighting for sighting in sightings if sighting is not None]
    return min(known, key=lambda sighting: (sighting.round, sighting.rank), default=None)


def _replayed(replayed: Iterable[Replayed]) -> tuple[Replayed, ...]:
    """The first few, in order."""
    return tuple(sorted(set(replayed), key=_order_of_replay)[:_REPLAYED])


def _rehearsed(rehearsed: Iterable[Rehearsed]) -> tuple[Rehearsed, ...]:
    """The first few, in order."""
    return tuple(
        sorted(set(rehearsed), key=lambda one: (one.rehearsal.of_round, one.rank, one.rehearsal.round))
    )[:_REHEARSED]


def _order_of_replay(one: Replayed) -> tuple[int, ...]:
    return (one.autopsy.round, one.autopsy.of_rank, one.by_rank, one.autopsy.root)


def _with_first_flown(evidence: Evidence) -> Evidence:
    """The evidence with those of its flights that are of its first sightings, in logical order."""
    # Who is contaminated today may stand for itself once more is known.
    seen = {**evidence.later, **evidence.earliest}

    def order(one: Flown) -> tuple[float, ...]:
        got = (one.rank, one.flight.round) in evidence.received
        return (got, *position(seen[one.rank]), one.rank)

    own = {one for one in evidence.flown if one.rank in seen and seen[one.rank].round == one.flight.round}
    return replace(evidence, flown=tuple(sorted(own, key=order)[:_FLOWN]))


def _earliest(sightings: Iterable[Sighting]) -> dict[int, Sighting]:
    earliest: dict[int, Sighting] = {}
    for sighting in sightings:
        known = earliest.get(sighting.rank)
        if known is None or position(sighting) < position(known):
            earliest[sighting.rank] = sighting
    return earliest


def _sorted_out(evidence: Evidence) -> Evidence:
    """Set those aside that were finite in the first round, and then bad by what was reduced.

    Where the steps of models are not told, that is who was first bad after an update was applied: the step
    is higher. They can never become origins again: the first round only ever gets earlier, and what was
    skipped before a sighting is known with it. Where the steps are told, a rank may stand for itself:
    whether it does depends on what was first, and so all are kept.
    """
    first = first_step(evidence)
    # Updates up to this one were not applied.
    skipped_to = None
    if evidence.skips is not None and evidence.skips.first_step <= first:
        skipped_to = evidence.skips.last_step
    spared = first - 1 if skipped_to is None else max(first - 1, skipped_to)
    beginning = min(_of_first_round(evidence), key=lambda one: (*position(one), one.rank))

    def is_suspect(sighting: Sighting) -> bool:
        if sighting.round == evidence.first_round:
            return True
        if sighting.model_step is None:
            return sighting.step <= spared + 1
        # Of its own step it is not known yet whether that is skipped.
        after_skips = skipped_to is not None and first < sighting.step <= skipped_to + 1
        return after_skips or stands_for_itself(sighting, beginning)

    seen = _earliest([*evidence.later.values(), *evidence.earliest.values()])
    kept = {rank: sighting for rank, sighting in seen.items() if is_suspect(sighting)}
    later = {
        rank: sighting if sighting.weights_finite else replace(sighting, bad_weights=(), loss_note="")
        for rank, sighting in seen.items()
        if rank not in kept and sighting.model_step is not None
    }
    contaminated = (evidence.contaminated | seen.keys()) - kept.keys()
    return _with_first_flown(replace(evidence, earliest=kept, later=later, contaminated=contaminated))


def _known(value: int | None) -> float:
    return math.inf if value is None else value
