"""A round that is to be replayed: which pass of it, and whether that can be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradwatch.agent.probe.autopsy.replay import LOSS

if TYPE_CHECKING:
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
    """

    moment: Moment
    microbatch: int | None
    passes: tuple[Pass, ...]
    not_shared: str = ""
    seconds: float = 0.0
    phase: str | None = None
    handover: Handover | None = None

    @property
    def name(self) -> tuple[int, int]:
        """On the shelf."""
        return name_of(self.moment)

    @property
    def bad_pass(self) -> Pass | None:
        """The pass that went bad; None when it is not known."""
        if self.microbatch is None:
            return self.passes[0] if len(self.passes) == 1 else None
        return next((one for one in self.passes if one.backward == self.microbatch), None)

    def why_not(self) -> str:
        """Why it cannot be replayed; "" when it can."""
        one = self.bad_pass
        if one is None:
            many = len(self.passes)
            if many:
                return f"which of {many} passes it was is not known"
            return "no gradient was seen to come back to the output of a pass, as when that holds no tensor"
        if one.capsule is None:
            return "nothing was kept of it"
        if one.output is True and one.entering is False:
            return LOSS
        return one.capsule.why_not()


def name_of(moment: Moment) -> tuple[int, int]:
    """Of a round, on the shelf."""
    return moment.root, moment.round


def release(moment: Moment) -> None:
    """Nothing of its passes is needed any more."""
    for one in moment.passes:
        one.release()
