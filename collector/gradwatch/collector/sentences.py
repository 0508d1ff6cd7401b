"""A verdict in words. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradwatch.collector.evidence import first_step
from gradwatch.collector.first_rank import own_cause, what_it_was
from gradwatch.collector.model import LikelyKind
from gradwatch.collector.observations import Phase
from gradwatch.collector.words import (
    VALUES,
    is_part,
    likely_cause,
    more_weights,
    named,
    of_unknown,
    ordinal,
    step_list,
    value_word,
    were,
    which_model,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gradwatch.collector.model import Evidence, Guess, Own, Sighting, UnknownReason, Verdict

_WEIGHTS_OF_ALL = "All ranks were bad at once, since all have the same weights."
_WEIGHTS_OF_ONE = (
    "Only this rank's weights were bad: look at what changes weights there and on no other rank."
)
_ALL_AT_ONCE = (
    "All ranks were bad at once: look at what they share, such as the learning rate, the code, and what the "
    "loss exchanges between them."
)
_ITS_BATCH = "The ranks share weights and code, and not the batch: look at its batch."
# Doubts and steps that are told.
_TOLD_DOUBTS = 6
# Causes of other ranks that are told.
_TOLD_CAUSES = 3


def explain(
    origins: Sequence[Sighting],
    tie: bool,
    clean: Sequence[int],
    unknown: Mapping[int, UnknownReason],
    contaminated: Sequence[int],
    *,
    received: Sequence[int] = (),
    guesses: Sequence[Guess] = (),
) -> tuple[str, ...]:
    """Say who was first, who was clean, and what is not known.

    Args:
        origins: in logical order.
        tie: whether several of them share the first position.
        clean: ranks that were clean in the first round.
        unknown: ranks of which that is not known, and why.
        contaminated: ranks that were first bad after an update.
        received: ranks that a collective of the forward pass had made bad.
        guesses: what is likely to be behind it.
    """
    sentences = [_first(origins, tie), *what_it_was(origins[0])]
    spread = []
    if received:
        spread.append(
            f"{named(received)} {were(received)} bad in the same round, and got it from there: a "
            "collective of the forward pass had spread it before there were gradients"
        )
    first = origins[0]
    others = [origin for origin in origins[1:] if not (tie and _place(origin) == _place(first))]
    # Where models' steps are told, a later round is one that stands for itself.
    by_itself = sorted(
        (
            one
            for one in others
            if one.round > first.round and one.model_step is not None and one.weights_finite
        ),
        key=lambda one: one.rank,
    )
    together = [one.rank for one in others if one not in by_itself]
    if together:
        spread.append(
            f"{named(together, lower=bool(spread))} {were(together)} bad before any update was applied too"
        )
    if by_itself:
        ranks = [one.rank for one in by_itself]
        spread.append(
            f"{named(ranks, lower=bool(spread))} {were(ranks)} bad later, at "
            f"{step_list(sorted({one.step for one in by_itself}))}, and not by what was reduced: the weights "
            "were finite"
        )
    if clean:
        spread.append(f"{named(clean, lower=bool(spread))} {were(clean)} clean in that round")
        after = sorted(set(contaminated).intersection(clean))
        if after:
            spread.append(
                f"the all-reduce then spread it, and {named(after, lower=True)} {were(after)} bad after "
                "the update"
            )
    if spread:
        sentences.append(f"{'; '.join(spread)}.")
    sentences += _other_causes(origins)
    sentences += of_unknown(unknown)
    told = [guess for guess in guesses if guess.kind is not LikelyKind.UNKNOWN or guess.remedy]
    if told:
        sentences.append(likely_cause(told[0]))
    elif not unknown and not received:
        sentences += _where_to_look(origins, clean)
    return tuple(sentences)


def tell_again(first: Sighting, again: Sequence[Own]) -> tuple[str, ...]:
    """Say in which later steps of the incident the first rank was bad by itself again."""
    steps = sorted({one.step for one in again if one.step != first.step})
    if not steps:
        return ()
    same = {one.batch_hash for one in again} == {first.batch_hash} and first.batch_hash
    entered = "the same input" if is_part(first) else "the same batch"
    return (f"Rank {first.rank} was bad again at {step_list(steps)}{f', with {entered}' if same else ''}.",)


def tell_before(verdict: Verdict) -> tuple[str, ...]:
    """Say in which steps the first rank had been first before, in earlier incidents."""
    first = verdict.first
    if first is None or not verdict.before:
        return ()
    steps = sorted(set(verdict.before))
    when = f"in {'an earlier incident' if len(steps) == 1 else 'earlier incidents'}, at {step_list(steps)}"
    return (f"Rank {first.rank} was also first {when}.",)


def tell_doubts(first: Sighting, doubts: Sequence[str]) -> tuple[str, ...]:
    """Say why nothing follows from a replay that stayed finite."""
    if not doubts:
        return ()
    more = f"; and {len(doubts) - _TOLD_DOUBTS} more" if len(doubts) > _TOLD_DOUBTS else ""
    listed = "; ".join(doubt.rstrip(".") for doubt in doubts[:_TOLD_DOUBTS])
    text = (
        f"Replayed on rank {first.rank} it stayed finite, and the replay is not shown to have repeated the "
        f"pass: {listed}{more}."
    )
    return (text,)


def tell_skips(evidence: Evidence) -> tuple[str, ...]:
    """Say which updates the guard skipped, as far as it is known; nothing when of none it is."""
    skips = evidence.skips
    if skips is None:
        return ()
    several = skips.first_step < skips.last_step
    which = f"updates of steps {skips.first_step} to {skips.last_step}" if several else "update"
    if skips.first_step > first_step(evidence):
        which = which if several else f"update of step {skips.last_step}"
        return (f"The guard skipped the {which}; of those before it that is not known.",)
    if skips.last_step < evidence.last_step:
        which = which if several else f"update of step {skips.last_step}"
        return (f"The guard skipped the {which}; of those after it that is not known yet.",)
    return (f"The guard skipped the {which}, so no weight was touched.",)


def _other_causes(origins: Sequence[Sighting]) -> tuple[str, ...]:
    """What it was on those ranks of which another cause is known than of the first."""
    first = origins[0]
    by_cause: dict[str, list[int]] = {}
    for one in origins[1:]:
        cause = own_cause(one) if _has_other_cause(one, first) else None
        if cause is not None:
            by_cause.setdefault(cause, []).append(one.rank)
    told = [f"On {named(sorted(ranks), lower=True)}, {cause}" for cause, ranks in by_cause.items()]
    more = len(told) - _TOLD_CAUSES
    if more > 0:
        told[_TOLD_CAUSES:] = [f"{more} more cause{' is' if more == 1 else 's are'} known on other ranks."]
    return tuple(told)


def _has_other_cause(one: Sighting, first: Sighting) -> bool:
    """Whether it is known to have begun otherwise, or elsewhere, than on the first rank."""
    if None in {one.phase, first.phase} or is_part(first):
        return False
    if one.phase is not first.phase:
        return True
    here, there = one.operator, first.operator
    if here is None or there is None or None in {here.name, there.name}:
        return False
    return (here.name, here.source) != (there.name, there.source)


def _where_to_look(origins: Sequence[Sighting], clean: Sequence[int]) -> tuple[str, ...]:
    """What follows from how many ranks were bad, in the phase of the first."""
    phase, alone = origins[0].phase, len(origins) == 1 and bool(clean)
    all_ = len(origins) > 1 and not clean and all(one.round == origins[0].round for one in origins)
    if phase is None or not (alone or all_):
        return ()
    if phase is Phase.PARAMETER:
        return (_WEIGHTS_OF_ALL if all_ else _WEIGHTS_OF_ONE,)
    if all_:
        return (_ALL_AT_ONCE,)
    # Bad data says itself where to look; and what another rank sent is no batch.
    return () if phase is Phase.INPUT or is_part(origins[0]) else (_ITS_BATCH,)


def _first(origins: Sequence[Sighting], tie: bool) -> str:
    first = origins[0]
    who = f"Rank {first.rank} on node {first.node}"
    micro = f", micro-batch {first.microbatch}" if first.microbatch else ""
    when = f"at step {first.step} (round {first.round}{micro})"
    if tie:
        shared = [origin.rank for origin in origins if _place(origin) == _place(first)]
        who += f" is named first, but {named(shared, lower=True)} share that position"
    else:
        who += " was first"
    if first.group:
        who += f" within its group ({named(first.group, lower=True)})"
    elif first.group_unknown:
        who += " among what is known (the ranks of its group are not)"
    elif first.exchanged:
        who += " among what is known (tensors were exchanged between ranks)"
    if first.phase is Phase.PARAMETER and first.bad_weights:
        weight = f"the weight {first.parameter}{which_model(first)}"
        return f"{who}: {weight} was {value_word(first.value)} {when}{more_weights(first)}."
    if first.parameter is None:
        return f"{who}: its local gradients were not finite {when}."
    value = "turned non-finite" if first.value is None else f"turned {VALUES[first.value]}"
    order = (
        ""
        if first.backward_position is None
        else f", the {ordinal(first.backward_position + 1)} gradient to arrive in that backward pass"
    )
    return f"{who}: the gradient of {first.parameter}{which_model(first)} {value} {when}{order}."


def _place(sighting: Sighting) -> tuple[object, ...]:
    return (sighting.round, sighting.microbatch, sighting.phase, sighting.backward_position)
