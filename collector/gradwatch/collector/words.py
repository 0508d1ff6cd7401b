"""Words and parts of sentences that verdicts share. Pure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from gradwatch.collector.model import LikelyKind, UnknownReason
from gradwatch.collector.observations import Value

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gradwatch.collector.model import Guess, Sighting

# More ranks than this are counted, not listed.
_LISTED = 8
# Steps that are listed; of more it is only said that there are.
STEPS = 16
VALUES = {
    Value.NAN: "NaN",
    Value.POSITIVE_INFINITY: "+Inf",
    Value.NEGATIVE_INFINITY: "-Inf",
}
_LIKELY = {
    LikelyKind.BAD_DATA: "bad data",
    LikelyKind.DEVICE: "a device",
    LikelyKind.DOMAIN: "arithmetic at the edge of its domain",
    LikelyKind.SATURATION: "saturation",
    LikelyKind.PRECISION: "precision",
    LikelyKind.HYPERPARAMETERS: "hyperparameters",
    LikelyKind.EXPLODING_GRADIENTS: "exploding gradients",
    LikelyKind.INITIALISATION: "bad initialisation",
}
_UNKNOWN = {
    UnknownReason.WAITING: "its view of the round has not arrived yet",
    UnknownReason.PROCESS_ENDED: "its process ended before it had looked at the round",
    UnknownReason.LAUNCH_ENDED: "its launch ended before its view of the round arrived",
    UnknownReason.ATTEMPT_OVER: "its attempt was over before its view of the round arrived",
    UnknownReason.SILENT: "nothing was heard of it for the confirm timeout",
    UnknownReason.NEVER_SEEN: "no watched process of that rank was ever seen",
    UnknownReason.RECORDS_LOST: "something that it reported around that round was lost",
}


def named(ranks: Sequence[int], *, lower: bool = False) -> str:
    """Such as `Ranks 0, 1 and 3`; many are counted, not listed."""
    if len(ranks) > _LISTED:
        return f"{len(ranks)} ranks"
    word = "Rank" if len(ranks) == 1 else "Ranks"
    listed = ", ".join(map(str, ranks[:-1])) + " and " if len(ranks) > 1 else ""
    return f"{word.lower() if lower else word} {listed}{ranks[-1]}"


def step_list(steps: Sequence[int]) -> str:
    """Such as `steps 13 and 21`; of many the first ones, and that there are more."""
    more = ["more"] if len(steps) > STEPS else []
    return f"step{'s' if len(steps) > 1 else ''} {listed([*map(str, steps[:STEPS]), *more])}"


def were(ranks: Sequence[int]) -> str:
    """The verb of so many ranks."""
    return "was" if len(ranks) == 1 else "were"


def listed(words: Sequence[str]) -> str:
    """Such as `a, b and c`; there is at least one."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def ordinal(number: int) -> str:
    """Such as `3rd`."""
    if number % 100 in {11, 12, 13}:
        return f"{number}th"
    return f"{number}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th') }"


def number(value: float) -> str:
    """A number as sentences have it."""
    if math.isnan(value):
        return "NaN"
    return f"{value:.3g}"


def value_word(value: Value | None) -> str:
    """What a number that is not finite is called."""
    return "not finite" if value is None else VALUES[value]


def which_model(first: Sighting) -> str:
    """Which of several models."""
    return "" if first.model is None else f" in model {first.model.ordinal} ({first.model.module_class})"


def is_part(first: Sighting) -> bool:
    """Whether what enters it may come from another rank."""
    return bool(first.group) or first.group_unknown or first.exchanged


def more_weights(first: Sighting) -> str:
    """How many weights were bad beside the one that is named."""
    more = first.bad_weights_total - 1
    if more <= 0 or not first.bad_weights:
        return ""
    return f", and {more} more weight{' was' if more == 1 else 's were'} bad"


def since_when(first: Sighting) -> tuple[str, ...]:
    """Since when weights are bad, as far as it is known."""
    if first.update is not None and first.update.initial:
        return ("They were so when the model was wrapped, before any update.",)
    if first.finite_step is None:
        return ()
    one = bool(first.bad_weights) and first.bad_weights_total <= 1
    return (f"{'It was' if one else 'They were'} last known finite at step {first.finite_step}.",)


def likely_cause(guess: Guess) -> str:
    """A guess with its reason and its remedy."""
    if guess.kind is LikelyKind.UNKNOWN:
        return f"{guess.because[:1].upper()}{guess.because[1:]}. {guess.remedy}"
    return f"Likely {_LIKELY[guess.kind]}: {guess.because}. {guess.remedy}"


def of_unknown(unknown: Mapping[int, UnknownReason]) -> list[str]:
    """Say of which ranks something is not known, and why."""
    by_reason: dict[UnknownReason, list[int]] = {}
    for rank, reason in sorted(unknown.items()):
        by_reason.setdefault(reason, []).append(rank)
    sentences = []
    for reason, ranks in by_reason.items():
        verb = "is unknown:" if len(ranks) == 1 else "are unknown; of each,"
        sentences.append(f"{named(ranks)} {verb} {_UNKNOWN[reason]}.")
    return sentences
