"""A verdict in words. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradwatch.collector.evidence import first_step
from gradwatch.collector.model import UnknownReason
from gradwatch.collector.observations import Phase, Value

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gradwatch.collector.model import Evidence, Sighting

# More ranks than this are counted, not listed.
_LISTED = 8

_VALUES = {
    Value.NAN: "NaN",
    Value.POSITIVE_INFINITY: "+Inf",
    Value.NEGATIVE_INFINITY: "-Inf",
}

_PHASES = {
    Phase.INPUT: "The batch that it was given was not finite: bad data.",
    Phase.PARAMETER: "Its weights were not finite before that step: something had poisoned or damaged them.",
    Phase.FORWARD: "Its batch and its weights were finite, and what its forward pass gave was not.",
    Phase.LOSS: "What its forward pass gave was finite, and the gradient of the loss was not.",
    Phase.BACKWARD: "The gradient of the loss was finite, and went bad on its way back through the model.",
}

_WEIGHTS_OF_ALL = "All ranks were bad at once, since all have the same weights."
_WEIGHTS_OF_ONE = (
    "All ranks have the same weights, and only this one's were bad: its memory was damaged, or it had "
    "drifted apart."
)
_ALL_AT_ONCE = (
    "All ranks were bad at once: look at what they share, such as the learning rate or the code, before any "
    "one rank's batch or device."
)

_UNKNOWN = {
    UnknownReason.WAITING: "its view of the round has not arrived yet",
    UnknownReason.PROCESS_ENDED: "its process ended before it had looked at the round",
    UnknownReason.LAUNCH_ENDED: "its launch ended before its view of the round arrived",
    UnknownReason.ATTEMPT_OVER: "its attempt was over before its view of the round arrived",
    UnknownReason.SILENT: "nothing was heard of it for the confirm timeout",
    UnknownReason.NEVER_SEEN: "no watched process of that rank was ever seen",
    UnknownReason.RECORDS_LOST: "something that it reported around that round was lost",
}


def explain(
    origins: Sequence[Sighting],
    tie: bool,
    clean: Sequence[int],
    unknown: Mapping[int, UnknownReason],
    contaminated: Sequence[int],
) -> tuple[str, ...]:
    """Say who was first, who was clean, and what is not known.

    Args:
        origins: in logical order.
        tie: whether several of them share the first position.
        clean: ranks that were clean in the first round.
        unknown: ranks of which that is not known, and why.
        contaminated: ranks that were first bad after an update.
    """
    sentences = [_first(origins, tie)]
    if origins[0].phase is not None:
        sentences.append(_PHASES[origins[0].phase])
    if len(origins) > 1:
        others = [origin.rank for origin in origins[1:]]
        sentences.append(f"{_ranks(others)} {_were(others)} bad before any update was applied too.")
    if clean:
        spread = sorted(set(contaminated).intersection(clean))
        tail = (
            f"; the all-reduce then spread it, and {_ranks(spread, lower=True)} "
            f"{_were(spread)} bad after the update."
            if spread
            else "."
        )
        sentences.append(f"{_ranks(clean)} {_were(clean)} clean in that round{tail}")
    by_reason: dict[UnknownReason, list[int]] = {}
    for rank, reason in sorted(unknown.items()):
        by_reason.setdefault(reason, []).append(rank)
    for reason, ranks in by_reason.items():
        verb = "is unknown:" if len(ranks) == 1 else "are unknown; of each,"
        sentences.append(f"{_ranks(ranks)} {verb} {_UNKNOWN[reason]}.")
    if not unknown:
        sentences += _where_to_look(origins, clean)
    return tuple(sentences)


def _where_to_look(origins: Sequence[Sighting], clean: Sequence[int]) -> tuple[str, ...]:
    """What follows from how many ranks were bad, in the phase of the first."""
    phase, alone, all_ = origins[0].phase, len(origins) == 1 and bool(clean), len(origins) > 1 and not clean
    if phase is None or not (alone or all_):
        return ()
    if phase is Phase.PARAMETER:
        return (_WEIGHTS_OF_ALL if all_ else _WEIGHTS_OF_ONE,)
    if all_:
        return (_ALL_AT_ONCE,)
    # Bad data says itself where to look.
    return () if phase is Phase.INPUT else ("No other rank was bad: look at its batch and its device.",)


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


def _first(origins: Sequence[Sighting], tie: bool) -> str:
    first = origins[0]
    who = f"Rank {first.rank} on node {first.node}"
    micro = f", micro-batch {first.microbatch}" if first.microbatch else ""
    when = f"at step {first.step} (round {first.round}{micro})"
    if tie:
        shared = [origin.rank for origin in origins if _place(origin) == _place(first)]
        who += f" is named first, but {_ranks(shared, lower=True)} share that position"
    else:
        who += " was first"
    if first.parameter is None:
        return f"{who}: its local gradients were not finite {when}."
    value = "turned non-finite" if first.value is None else f"turned {_VALUES[first.value]}"
    order = (
        ""
        if first.backward_position is None
        else f", the {_ordinal(first.backward_position + 1)} gradient to arrive in that backward pass"
    )
    return f"{who}: the gradient of {first.parameter} {value} {when}{order}."


def _place(sighting: Sighting) -> tuple[object, ...]:
    return (sighting.round, sighting.microbatch, sighting.phase, sighting.backward_position)


def _ranks(ranks: Sequence[int], *, lower: bool = False) -> str:
    if len(ranks) > _LISTED:
        return f"{len(ranks)} ranks"
    word = "Rank" if len(ranks) == 1 else "Ranks"
    listed = ", ".join(map(str, ranks[:-1])) + " and " if len(ranks) > 1 else ""
    return f"{word.lower() if lower else word} {listed}{ranks[-1]}"


def _were(ranks: Sequence[int]) -> str:
    return "was" if len(ranks) == 1 else "were"


def _ordinal(number: int) -> str:
    if number % 100 in {11, 12, 13}:
        return f"{number}th"
    return f"{number}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th') }"
