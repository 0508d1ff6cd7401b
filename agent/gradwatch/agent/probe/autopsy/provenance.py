"""Where a bad value comes from: pure.

An operator that gives something non-finite is an `Event`; what goes into it and was bad is an `Event`
before it, or a `Given`. Masks make infinities on purpose: they are no fault, and neither is what only
carries them on. The origin of a bad value is the operator that made it of values that are finite or masked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradwatch.agent.probe.autopsy.values import Kinds


@dataclass(frozen=True, eq=False)
class Given:
    """A bad value that no operator of the replay made.

    Attributes:
        what: "parameter", "input", "gradient", or "constant" for all else, such as buffers.
        kinds: of its non-finite elements.
    """

    what: str
    kinds: Kinds

    @property
    def masked(self) -> bool:
        """Infinities that may be there on purpose: an attention mask is an input or a buffer."""
        return self.what in {"input", "constant"} and not self.kinds.nan


@dataclass(frozen=True, eq=False)
class Event:
    """An operator gave something non-finite.

    Attributes:
        index: its ordinal in the replay.
        kinds: of what it gave.
        bad: what was bad of what went into it.
        masked: it gave nothing but infinities that are there on purpose.
        facts: what is to be told of it.
    """

    index: int
    kinds: Kinds
    bad: tuple[Source, ...]
    masked: bool
    facts: Any


Source: TypeAlias = "Event | Given"


def on_purpose(gave: Kinds, bad: Sequence[Source], numbers: Kinds) -> bool:
    """Whether an operator gave nothing but infinities that it was given.

    Args:
        gave: what it gave.
        bad: what was bad of the tensors that went in.
        numbers: the kinds among the plain numbers that went in.
    """
    if gave.nan or not all(source.masked for source in bad):
        return False
    given = numbers
    for source in bad:
        given |= source.kinds
    return gave <= given


def origin_of(bad: Source) -> Source:
    """Where a bad value comes from.

    Returns:
        The first operator in time, of those that it depends on, into which nothing bad went but masks; if
        there is none, what was bad from the start.
    """
    events: list[Event] = []
    given: list[Given] = []
    seen: set[int] = set()
    todo: list[Source] = [bad]
    while todo:
        one = todo.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, Given):
            given.append(one)
            continue
        before = [source for source in one.bad if not source.masked]
        todo += before
        if not before:
            events.append(one)
    if events:
        return min(events, key=lambda event: event.index)
    return given[0]
