"""Which rules can never decide: their conditions contradict, or earlier rules match all they match. Pure.

What is said here is certain; of two patterns of which it is not plain whether one includes the
other, nothing is said.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, TypeVar

from gradwatch.collector.model import Cause
from gradwatch.collector.observations import Phase
from gradwatch.collector.policy.model import Reflex, may_mean
from gradwatch.collector.policy.problems import listed

if TYPE_CHECKING:
    import enum
    from collections.abc import Iterator, Sequence

    from gradwatch.collector.policy.compare import Comparison
    from gradwatch.collector.policy.model import Guard, Match, Rule

    _T = TypeVar("_T")

# The smallest that each number can be.
LEAST = {"step": 0, "rank": 0, "origins": 1, "count": 1, "consecutive_bad_steps": 1}
# These have no first rank, and so nothing that is known of it.
_NOBODY = {Cause.REDUCTION, Cause.LOSS_SCALE}
_OF_FIRST = ("phase", "value", "rank", "node", "parameter")
_PHASES = {phase.value for phase in Phase}


def never(match: Match, guard: Guard) -> str | None:
    """Why no incident can match; None when one may."""
    for name, least in LEAST.items():
        comparison: Comparison | None = getattr(match, name)
        if comparison is not None and not comparison.intervals(least):
            return f'{name} is never below {least}, and is to be "{comparison}"'
    if match.cause is not None:
        about_first = [name for name in _OF_FIRST if getattr(match, name) is not None]
        about_first += ["same_rank"] if match.same_rank else []
        if set(match.cause) <= _NOBODY and about_first:
            words = listed(cause.value for cause in match.cause)
            return f"{words} has no first rank, and so no {about_first[0]}"
        causes = {cause.value for cause in may_mean(match.cause)}
        phases = set() if match.phase is None else {phase.value for phase in may_mean(match.phase)}
        if match.phase is not None and causes <= _PHASES and not causes & phases:
            words = listed(sorted(cause.value for cause in match.cause))
            return f"the cause {words} begins in the phase of that name"
    if match.guard_exhausted:
        if guard.on_nonfinite is Reflex.OFF:
            return "guard_exhausted needs guard.on_nonfinite: skip_step"
        if guard.max_consecutive is None and guard.max_per_1000_steps is None:
            return "guard_exhausted needs guard.max_consecutive or guard.max_per_1000_steps"
    return None


def shadowed_by(earlier: Sequence[Rule], rule: Rule) -> tuple[str, ...]:
    """The earlier rules that between them match all that this one matches; empty when there are none."""
    names: list[str] = []
    for part in _parts(rule.match):
        name = next((other.name for other in earlier if _implies(part, other.match)), None)
        if name is None:
            return ()
        names.append(name)
    return tuple(other.name for other in earlier if other.name in names)


def _parts(match: Match) -> Iterator[Match]:
    """The match taken apart: each part has one cause, one phase and one value."""
    for cause, phase, value in itertools.product(
        _singles(match.cause), _singles(match.phase), _singles(match.value)
    ):
        yield replace(match, cause=cause, phase=phase, value=value)


def _singles(members: tuple[_T, ...] | None) -> list[tuple[_T, ...] | None]:
    return [None] if members is None else [(member,) for member in members]


def _implies(narrow: Match, wide: Match) -> bool:
    """Whether everything that matches `narrow` is certain to match `wide`."""
    return (
        all(_is_within(getattr(narrow, name), getattr(wide, name)) for name in ("cause", "phase", "value"))
        and all(
            _compares(getattr(narrow, name), getattr(wide, name), least)
            for name, least in LEAST.items()
            if name != "count"
        )
        and all(_fits(getattr(narrow, name), getattr(wide, name)) for name in ("node", "parameter"))
        and _counts(narrow, wide)
        and wide.guard_exhausted in {None, narrow.guard_exhausted}
    )


def _is_within(narrow: tuple[enum.Enum, ...] | None, wide: tuple[enum.Enum, ...] | None) -> bool:
    # An update matches `parameter` only if weights are bad since, so it is not within it.
    return wide is None or (narrow is not None and set(narrow) <= set(wide))


def _compares(narrow: Comparison | None, wide: Comparison | None, least: int) -> bool:
    return wide is None or (narrow is not None and narrow.implies(wide, least))


def _fits(narrow: tuple[str, ...] | None, wide: tuple[str, ...] | None) -> bool:
    if wide is None:
        return True
    return narrow is not None and all(
        any(
            pattern in (one, "*") or (not set(one) & set("*?[") and fnmatchcase(one, pattern))
            for pattern in wide
        )
        for one in narrow
    )


def _counts(narrow: Match, wide: Match) -> bool:
    """Whether the narrow one's count makes the wide one's certain."""
    if wide.count is None:
        return True
    if narrow.count is None:
        return False
    same = (narrow.same_rank, narrow.within_steps) == (wide.same_rank, wide.within_steps)
    # Where more is counted, a count is at least as high; so a lower bound carries over.
    broader = (narrow.same_rank or not wide.same_rank) and (
        wide.within_steps is None
        or (narrow.within_steps is not None and narrow.within_steps <= wide.within_steps)
    )
    carries = wide.count.sign in {">=", ">"} and broader
    return (same or carries) and narrow.count.implies(wide.count, LEAST["count"])
