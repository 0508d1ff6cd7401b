"""Watch what optimizers update and no wrapped model owns: a bare head whose gradients the script averages.

They are looked at when each backward pass has ended, before anybody averages them. Such a pass is no round:
ranks need not have the same of them, and rounds have to be equal on all. So a finding carries the round in
whose backward pass it arose, nothing is replayed, and the guard does not go by it.
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from typing import TYPE_CHECKING, Any

from gradwatch.agent.probe.model import can_be_followed, is_followed, on_arrival
from gradwatch.agent.probe.owners import names_of
from gradwatch.agent.probe.parameters import parameters_of
from gradwatch.agent.probe.single_model import SingleModel

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch
    from torch.utils.hooks import RemovableHandle

    from gradwatch.agent.probe.rounds import Moment
    from gradwatch.agent.probe.watcher import Watcher

# The part of the probe, for its fuse.
PART = "unowned"
# Parameters that are named when they are not looked at.
_NAMED = 4


class UnownedModel(SingleModel):
    """The parameters of a process's optimizers that no watched model owns.

    Args:
        optimizers: of these, kept weakly; others as for `SingleModel`.
    """

    replayed = False

    def __init__(self, optimizers: Sequence[Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # A weak reference to a parameter would be in the way of `torch.utils.swap_tensors`.
        self._parameters = []
        self.held_by(optimizers)

    def held_by(self, optimizers: Sequence[Any]) -> None:
        """The parameters are in these optimizers now."""
        self._optimizers = [weakref.ref(one) for one in optimizers]

    def parameters(self) -> list[torch.Tensor]:
        """Those that are still there."""
        alive = (one for known in self._optimizers if (one := known()) is not None)
        found = (
            one for optimizer in alive for one in parameters_of(optimizer) if id(one) in self.parameter_ids
        )
        return list({id(one): one for one in found}.values())

    def gradients(self) -> list[torch.Tensor]:
        """As they are now."""
        return [gradient for one in self.parameters() if (gradient := one.grad) is not None]

    def _places(self, order: Sequence[int]) -> Iterable[int]:
        """Among all gradients that have arrived, and not only these."""
        return dict.fromkeys(order)

    def attempted_by(self, optimizer: Any) -> None:
        """An optimizer is about to take the gradients, which the script may have averaged by now."""
        del optimizer
        self.catch_up()
        self._scaled, self._parameters_now, self._old = None, None, set()
        # Whoever averages them may have brought in what is bad.
        self.weights.tainted = True

    def _look_at(self, moment: Moment, gradients: list[tuple[int, torch.Tensor]]) -> None:
        super()._look_at(moment, gradients)
        self._moment = None
        self.look.send()
        if self.on_host:
            self._watcher.round_log.tally.settle(moment)


class UnownedWatch:
    """Finds such parameters in the optimizers of one process.

    Args:
        watcher: the process's.

    Attributes:
        outdated: optimizers, or watched models, are others now.
        off: nothing is looked at any more: other threads train, too.
        model: the parameters that are looked at; None without any.
        active: the same, once a gradient of theirs has arrived: before that it has no ordinal of its own.
    """

    def __init__(self, watcher: Watcher) -> None:
        self.outdated = False
        self.off = False
        self.model: UnownedModel | None = None
        self._watcher = watcher
        self._optimizers: list[weakref.ref[Any]] = []
        self._hooks: dict[int, tuple[int, RemovableHandle]] = {}
        self.active: UnownedModel | None = None
        self._stepped: weakref.WeakSet[Any] = weakref.WeakSet()

    def given(self, optimizer: Any) -> None:
        """An optimizer has been given parameters."""
        if all(known() is not optimizer for known in self._optimizers):
            self._optimizers = [known for known in self._optimizers if known() is not None]
            self._optimizers.append(weakref.ref(optimizer))
        self.outdated = True

    def leave(self) -> None:
        """Nothing is looked at from now on."""
        self.off = True
        self._drop()

    # ------------------------------------------------------------------ passes and updates

    def backward_begins(self, losses: Any, gradients: Any) -> None:
        """A backward pass begins at `losses`, with `gradients` or ones."""
        if self.off:
            return
        if self.outdated:
            self._refresh()
        if self.model is not None:
            if self.active is None:
                self.model.number(self._watcher.models_told)
            self.model.backward_begins(losses, gradients)

    def backward_over(self) -> None:
        """Gradients of a backward pass have arrived."""
        model = self.model
        if model is None or self.off:
            return
        order = self._watcher.arrivals.order
        if self.active is None and not {key for key, _ in self._hooks.values()}.isdisjoint(order):
            self.active = model
            self._watcher.admit_unowned(model)
            self.outdated = False
        model.backward_ended(order)

    def loss_scaled(self, losses: Any) -> None:
        """A GradScaler scales losses."""
        if self.model is not None:
            self.model.loss_scaled(losses)

    def stepping(self, optimizer: Any) -> None:
        """The outermost attempt of an update begins."""
        if self.off:
            return
        if self.model is not None:
            self.model.attempted_by(optimizer)
        if optimizer in self._stepped:
            return
        self._stepped.add(optimizer)
        if self._wraps():
            self._say_what_is_not_looked_at(optimizer)

    # ------------------------------------------------------------------ the model

    def _wraps(self) -> bool:
        """Whether a model is watched that is wrapped."""
        return any(not isinstance(model, SingleModel) for model in self._watcher.models)

    def _unowned(self, optimizers: Sequence[Any]) -> list[torch.Tensor]:
        """Parameters that are trained, of no watched model."""
        owned = {one for model in self._watcher.models for one in model.parameter_ids}
        trained = {
            id(one): one
            for optimizer in optimizers
            for one in parameters_of(optimizer)
            if one.requires_grad and id(one) not in owned
        }
        return list(trained.values())

    def _alive(self) -> list[Any]:
        return [one for known in self._optimizers if (one := known()) is not None]

    def _followed(self) -> list[torch.Tensor]:
        return [one for one in self._unowned(self._alive()) if can_be_followed(one)]

    def _ids(self) -> frozenset[int]:
        return frozenset() if self.model is None else self.model.parameter_ids

    def _refresh(self) -> None:
        if not self._wraps():
            return  # what trains alone is watched otherwise
        self.outdated = False
        parameters = self._followed()
        if parameters and {id(one) for one in parameters} != self._ids():
            # A training that is over may wait for the collector only, and would be taken for a bare head.
            del parameters
            gc.collect()
            parameters = self._followed()
        optimizers = self._alive()
        if parameters:
            ((device, _),) = Counter(one.device for one in parameters).most_common(1)
            parameters = [one for one in parameters if one.device == device]
        ids = {id(one) for one in parameters}
        # One that was made since may have the identity of one that is gone, but not its hook.
        if (
            self.model is not None
            and ids == self.model.parameter_ids
            and all(map(self._is_followed, parameters))
        ):
            self.model.held_by(optimizers)
            return
        self._drop()
        if not parameters:
            return
        for one in parameters:
            key = self._watcher.arrivals.new_key()
            self._hooks[id(one)] = key, on_arrival(one, self._watcher.arrivals.hook(key))
        self.model = UnownedModel(
            optimizers,
            self._watcher,
            names_of(optimizers, parameters, (), beside=True),
            {one: key for one, (key, _) in self._hooks.items()},
            device=device,
            root=self._watcher.models_told,
            before_telling=lambda: None,
        )

    def _is_followed(self, parameter: torch.Tensor) -> bool:
        _, handle = self._hooks[id(parameter)]
        return is_followed(parameter, handle)

    def _drop(self) -> None:
        model, self.model = self.model, None
        for _, handle in self._hooks.values():
            handle.remove()
        self._hooks.clear()
        self.active = None
        if model is not None:
            self._watcher.depart(model)

    def _say_what_is_not_looked_at(self, optimizer: Any) -> None:
        missed = [one for one in self._unowned([optimizer]) if id(one) not in self._hooks]
        if not missed:
            return
        names = [info.name for _, info in names_of([optimizer], missed, (), beside=True).parameters]
        listed = ", ".join(names[:_NAMED]) + (
            f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        )
        self._watcher.unwatched(
            f"{type(optimizer).__name__} updates parameters that no watched model owns, and the gradients of "
            f"{listed} are not looked at ({_kind_of(missed[0])})"
        )


def _kind_of(parameter: torch.Tensor) -> str:
    if hasattr(parameter, "_local_tensor"):
        return "a sharded tensor that fully_shard has not made"
    if not parameter.is_leaf:
        return "not a leaf of the autograd graph"
    return f"on {parameter.device}"
