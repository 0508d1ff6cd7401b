"""When a micro-batch is replayed, and what is journalled of it.

At the end of the first backward pass of a stretch that went bad: then the weights are those that it ran with.
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradwatch.agent.probe.autopsy.capsule import Capsules, nbytes_of
from gradwatch.agent.probe.autopsy.child import ChildError, in_child
from gradwatch.agent.probe.autopsy.handover import Handover, NoShardsError
from gradwatch.agent.probe.autopsy.replay import LOSS, Case, replay
from gradwatch.agent.probe.autopsy.shelf import NotShareable, Shelf, read_shards

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from contextlib import AbstractContextManager
    from typing import IO

    import torch

    from gradwatch.agent.probe.autopsy.capsule import Capsule
    from gradwatch.agent.probe.fsdp_shards import Shards
    from gradwatch.agent.probe.model import WatchedModel
    from gradwatch.agent.probe.passes import Pass
    from gradwatch.agent.probe.rounds import BucketFindings, Moment
    from gradwatch.agent.probe.watcher import Watcher

# The part of the probe, for its fuse.
PART = "autopsy"
# That the training waits: for one, and for all of a process.
SECONDS = 20.0
SECONDS_IN_ALL = 60.0


@dataclass
class _Due:
    """A round that is to be replayed.

    Attributes:
        not_shared: why other ranks cannot replay it.
        seconds: that were spent on it so far.
        handover: by which other ranks have been asked for their shards; None when they have not been.
    """

    moment: Moment
    microbatch: int | None
    not_shared: str = ""
    seconds: float = 0.0
    handover: Handover | None = None

    @property
    def name(self) -> tuple[int, int]:
        """On the shelf."""
        return self.moment.root, self.moment.round


@dataclass
class _Report:
    """What is told of any replay, whatever came of it."""

    moment: Moment
    microbatch: int | None
    of_rank: int | None = None
    seconds: float = 0.0
    nbytes: int = 0

    def as_message(self, own_rank: int) -> dict[str, Any]:
        """The fields of the `Autopsy` message in its JSON mapping."""
        moment = self.moment
        microbatch = moment.microbatch if self.microbatch is None else self.microbatch
        message: dict[str, Any] = {
            "root": moment.root,
            "round": moment.round,
            "step": moment.step,
            "of_rank": own_rank if self.of_rank is None else self.of_rank,
            "seconds": self.seconds,
            "nbytes": self.nbytes,
        }
        return message if microbatch is None else message | {"microbatch": microbatch}


class Autopsies:
    """The autopsies of one process.

    Args:
        watcher: the process's.

    Attributes:
        capsules: what is kept of forward passes.
    """

    def __init__(self, watcher: Watcher) -> None:
        self.capsules = Capsules()
        self._watcher = watcher
        self._due: dict[int, _Due] = {}
        self._shelf: Shelf | None = None
        self._seconds = 0.0

    @property
    def held(self) -> Iterable[int]:
        """Rounds whose autopsy is not written down yet."""
        # With that fuse blown no round's end is seen any more.
        return self._due if self._watcher.fuses.intact("reduced") else ()

    def found(self, model: WatchedModel, findings: BucketFindings) -> None:
        """The first bad round of a stretch: have it replayed once its backward pass is over. Never raises."""
        moment = findings.moment
        if not self._watcher.fuses.intact(PART) or moment.round in self._due:
            return
        due = _Due(moment, findings.origin.microbatch)
        reason = model.why_not_replayed() or self._why_no_more()
        if reason is not None:
            self._write(_Report(moment, due.microbatch), _not_done(reason))
            return
        self._due[moment.round] = due
        if model.shards is not None and not _why_not(moment, _pass_of(moment, due.microbatch)):
            due.handover = self._handover()
            if due.handover is not None:
                due.handover.ask(due.name, model.shards)

    def forget(self, moment: Moment) -> None:
        """Its round is over, by an exception."""
        self._due.pop(moment.round, None)

    def before_reduction(self, model: WatchedModel, moment: Moment) -> None:
        """The last gradients of a round are about to be reduced. Never raises."""
        due = self._due.get(moment.round)
        if due is None or not self._watcher.fuses.intact(PART):
            return
        began = time.perf_counter()
        try:
            due.not_shared = self._share(model, due)
        except OSError as error:
            due.not_shared = f"it could not be written for them: {error}"
        except Exception as error:
            self._watcher.fuses.blow(PART, error)
        due.seconds = time.perf_counter() - began

    def round_over(self, model: WatchedModel, moment: Moment, *, bad: bool | None) -> None:
        """The reductions of a round are over, and the backward pass with them. Never raises.

        Args:
            model: whose round it is.
            moment: the round's.
            bad: whether what they gave is; None when not known yet.
        """
        fuses = self._watcher.fuses
        due = self._due.get(moment.round)
        try:
            if fuses.intact(PART):
                if due is None and self._shelf is not None:
                    # All ranks have seen what the reductions gave of the round that it was for.
                    self._shelf.clear()
                if due is not None:
                    self._replay_own(model, due)
                if due is None or due.handover is None:
                    self._help(model, moment, bad=bool(bad) and due is None)
        except Exception as error:
            fuses.blow(PART, error)
        finally:
            for one in moment.passes:
                if one.capsule is not None:
                    one.capsule.release()
            if self._due.pop(moment.round, None) is not None:
                self._watcher.write_progress()

    def start_over(self) -> None:
        """A checkpoint has been loaded: rounds count from 0 again."""
        self._due.clear()
        self.finish()

    def finish(self) -> None:
        """The process ends."""
        if self._shelf is not None:
            self._shelf.clear()

    def _share(self, model: WatchedModel, due: _Due) -> str:
        """Lay the capsule down for other ranks; why not, or ""."""
        one = _pass_of(due.moment, due.microbatch)
        shelf, identity = self._shelf_of_attempt(), self._watcher.identity
        if model.group_size == 1 or shelf is None or identity is None or _why_not(due.moment, one):
            return ""
        if one is None or one.capsule is None:
            return ""
        about = {"microbatch": one.backward, "output": one.output if isinstance(one.output, bool) else None}
        try:
            shelf.put(due.name, identity.rank, one.capsule, about)
        except NotShareable as why:
            return str(why)
        return ""

    def _replay_own(self, model: WatchedModel, due: _Due) -> None:
        began = time.perf_counter()
        one = _pass_of(due.moment, due.microbatch)
        report = _Report(due.moment, due.microbatch)
        reason = _why_not(due.moment, one)
        if reason or one is None or one.capsule is None:
            told = _not_done(reason)
            if due.handover is not None:
                due.handover.call_off(due.name)
                due.handover = None
        else:
            report.nbytes = one.capsule.nbytes
            try:
                with _shards_for(model, due) as shards:
                    told = self._replayed(model, due.moment, one.capsule, one.output, shards)
            except NoShardsError as why:
                told = _not_done(str(why))
        if due.not_shared and told["replay"] != "REPLAY_NOT_DONE":
            told.setdefault("missing", []).append(f"whether it goes bad on another rank: {due.not_shared}")
        report.seconds = due.seconds + time.perf_counter() - began
        self._write(report, told)

    def _help(self, model: WatchedModel, moment: Moment, *, bad: bool) -> None:
        """Do what another rank's replay may need of this one.

        Args:
            model: whose round it was.
            moment: the round's.
            bad: whether its reductions gave something bad, though this rank's own gradients were finite.
        """
        if model.why_not_replayed() is not None:
            return
        if model.shards is not None:
            self._hand_over(model, model.shards, moment)
        elif bad and model.group_size > 1:
            self._replay_anothers(model, moment)

    def _hand_over(self, model: WatchedModel, shards: Shards, moment: Moment) -> None:
        """Lay our shards down if another rank has asked for them; replay its pass, if nobody else does."""
        shelf, handover, name = self._shelf_of_attempt(), self._handover(), (moment.root, moment.round)
        if shelf is None or handover is None:
            return
        with suppress(OSError, NoShardsError):
            asker = handover.lay_down(name, shards)
            if asker is None:
                return
            if all(map(math.isfinite, moment.magnitudes.values())) and shelf.claim(name):
                with handover.others(name, shards, asker) as files:
                    self._replay_anothers(model, moment, files)
        handover.wait_until_opened(name)

    def _replay_anothers(
        self, model: WatchedModel, moment: Moment, shards: Mapping[int, IO[bytes]] | None = None
    ) -> None:
        """Ours was finite and another's was not: replay what that rank has laid down, with our weights."""
        shelf = self._shelf_of_attempt()
        if shelf is None:
            return
        began = time.perf_counter()
        taken = shelf.take((moment.root, moment.round))
        if taken is None:
            return
        owner, capsule, about = taken
        told = self._replayed(model, moment, capsule, about["output"], shards or {})
        report = _Report(moment, about["microbatch"], of_rank=owner, nbytes=nbytes_of(capsule))
        report.seconds = time.perf_counter() - began
        self._write(report, told)

    def _replayed(
        self,
        model: WatchedModel,
        moment: Moment,
        capsule: Capsule,
        output: object,
        shards: Mapping[int, IO[bytes]],
    ) -> dict[str, Any]:
        enough = self._why_no_more()
        if enough is not None:
            return _not_done(enough)
        module = model.module()
        if module is None:
            return _not_done("the model itself is not known")
        was_bad = not output if isinstance(output, bool) else None

        def parameters() -> list[torch.Tensor]:
            """Those first whose gradients arrived first."""
            by_key = model.prepare_replay(read_shards(shards))
            places = {key: place for place, key in enumerate(moment.order)}
            return [by_key[key] for key in sorted(by_key, key=lambda one: places.get(one, len(places)))]

        case = Case(module, capsule, parameters, was_bad)
        try:
            return in_child(lambda: replay(case), seconds=SECONDS)
        except ChildError as error:
            return _not_done(str(error))

    def _why_no_more(self) -> str | None:
        if self._seconds < SECONDS_IN_ALL:
            return None
        return f"autopsies have taken {SECONDS_IN_ALL:.0f} seconds already"

    def _handover(self) -> Handover | None:
        shelf, identity = self._shelf_of_attempt(), self._watcher.identity
        if shelf is None or identity is None:
            return None
        return Handover(shelf, self._watcher.settings.spool, identity.rank)

    def _shelf_of_attempt(self) -> Shelf | None:
        identity = self._watcher.identity
        if self._shelf is None and identity is not None and identity.attempt_key is not None:
            self._shelf = Shelf(self._watcher.settings.spool, identity.attempt_key)
        return self._shelf

    def _write(self, report: _Report, told: dict[str, Any]) -> None:
        self._seconds += report.seconds
        identity = self._watcher.identity
        own = 0 if identity is None else identity.rank
        self._watcher.append("autopsy", report.as_message(own) | told)


