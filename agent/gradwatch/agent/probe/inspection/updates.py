"""What each update attempt is given, and what it leaves: gradients that were changed after their reduction.

A watched model's reduced gradients have been looked at. A script may change them before the optimizer takes
them: divide by a norm of 0, or add those of a second backward pass that nobody reduced. Their versions tell;
only what has changed is looked at again, in host memory. On a device that would wait, so it is not known.
"""

from __future__ import annotations

import functools
import math
import weakref
from typing import TYPE_CHECKING, Any

import torch

from gradwatch.agent.probe.guard import after_closure
from gradwatch.agent.probe.inspection.optimizer_evidence import has_finite_rates
from gradwatch.agent.probe.rounds import bad_gradients

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from gradwatch.agent.probe.model import WatchedModel
    from gradwatch.agent.probe.watcher import Watcher

# The part of the probe, for its fuse.
PART = "updates"
# The first update, and those by which a GradScaler finds its range: weights may not have moved before.
_FIRST_UPDATES = 4

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Updates:
    """The update attempts of one process.

    Args:
        watcher: the process's.
    """

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        # By optimizer: the models that it updates, and how many parameters it had then.
        self._models: weakref.WeakKeyDictionary[Any, tuple[int, list[WatchedModel]]] = (
            weakref.WeakKeyDictionary()
        )

    # ------------------------------------------------------------------ who updates what

    def forget_models(self) -> None:
        """Models, or the parameters of optimizers, are others now."""
        self._models.clear()

    def models_of(self, optimizer: Any) -> list[WatchedModel]:
        """The watched models of which the optimizer updates parameters."""
        count = sum(len(group["params"]) for group in optimizer.param_groups)
        known = self._models.get(optimizer)
        if known is None or known[0] != count:
            updated = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            models = [
                model for model in self._watcher.all_models if not updated.isdisjoint(model.parameter_ids)
            ]
            known = self._models[optimizer] = count, models
        return known[1]

    def optimizers_of(self, model: WatchedModel) -> list[Any]:
        """Those that have attempted an update of a model."""
        return [optimizer for optimizer, (_, models) in list(self._models.items()) if model in models]

    def state_loaded(self, optimizer: Any) -> None:
        """An optimizer has loaded a state: no update has made bad what is bad in it, or in the weights."""
        for model in self.models_of(optimizer):
            model.weights.tainted = model.weights.due = True

    # ------------------------------------------------------------------ before

    def backward_over(self) -> None:
        """Gradients of a backward pass have arrived."""
        order = self._watcher.arrivals.order
        for model in self._watcher.models:
            if model.reduces and not model.differs_by_rank:
                model.pass_over(order)

    def before(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """An optimizer is about to take its gradients, unscaled; after its closure if it has one.

        Returns:
            Other arguments for `step`, or None.
        """
        models = [model for model in self.models_of(optimizer) if model.on_host]
        if not models:
            return None
        look = functools.partial(self._look, optimizer, models)
        wrapped: Call | None = after_closure(args, kwargs, self._watcher.thread.within(look))
        if wrapped is None:
            look()
        return wrapped

    def _look(self, optimizer: Any, models: Iterable[WatchedModel]) -> None:
        """Never raises: a closure of the script's may be what calls it."""
        fuses = self._watcher.fuses
        if not fuses.intact(PART):
            return
        try:
            for model in models:
                self._look_at(model, optimizer)
        except Exception as error:
            fuses.blow(PART, error)

    def _look_at(self, model: WatchedModel, optimizer: Any) -> None:
        model.taken_bad = False
        if model.attempts.count == 0:
            self._watcher.weights.first_update_begins(model)
        if model.bad_round is not None or (model.reduces and not model.taken.known):
            model.weights.tainted = True
        if model.unreduced:
            model.eager = True
        if not model.taken.known:
            return
        given = model.as_taken()
        if not model.taken.changed(given):
            return
        bad = bad_gradients(model.changed_gradients())
        if not bad:
            model.taken.remember(given)
            return
        own = {
            key: parameter
            for group in optimizer.param_groups
            for parameter in group["params"]
            if (key := model.find_key(parameter)) is not None
        }
        bad = [one for one in bad if one.key in own]
        unreduced = [one for one in bad if one.key in model.unreduced]
        if unreduced:
            model.found_unreduced(unreduced)
            model.weights.tainted = True
        elif bad:
            model.taken_bad = True
            self._watcher.weights.about_to_be_bad(model, optimizer, own[bad[0].key], bad)

    # ------------------------------------------------------------------ after

    def after(self, optimizer: Any) -> None:
        """The outermost attempt of an update is over."""
        rates_are_finite = has_finite_rates(optimizer)
        for model in self.models_of(optimizer):
            first = model.attempts.count < _FIRST_UPDATES and model.has_not_moved()
            # A rate that is not finite may be another one by the next round.
            first = first or not rates_are_finite
            self._watcher.weights.updated(model, [optimizer], first=first)
            model.attempts.add(optimizer)
            model.update_over()

    # ------------------------------------------------------------------ what changes gradients and says so

    def clipped(self, parameters: Any, norm: Any) -> None:
        """`clip_grad_norm_` has clipped the gradients of these, and their norm was finite."""
        if type(norm) is not torch.Tensor or norm.device.type != "cpu" or not math.isfinite(norm.item()):
            return
        self._finite([parameters] if isinstance(parameters, torch.Tensor) else parameters)

    def unscaled(self, scaler: Any, optimizer: Any) -> None:
        """A GradScaler has unscaled the gradients of an optimizer, and knows whether they are finite."""
        # Private; without it they are looked at again.
        state = getattr(scaler, "_per_optimizer_states", {}).get(id(optimizer), {})
        flags = list(state.get("found_inf_per_device", {}).values())
        if flags and all(flag.device.type == "cpu" and flag.item() == 0.0 for flag in flags):
            self._finite(parameter for group in optimizer.param_groups for parameter in group["params"])

    def _finite(self, parameters: Iterable[torch.Tensor]) -> None:
        """The gradients of these have been changed, and are finite."""
        models = [model for model in self._watcher.models if model.on_host and model.taken.known]
        if not models:
            return
        finite = {id(gradient) for one in parameters if (gradient := one.grad) is not None}
        for model in models:
            model.taken.refresh(model.as_taken(), finite)


def patch_gradient_changes(
    clipped: Callable[[Any, Any], object], unscaled: Callable[[Any, Any], object]
) -> None:
    """Have what changes gradients, and finds out whether they are finite, say so. Results stay as they are.

    Args:
        clipped: called with (parameters, their norm) after each `clip_grad_norm_` by a positive norm; must
            not raise.
        unscaled: called with (GradScaler, optimizer) after each `unscale_`; must not raise.
    """
    original = torch.nn.utils.clip_grad_norm_

    @functools.wraps(original)
    def clip_grad_norm_(
        parameters: Any, max_norm: Any, norm_type: Any = 2.0, *args: Any, **kwargs: Any
    ) -> Any:
        if torch.compiler.is_compiling():
            return original(parameters, max_norm, norm_type, *args, **kwargs)
        if not isinstance(parameters, torch.Tensor):
            # It may be an iterator, which ends.
            parameters = list(parameters)
        norm = original(parameters, max_norm, norm_type, *args, **kwargs)
        if _keeps_finite(max_norm, norm_type):
            clipped(parameters, norm)
        return norm

    torch.nn.utils.clip_grad_norm_ = clip_grad_norm_
    torch.nn.utils.clip_grad.clip_grad_norm_ = clip_grad_norm_

    scaler = torch.amp.GradScaler
    unscale = scaler.unscale_

    @functools.wraps(unscale)
    def unscale_(self: Any, optimizer: Any) -> None:
        unscale(self, optimizer)
        if self.is_enabled():
            unscaled(self, optimizer)

    scaler.unscale_ = unscale_  # type: ignore[method-assign]


def _keeps_finite(max_norm: Any, norm_type: Any) -> bool:
    """Whether a finite norm of this type tells that all is finite, and stays so when it is clipped."""
    numbers = isinstance(max_norm, (int, float)) and isinstance(norm_type, (int, float))
    return numbers and math.isfinite(max_norm) and norm_type > 0
