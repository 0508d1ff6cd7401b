"""When a micro-batch is replayed.

On the host at the end of the first backward pass of a stretch that went bad: then the weights are those that
it ran with. On a device see `on_device.py`.
"""

from __future__ import annotations

import math
from contextlib import suppress
from typing import TYPE_CHECKING

from gradwatch.agent.probe.autopsy import PART
from gradwatch.agent.probe.autopsy.capsule import Capsules, ModelCapsules
from gradwatch.agent.probe.autopsy.due import Due, name_of, release
from gradwatch.agent.probe.autopsy.handover import NoShardsError
from gradwatch.agent.probe.autopsy.on_device import OnDevice
from gradwatch.agent.probe.autopsy.proof import take_checksums
from gradwatch.agent.probe.autopsy.replayer import PEERS, Replayer
from gradwatch.agent.probe.phases.loss_pass import settled

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from gradwatch.agent.probe.fsdp_shards import Shards
    from gradwatch.agent.probe.model import WatchedModel
    from gradwatch.agent.probe.rounds import Bucket, BucketFindings, Moment
    from gradwatch.agent.probe.watcher import Watcher


_UNWRAPPED = "only passes of wrapped models are replayed, and these parameters belong to none"


class Autopsies:
    """The autopsies of one process.

    Args:
        watcher: the process's.

    Attributes:
        capsules: what is kept of forward passes.
        on_device: those that wait for the next update attempt.
    """

    def __init__(self, watcher: Watcher) -> None:
        self.capsules = Capsules()
        self._watcher = watcher
        self._replayer = Replayer(watcher)
        self._due: dict[int, Due] = {}
        # By root, the rounds of bad passes for whose replays a clean one is to speak.
        self._rehearsals: dict[int, int] = {}
        self.on_device = OnDevice(watcher, self._replayer)

    @property
    def held(self) -> Iterable[int]:
        """Rounds whose autopsy is not written down yet."""
        # With that fuse blown no round's end is seen any more.
        on_host = self._due if self._watcher.fuses.intact("reduced") else ()
        return [*on_host, *self.on_device.held]

    def capsules_for(self, model: WatchedModel) -> ModelCapsules | None:
        """Where a model's passes are kept; None where none could be replayed."""
        on_host = self._watcher.settings.autopsy and model.on_host
        if not on_host and not self.on_device.can_replay(model):
            return None
        return ModelCapsules(self.capsules, model.module)

    def found(self, model: WatchedModel, findings: BucketFindings) -> None:
        """The first bad round of a stretch: have it replayed once the time has come. Never raises."""
        moment = findings.moment
        on = self._watcher.settings.autopsy and self._watcher.fuses.intact(PART)
        if not on or moment.round in self.held:
            return
        due = Due(moment, findings.origin.microbatch, settled(findings.passes), phase=findings.origin.phase)
        reason = model.why_not_replayed() or self._replayer.why_no_more()
        if reason is not None:
            self._replayer.leave(model, due, reason)
        elif not model.on_host:
            self.on_device.found(model, due)
        else:
            self._due[moment.round] = due
            if model.shards is not None and not due.why_not():
                due.handover = self._replayer.handover()
                if due.handover is not None:
                    due.handover.ask(due.name, model.shards)

    def looked_at(self, moment: Moment, bucket: Bucket) -> None:
        """A bucket of a round has been looked at, and is about to be reduced. Never raises."""
        due = self._due.get(moment.round)
        if due is not None:
            self._watcher.fuses.call(PART, take_checksums, bucket, moment.magnitudes, due.checksums)

    def not_replayed(self, model: WatchedModel, findings: BucketFindings) -> None:
        """The first bad round of a stretch, of parameters of which no pass is known. Never raises."""
        if not self._watcher.settings.autopsy or not self._watcher.fuses.intact(PART):
            return
        due = Due(findings.moment, findings.origin.microbatch, findings.passes, phase=findings.origin.phase)
        self._watcher.fuses.call(PART, self._replayer.leave, model, due, _UNWRAPPED)

    def forget(self, moment: Moment) -> None:
        """Its round is over, by an exception."""
        self._due.pop(moment.round, None)

    def before_reduction(self, model: WatchedModel, moment: Moment) -> None:
        """The last gradients of a round are about to be reduced. Never raises."""
        due = self._due.get(moment.round)
        if due is not None:
            # Whoever sees what the reduction gives finds it.
            self._watcher.fuses.call(PART, self._replayer.share, model, due)

    def round_over(self, model: WatchedModel, moment: Moment, *, bad: bool | None) -> None:
        """The reductions of a round are over, and the backward pass with them. Never raises.

        Args:
            model: whose round it is.
            moment: the round's.
            bad: whether what they gave is; None when not known yet.
        """
        if not self._watcher.settings.autopsy:
            release(moment)
            return
        if not model.on_host:
            self.on_device.reduced(model, moment)
            return
        fuses = self._watcher.fuses
        due = self._due.get(moment.round)
        try:
            if fuses.intact(PART):
                if due is None:
                    # All ranks have seen what the reductions gave of the round that it was for.
                    self._replayer.clear()
                else:
                    self._judge(moment, self._replayer.own(model, due))
                if due is None or due.handover is None:
                    self._help(model, moment, bad=bool(bad) and due is None)
                if due is None and not bad:
                    self._rehearse(model, moment)
        except Exception as error:
            fuses.blow(PART, error)
        finally:
            release(moment)
            if self._due.pop(moment.round, None) is not None:
                self._watcher.write_progress()

    def start_over(self) -> None:
        """A checkpoint has been loaded: rounds count from 0 again."""
        self._due.clear()
        self._rehearsals.clear()
        self.finish()

    def finish(self) -> None:
        """The process ends."""
        self.on_device.finish()
        self._replayer.clear()

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
            self._judge(moment, self._replayer.anothers(model, moment, most=PEERS))

    def _judge(self, moment: Moment, told: dict[str, Any] | None) -> None:
        """Have the next clean pass replayed where the bad one left nothing to compare its replay with."""
        if told is not None and told["replay"] == "REPLAY_FINITE" and "faithful" not in told:
            self._rehearsals.setdefault(moment.root, moment.round)

    def _rehearse(self, model: WatchedModel, moment: Moment) -> None:
        if moment.root not in self._rehearsals or model.why_not_replayed() is not None:
            return
        if all(map(math.isfinite, moment.magnitudes.values())):
            self._replayer.rehearse(model, moment, self._rehearsals.pop(moment.root))

    def _hand_over(self, model: WatchedModel, shards: Shards, moment: Moment) -> None:
        """Lay our shards down if another rank has asked for them; replay its pass, if nobody else does."""
        replayer, name = self._replayer, name_of(moment)
        shelf, handover = replayer.shelf, replayer.handover()
        if shelf is None or handover is None:
            return
        with suppress(OSError, NoShardsError):
            asker = handover.lay_down(name, shards)
            if asker is None:
                return
            if all(map(math.isfinite, moment.magnitudes.values())) and shelf.claim(name):
                with handover.others(name, shards, asker) as files:
                    self._judge(moment, replayer.anothers(model, moment, files))
        handover.wait_until_opened(name)
