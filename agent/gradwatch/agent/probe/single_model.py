"""What a process trains that trains alone: all parameters of its optimizers, with no reduction to go by.

A round is one update attempt. Gradients are looked at when each backward pass has ended, which is a
micro-batch of the round, and again when an optimizer takes them: what a script does to them in between is its
own affair.
"""

from __future__ import annotations

import functools
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gradwatch.agent.probe.look import HostLook
from gradwatch.agent.probe.model import WatchedModel
from gradwatch.agent.probe.parameters import parameters_of
from gradwatch.agent.probe.passes import Leaves, Pass, both
from gradwatch.agent.probe.rounds import Bucket, bad_gradients

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import torch

    from gradwatch.agent.probe.parameters import Names
    from gradwatch.agent.probe.passes import Fact
    from gradwatch.agent.probe.rounds import BucketFindings, Moment
    from gradwatch.agent.probe.watcher import Watcher

# Ordinals of buckets, on a device: gradients that were there before a backward pass, and those after it.
_BEFORE, _AFTER = 1, 0


class SingleModel(WatchedModel):
    """The parameters of a process's optimizers under watch.

    Args:
        watcher: the process's.
        names: of the parameters, in the optimizers' order.
        keys: of the parameters in the order of arrival, by id.
        device: where the gradients are that are looked at.
        root: ordinal of this model in its process.
        before_telling: called before bad gradients are told of: the process may be no rank yet.

    Attributes:
        device: as given.
    """

    reduces = False

    def __init__(
        self,
        watcher: Watcher,
        names: Names,
        keys: dict[int, int],
        *,
        device: torch.device,
        root: int,
        before_telling: Callable[[], object],
    ) -> None:
        self.device = device
        self._given_names, self._given_keys = names, keys
        super().__init__(
            watcher,
            None,
            [parameter for parameter, _ in names.parameters],
            device=device,
            root=root,
            wrapper="",
            group_size=1,
        )
        # They hold the parameters, which are the script's.
        del self._given_names, self._given_keys
        self._before_telling = before_telling
        self._counted = self.parameter_ids
        self._scaled: Fact = None
        self._parameters_now: Callable[[], Fact] | None = None
        self._begun: Moment | None = None
        # Keys of what has arrived in the newest round, and of what was bad before it.
        self._arrived: set[int] = set()
        self._old: set[int] = set()
        # By id, the optimizers that have taken its gradients.
        self._takers: set[int] = set()
        # Bad, the last time that the host looked: no news.
        self._spoilt: set[int] = set()

    def knows(self, parameters: Iterable[torch.Tensor]) -> bool:
        """Whether all of them are watched by this model."""
        return all(id(parameter) in self.parameter_ids for parameter in parameters)

    def count(self, parameters: Iterable[torch.Tensor]) -> None:
        """An update of these is a step."""
        self._counted = frozenset(id(parameter) for parameter in parameters)

    def counted(self) -> list[torch.Tensor]:
        """See `WatchedModel.counted`."""
        return [one for one in self.parameters() if id(one) in self._counted]

    # ------------------------------------------------------------------ the passes

    def loss_scaled(self, losses: Any) -> None:
        """See `WatchedModel.loss_scaled`."""
        if not self._capturing():
            self._scaled = both(self._scaled, self._fact(losses))

    def backward_begins(self, losses: Any, gradients: Any) -> None:
        """A backward pass begins.

        Args:
            losses: at what tensors.
            gradients: that enter there; None for ones.
        """
        if self._capturing():
            return
        began = time.perf_counter()
        self._abandon()
        loss = self._fact(losses) if self._scaled is None else self._scaled
        entering = True if gradients is None else self._fact(gradients)
        moment = self._begun = self._begin(
            Pass(output=loss, entering=entering, scaled_loss=self._scaled, loss=self._watcher.losses.current)
        )
        if isinstance(self.look, HostLook):
            if self._spoilt:
                carried = [one for one in self._gradients_by_key() if one[0] in self._spoilt]
                self._spoilt = {key for key, gradient in carried if not self.look.fact([gradient])}
            bad = self._spoilt
        else:
            carried = self._gradients_by_key()
            bad = {key for key, _ in carried}
            if carried:
                self.look.local(moment, Bucket(_BEFORE, None, lambda: carried), brief=False)
        if self._moment is None:
            self._old = set(bad)
        self._watcher.spent(time.perf_counter() - began)

    def backward_ended(self, order: Sequence[int]) -> None:
        """It is over.

        Args:
            order: keys of the parameters whose gradients have arrived.
        """
        arrived = dict.fromkeys(key for key in order if key in self._infos)
        if not arrived or self._capturing():
            self._abandon()
            return
        began = time.perf_counter()
        # Without a call of `torch.autograd.backward` nothing is known of the loss.
        moment = self._begun or self._begin(Pass())
        self._begun = None
        moment.order[:] = self._places(order)
        self._look_at(moment, [one for one in self._gradients_by_key() if one[0] in arrived])
        self._watcher.spent(time.perf_counter() - began)

    def _places(self, order: Sequence[int]) -> Iterable[int]:
        """Its own among the keys that have arrived, in their order."""
        return dict.fromkeys(key for key in order if key in self._infos)

    def _begin(self, one: Pass) -> Moment:
        if self._parameters_now is None:
            # An update may follow, before a read-out.
            self._parameters_now = functools.cache(lambda: self.look.fact(self.parameters()))
        ordinal = self._watcher.arrivals.ordinal
        # What went bad in the micro-batches before has been told of.
        known = replace(one, batch=self._watcher.batch, backward=ordinal, before=True)
        return self._watcher.round_log.begin_pass(self, known, self._parameters_now)

    def _look_at(self, moment: Moment, gradients: list[tuple[int, torch.Tensor]]) -> None:
        watcher = self._watcher
        if self._moment is None:
            self._arrived, self._takers = set(), set()
            self._new_round()
            self._watcher.weights.round_begins(self, moment, due=self._replicas.is_due())
        elif isinstance(self.look, HostLook):
            watcher.round_log.forget(self._moment)
        self._moment = moment
        self._arrived |= {key for key, _ in gradients}
        findings = self.look.local(moment, Bucket(_AFTER, None, lambda: gradients), brief=False)
        if findings is None:
            return
        bad = {one.key for one in findings.gradients}
        new = bad - self._spoilt
        self._spoilt |= bad
        if new:
            self._before_telling()
            watcher.round_log.found(self, _only(findings, new))

    def news(self, findings: list[BucketFindings]) -> list[BucketFindings]:
        """See `WatchedModel.news`: what was bad before the backward pass is none."""
        old = {bad.key for one in findings if one.bucket == _BEFORE for bad in one.gradients}
        fresh = [_only(one, {bad.key for bad in one.gradients} - old) for one in findings]
        return [one for one in fresh if one.bucket == _AFTER and one.gradients]

    def _abandon(self) -> None:
        """The pass brought nothing here."""
        moment, self._begun = self._begun, None
        if moment is not None:
            self._watcher.round_log.forget(moment)

    # ------------------------------------------------------------------ the update

    def attempted_by(self, optimizer: Any) -> None:
        """An optimizer is about to take the gradients: the round ends."""
        if self._capturing():
            return
        began = time.perf_counter()
        self.catch_up()
        own = {
            key
            for parameter in parameters_of(optimizer)
            if (key := self._keys.get(id(parameter))) is not None
        }
        gradients = self._gradients_by_key()
        if self._moment is None:
            # The second optimizer of the same update has nothing new. Gradients that no
            # backward pass has brought have to be looked at here.
            again = id(optimizer) in self._takers
            unseen = [one for one in gradients if one[0] in own and (again or one[0] not in self._arrived)]
            if unseen:
                self._spoilt -= own
                self._look_at(self._begin(Pass()), unseen)
        if self._moment is not None:
            taken = own | (self._arrived - self._old)
            self._end_round(optimizer, [one for one in gradients if one[0] in taken])
        self._takers.add(id(optimizer))
        self._watcher.spent(time.perf_counter() - began)

    def _end_round(self, optimizer: Any, taken: list[tuple[int, torch.Tensor]]) -> None:
        moment, self._moment = self._moment, None
        if moment is None:
            return
        self._scaled, self._parameters_now = None, None
        if isinstance(self.look, HostLook):
            self._watcher.round_log.remember(self, moment, moment.loss, moment.loss_scale)
        self._watcher.round_log.end_local(moment, seen=isinstance(self.look, HostLook))
        was_finite = not self._spoilt and not self._old
        self._old = set()
        self.look_after(moment, [gradient for _, gradient in taken])
        if self.on_host and was_finite and self.bad_round == moment.round:
            self._changed_since(optimizer, taken)

    def _changed_since(self, optimizer: Any, taken: list[tuple[int, torch.Tensor]]) -> None:
        """The backward passes gave finite gradients, and the optimizer is given others."""
        parameters = {self._keys[id(one)]: one for one in self.parameters()}
        bad = bad_gradients(taken)
        if bad:
            self._watcher.weights.about_to_be_bad(self, optimizer, parameters[bad[0].key], bad)

    def start_over(self) -> None:
        """See `WatchedModel.start_over`."""
        super().start_over()
        self._begun, self._parameters_now, self._scaled = None, None, None
        self._arrived, self._old, self._spoilt = set(), set(), set()

    def give_up(self) -> None:
        """See `WatchedModel.give_up`."""
        self._abandon()
        super().give_up()

    # ------------------------------------------------------------------ about it

    def _names(self, module: torch.nn.Module | None, parameters: Sequence[torch.Tensor]) -> Names:
        del module, parameters
        return self._given_names

    def _key_of(self, parameter: torch.Tensor) -> int:
        return self._given_keys[id(parameter)]

    def _gradients_by_key(self) -> list[tuple[int, torch.Tensor]]:
        return [
            (self._keys[id(parameter)], gradient)
            for parameter in self.parameters()
            if (gradient := parameter.grad) is not None and gradient.device == self.device
        ]

    def _fact(self, nested: Any) -> Fact:
        tensors = Leaves(nested).tensors
        return self.look.fact(tensors) if tensors else None


def _only(findings: BucketFindings, keys: set[int]) -> BucketFindings:
    return replace(findings, gradients=[bad for bad in findings.gradients if bad.key in keys])