def _shards_for(model: WatchedModel, due: _Due) -> AbstractContextManager[Mapping[int, IO[bytes]]]:
    """By rank, what a replay needs; nothing where the parameters are not sharded.

    Raises:
        NoShardsError: they are not to be had; also when the context is entered.
    """
    if model.shards is None:
        return nullcontext({})
    if due.handover is None:
        raise NoShardsError("the ranks that hold parts of the parameters were not asked for them")
    return due.handover.own(due.name, model.shards)


def _pass_of(moment: Moment, microbatch: int | None) -> Pass | None:
    """The pass that went bad; None when it is not known."""
    if microbatch is None:
        return moment.passes[0] if len(moment.passes) == 1 else None
    return next((one for one in moment.passes if one.backward == microbatch), None)


def _why_not(moment: Moment, one: Pass | None) -> str:
    """Why a pass cannot be replayed; "" when it can."""
    if one is None:
        many = len(moment.passes)
        if many:
            return f"which of {many} passes it was is not known"
        return "no gradient was seen to come back to the output of a pass, as when that holds no tensor"
    if one.capsule is None:
        return "nothing was kept of it"
    if one.output is True and one.entering is False:
        return LOSS
    return one.capsule.why_not()


def _not_done(reason: str) -> dict[str, Any]:
    return {"replay": "REPLAY_NOT_DONE", "reason": reason}
