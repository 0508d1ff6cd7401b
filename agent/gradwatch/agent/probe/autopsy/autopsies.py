"""When a micro-batch is replayed, and what is journalled of it.

At the end of the first backward pass of a stretch that went bad: then the weights are those that it ran with.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradwatch.agent.probe.autopsy.capsule import Capsules
from gradwatch.agent.probe.autopsy.child import ChildError, in_child
from gradwatch.agent.probe.autopsy.replay import LOSS, Case, replay

if TYPE_CHECKING:
    from gradwatch.agent.probe.model import WatchedModel
    from gradwatch.agent.probe.passes import Pass
    from gradwatch.agent.probe.rounds import BucketFindings, Moment
    from gradwatch.agent.probe.watcher import Watcher

# The part of the probe, for its fuse.
PART = "autopsy"
# That the training waits: for one, and for all of a process.
SECONDS = 20.0
SECONDS_IN_ALL = 60.0

_ON_A_DEVICE = "a device's weights may have been updated by the time the fault is read out"


@dataclass(frozen=True)
class _Due:
    moment: Moment
    findings: BucketFindings


class Autopsies:
    """The autopsies of one process.

    Args:
        watcher: the process's.

    Attributes:
        capsules: what is kept of forward passes.
        held: rounds whose autopsy is not written down yet.
    """

    def __init__(self, watcher: Watcher) -> None:
        self.capsules = Capsules()
        self.held: set[int] = set()
        self._watcher = watcher
        self._due: _Due | None = None
        self._seconds = 0.0

    def found(self, model: WatchedModel, findings: BucketFindings) -> None:
        """The first bad round of a stretch: have it replayed once its backward pass is over. Never raises."""
        moment = findings.moment
        if not self._watcher.fuses.intact(PART) or (self._due is not None and self._due.moment is moment):
            return
        if not model.on_host:
            self._write(moment, findings.origin.microbatch, _not_done(_ON_A_DEVICE))
            return
        self._due = _Due(moment, findings)
        self.held.add(moment.round)

    def round_over(self, model: WatchedModel, moment: Moment) -> None:
        """The reductions of a round are over, and the backward pass with them. Never raises."""
        fuses = self._watcher.fuses
        due, self._due = self._due, None
        try:
            if due is not None and fuses.intact(PART):
                self._replay_own(model, due)
        except Exception as error:
            fuses.blow(PART, error)
        finally:
            for one in moment.passes:
                if one.capsule is not None:
                    one.capsule.release()
            if self.held:
                self.held.clear()
                self._watcher.write_progress()

    def _replay_own(self, model: WatchedModel, due: _Due) -> None:
        began = time.perf_counter()
        moment, microbatch = due.moment, due.findings.origin.microbatch
        one = _pass_of(moment, microbatch)
        kept = 0 if one is None or one.capsule is None else one.capsule.nbytes
        reason = _why_not(moment, one)
        if not reason and self._seconds >= SECONDS_IN_ALL:
            reason = f"the autopsies of this process have taken {SECONDS_IN_ALL:.0f} seconds already"
        module = model.module()
        if reason or one is None or one.capsule is None or module is None:
            told = _not_done(reason or "the model itself is not known")
        else:
            known = one.output if isinstance(one.output, bool) else None
            was_bad = None if known is None else not known
            told = _replayed(Case(module, one.capsule, model.arrived(moment.order), was_bad))
        seconds = time.perf_counter() - began
        self._seconds += seconds
        self._write(moment, microbatch, told, seconds=seconds, nbytes=kept)

    def _write(
        self,
        moment: Moment,
        microbatch: int | None,
        told: dict[str, Any],
        *,
        seconds: float = 0.0,
        nbytes: int = 0,
    ) -> None:
        identity = self._watcher.identity
        place = moment.microbatch if microbatch is None else microbatch
        message = {
            "root": moment.root,
            "round": moment.round,
            "step": moment.step,
            "of_rank": 0 if identity is None else identity.rank,
            "seconds": seconds,
            "nbytes": nbytes,
        }
        if place is not None:
            message["microbatch"] = place
        self._watcher.append("autopsy", message | told)


def _replayed(case: Case) -> dict[str, Any]:
    try:
        return in_child(lambda: replay(case), seconds=SECONDS)
    except ChildError as error:
        return _not_done(str(error))


def _pass_of(moment: Moment, microbatch: int | None) -> Pass | None:
    """The pass that went bad; None when it is not known."""
    if microbatch is None:
        return moment.passes[0] if len(moment.passes) == 1 else None
    return next((one for one in moment.passes if one.backward == microbatch), None)


def _why_not(moment: Moment, one: Pass | None) -> str:
    """Why a pass cannot be replayed; "" when it can."""
    if one is None:
        many = len(moment.passes)
        return f"which of {many} passes it was is not known" if many else "no pass through the model was seen"
    if one.capsule is None:
        return "nothing was kept of it"
    if one.output is True and one.entering is False:
        return LOSS
    return one.capsule.why_not()


def _not_done(reason: str) -> dict[str, Any]:
    return {"replay": "REPLAY_NOT_DONE", "reason": reason}
