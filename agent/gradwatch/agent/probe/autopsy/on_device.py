"""When a micro-batch is replayed on a device: what is known of it there comes late.

At the next update attempt after the fault was read out, which is outside of any forward or backward pass, if
the weights are still those that the pass ran with: the guard or a GradScaler has left the update out, or the
policy has every attempt wait for the look at its gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch._compile import _disable_dynamo

from gradwatch.agent.probe.autopsy import PART
from gradwatch.agent.probe.autopsy.due import Due, name_of, release
from gradwatch.agent.probe.autopsy.replayer import PEERS
from gradwatch.agent.probe.guard import after_closure
from gradwatch.agent.probe.parameters import parameters_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gradwatch.agent.probe.autopsy.capsule import Capsule
    from gradwatch.agent.probe.autopsy.replayer import Replayer
    from gradwatch.agent.probe.model import WatchedModel
    from gradwatch.agent.probe.rounds import Moment
    from gradwatch.agent.probe.watcher import Watcher

# That a rank whose own gradients were finite waits for another rank's pass to be laid down.
HELP_SECONDS = 2.0
# Rounds under way of which it is known where their backward passes began.
_MAX_ROUNDS = 8


@dataclass(frozen=True)
class _Pending:
    """Something to be done at the next update attempt of a model; without a `due` another rank's pass."""

    model: WatchedModel
    moment: Moment
    due: Due | None


class OnDevice:
    """Of one process.

    Args:
        watcher: the process's.
        replayer: replays.
    """

    def __init__(self, watcher: Watcher, replayer: Replayer) -> None:
        self._watcher = watcher
        self._replayer = replayer
        self._pending: list[_Pending] = []
        # Where the backward pass of each round began that is not read out yet.
        self._roots: dict[int, list[Any]] = {}
        # By root: of the newest round that was reduced.
        self._newest: dict[int, Moment] = {}
        self._kept: list[Capsule] = []

    @property
    def held(self) -> Iterable[int]:
        """Rounds whose autopsy is not written down yet."""
        intact = self._watcher.fuses.intact(PART)
        return [one.moment.round for one in self._pending if one.due is not None] if intact else ()

    def can_replay(self, model: WatchedModel) -> bool:
        """Whether passes of a model are replayed as it is done on a device."""
        settings = self._watcher.settings
        return settings.autopsy and not (model.on_host or model.differs_by_rank) and settings.holds_weights

    def found(self, model: WatchedModel, due: Due) -> None:
        """A fault of this rank's own has been read out."""
        due.roots = self._roots.get(due.moment.round)
        self._pending.append(_Pending(model, due.moment, due))

    def reduced(self, model: WatchedModel, moment: Moment) -> None:
        """The reductions of a round are under way."""
        if self.can_replay(model):
            self._newest[model.root] = moment
            self._roots[moment.round] = [*self._watcher.losses.roots]
            while len(self._roots) > _MAX_ROUNDS:
                del self._roots[next(iter(self._roots))]

    def landed(self, model: WatchedModel, moment: Moment, *, bad: bool, new: bool) -> None:
        """A round has been read out.

        Args:
            model: whose it is.
            moment: the round's.
            bad: whether its reduced gradients are.
            new: the first of a stretch, and not the work of a GradScaler.
        """
        self._roots.pop(moment.round, None)
        if any(one.moment is moment for one in self._pending):
            return
        if bad and new and model.group_size > 1 and self.can_replay(model) and self._replayer.shelf:
            self._pending.append(_Pending(model, moment, None))
            return
        if not bad:
            self._replayer.clear()
        release(moment)

    # ------------------------------------------------------------------ around an update attempt

    def before(
        self, attempt: Any, optimizer: Any, args: Any, kwargs: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """An update is about to be attempted.

        Args:
            attempt: what does it: the optimizer, or a GradScaler, which takes no closure.
            optimizer: the optimizer.
            args: of its `step`; None for that of a GradScaler.
            kwargs: likewise.

        Returns:
            Other arguments for `step`, or None.
        """
        self._kept = []
        # One flag: where the script compiles its optimizer's step, all that is read here is looked at, too.
        if not self._watcher.replays_on_device:
            return None
        wait = self._watcher.settings.read_out_every_step

        def look() -> None:
            models = [model for model in self._watcher.models_of(optimizer) if not model.on_host]
            for model in models:
                model.catch_up(wait=wait)
            self.replay_pending(models)
            if attempt is not optimizer:
                self.may_be_left_out(optimizer, models)

        wrapped: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        if attempt is optimizer and wait:
            wrapped = after_closure(args, kwargs, self._watcher.thread.within(look))
        if wrapped is None:
            look()
        return wrapped

    def replay_pending(self, models: Sequence[WatchedModel]) -> None:
        """Replay what waits for the next update attempt of these models, which is now. Never raises."""
        now = [one for one in self._pending if one.model in models]
        if not now or not self._watcher.fuses.intact(PART):
            return
        self._pending = [one for one in self._pending if one.model not in models]
        self._replay(now)

    def may_be_left_out(self, optimizer: Any, models: Iterable[WatchedModel]) -> None:
        """An update will be attempted that no weight takes if its gradients are bad; the host does not know.

        Args:
            optimizer: that will attempt it.
            models: that it updates.
        """
        updated = set(map(id, parameters_of(optimizer)))
        for model in models:
            moment = self._newest.get(model.root)
            if moment is not None and model.parameter_ids <= updated:
                capsules = (one.capsule for one in moment.passes)
                self._kept += [one for one in capsules if one is not None and one.is_of_these_weights]

    def after(self, attempt: Any, optimizer: Any) -> None:
        """The attempt is over, or the optimizer's own step inside of a GradScaler's; as in `before`."""
        if attempt is optimizer and any(group.get("fused") for group in optimizer.param_groups):
            for model in self._watcher.models_of(optimizer):
                model.fused_updates += 1
        kept, self._kept = self._kept, []
        for one in kept:
            one.update_left_out()

    def finish(self) -> None:
        """No update attempt will come any more."""
        pending, self._pending = self._pending, []
        for one in pending:
            if one.due is not None:
                self._replayer.leave(
                    one.model, one.due, "no update was attempted after the fault was read out"
                )
            release(one.moment)
        self._newest.clear()
        self._roots.clear()
        self._kept = []

    @_disable_dynamo
    def _replay(self, now: Sequence[_Pending]) -> None:
        try:
            for one in now:
                if one.due is not None:
                    self._share(one.model, one.due)
            for one in now:
                if one.due is None:
                    self._help(one.model, one.moment)
                else:
                    self._replayer.own(one.model, one.due)
        except Exception as error:
            self._watcher.fuses.blow(PART, error)
        finally:
            for one in now:
                release(one.moment)
            self._watcher.write_progress()

    def _share(self, model: WatchedModel, due: Due) -> None:
        """Lay the capsule down, or say that none will come: others wait for it."""
        shelf = self._replayer.shelf
        if not self._replayer.share(model, due) and shelf is not None and model.group_size > 1:
            shelf.decline(due.name)

    def _help(self, model: WatchedModel, moment: Moment) -> None:
        """Replay another rank's pass, unless somebody else does, or the weights have changed since."""
        shelf, name = self._replayer.shelf, name_of(moment)
        own = next((one.capsule for one in moment.passes if one.capsule is not None), None)
        if shelf is None or own is None or not own.is_of_these_weights:
            return
        if shelf.claim(name, most=PEERS) and shelf.wait_for_capsule(name, HELP_SECONDS):
            self._replayer.anothers(model, moment, most=PEERS)
