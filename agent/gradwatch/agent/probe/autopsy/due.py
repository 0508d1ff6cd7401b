"""A round that is to be replayed: which pass of it, and whether that can be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gradwatch.agent.probe.autopsy.graph import last_entrances
from gradwatch.agent.probe.autopsy.replay import LOSS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradwatch.agent.probe.autopsy.handover import Handover
    from gradwatch.agent.probe.passes import Pass
    from gradwatch.agent.probe.rounds import Moment


@dataclass
class Due:
    """A round that is to be replayed.

    Attributes:
        moment: the round's.
        microbatch: the bad one; None when not known.
        passes: of the round, with facts that the host knows.
        not_shared: why other ranks cannot replay it.
        seconds: that were spent on it so far.
        phase: in which it began, as in the `NonFinite` message; None when not known.
        handover: by which other ranks have been asked for their shards; None when they have not been.
        checksums: of finite gradients, by key, from the first bad bucket on.
        roots: where the backward pass began; None where that is to be asked for, or not known.
    """

    moment: Moment
    microbatch: int | None
    passes: tuple[Pass, ...]
    not_shared: str = ""
    seconds: float = 0.0
    phase: str | None = None
    handover: Handover | None = None
    checksums: dict[int, int] = field(default_factory=dict)
    roots: Sequence[Any] | None = None

    @property
    def name(self) -> tuple[int, int]:
        """On the shelf."""
        return name_of(self.moment)

    @property
    def bad_pass(self) -> Pass | None:
        """The pass that went bad; None when it is not known."""
        candidates = self.candidates
        return candidates[0] if len(candidates) == 1 else None

    @property
    def candidates(self) -> tuple[Pass, ...]:
        """The passes that may be the bad one, in order of time."""
        passes = self.passes
        if self.microbatch is not None:
            passes = tuple(one for one in passes if one.backward == self.microbatch)
        # Of several in one backward pass, such as two views, those by which something bad went.
        return tuple(one for one in passes if one.is_bad) or passes

    def why_not(self) -> str:
        """Why it cannot be replayed; "" when it can."""
        candidates = self.candidates
        if not candidates:
            return "no gradient was seen to come back to the output of a pass, as when that holds no tensor"
        reasons = [why_not(one) for one in candidates]
        return "" if "" in reasons else reasons[0]


def why_not(one: Pass) -> str:
    """Why a pass cannot be replayed; "" when it can."""
    if one.capsule is None:
        return "nothing was kept of it"
    entering = [entrance.gradient for entrance in last_entrances(one.entrances)]
    if not entering or not all(isinstance(fact, bool) for fact in entering):
        # On a device only what is true of all of them has been read out.
        entering = [one.entering]
    if one.output is True and False in entering:
        return LOSS
    return one.capsule.why_not()


def name_of(moment: Moment) -> tuple[int, int]:
    """Of a round, on the shelf."""
    return moment.root, moment.round


def release(moment: Moment) -> None:
    """Nothing of its passes is needed any more."""
    for one in moment.passes:
        one.release()
