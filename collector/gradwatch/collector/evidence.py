"""Which sightings belong together, and what of them a verdict needs. Pure.

Sightings are gathered by their rounds, never by the order in which they arrived: two
that have fewer than ten rounds between them belong to one incident.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from gradwatch.collector.model import Evidence
from gradwatch.collector.observations import Phase

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gradwatch.collector.model import Sighting

# An incident is over after so many rounds with finite reduced gradients.
CLEAN_ROUNDS = 10

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
    """Whether both belong together: fewer than ten rounds lie between them."""
    return (
        other.first_round <= one.last_round + CLEAN_ROUNDS
        and one.first_round <= other.last_round + CLEAN_ROUNDS
    )


def clusters(sightings: Iterable[Sighting]) -> list[Evidence]:
    """Evidence from sightings, whatever their order; what belongs together is in one."""
    parts: list[list[Sighting]] = []
    for sighting in sorted(sightings, key=lambda sighting: sighting.round):
        if parts and sighting.round <= parts[-1][-1].round + CLEAN_ROUNDS:
            parts[-1].append(sighting)
        else:
            parts.append([sighting])
    return [_of(part) for part in parts]


def merge(one: Evidence, other: Evidence) -> Evidence:
    """Evidence from both."""
    return _sorted_out(
        min(one.first_round, other.first_round),
        max(one.last_round, other.last_round),
        _earliest([*one.earliest.values(), *other.earliest.values()]),
        one.contaminated | other.contaminated,
    )


def gather(evidences: Iterable[Evidence]) -> tuple[Evidence, ...]:
    """Merge what belongs together; the result is in logical order."""
    gathered: list[Evidence] = []
    for evidence in sorted(evidences, key=lambda evidence: evidence.first_round):
        if gathered and near(gathered[-1], evidence):
            gathered[-1] = merge(gathered[-1], evidence)
        else:
            gathered.append(evidence)
    return tuple(gathered)


def stretched(evidence: Evidence, stretch: Stretch) -> Evidence:
    """The evidence with those rounds in it, if it holds the sighting before them."""
    if evidence.first_round <= stretch.round <= evidence.last_round < stretch.through:
        return replace(evidence, last_round=stretch.through)
    return evidence


def _of(sightings: Sequence[Sighting]) -> Evidence:
    rounds = [sighting.round for sighting in sightings]
    return _sorted_out(min(rounds), max(rounds), _earliest(sightings), frozenset())


def _earliest(sightings: Iterable[Sighting]) -> dict[int, Sighting]:
    earliest: dict[int, Sighting] = {}
    for sighting in sightings:
        known = earliest.get(sighting.rank)
        if known is None or position(sighting) < position(known):
            earliest[sighting.rank] = sighting
    return earliest


def _sorted_out(
    first_round: int,
    last_round: int,
    earliest: dict[int, Sighting],
    contaminated: frozenset[int],
) -> Evidence:
    """Set those aside that were first bad after an update: their step is higher.

    They can never become origins again, since the first round only ever gets earlier.
    """
    first_step = min(sighting.step for sighting in earliest.values() if sighting.round == first_round)
    suspects = {
        rank: sighting
        for rank, sighting in earliest.items()
        if sighting.round == first_round or sighting.step <= first_step
    }
    return Evidence(
        first_round=first_round,
        last_round=last_round,
        earliest=suspects,
        contaminated=contaminated.union(earliest).difference(suspects),
    )


def _known(value: int | None) -> float:
    return math.inf if value is None else value
