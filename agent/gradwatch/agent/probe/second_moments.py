"""An optimizer is about to take gradients that its second moment cannot: say so, and let the guard know."""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING, Any

from gradwatch.agent.probe.guard import after_closure
from gradwatch.agent.probe.overflow import could_overflow, keeps_squares, overflow_in

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradwatch.agent.probe.model import WatchedModel
    from gradwatch.agent.probe.overflow import Overflow
    from gradwatch.agent.probe.watcher import Watcher

# The part of the probe, for its fuse.
PART = "second moments"
# Sets of parameters that are told of while updates overflow one after the other.
_TOLD = 16


class SecondMoments:
    """Looks at the gradients of an update attempt, when the reduced ones were large enough for a reason to.

    Args:
        watcher: the process's.
    """

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        # By optimizer, while its updates overflow: what has been told of.
        self._told: weakref.WeakKeyDictionary[Any, set[frozenset[int]]] = weakref.WeakKeyDictionary()
        self._newest: tuple[int, frozenset[int]] = (-1, frozenset())

    def before(
        self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """An update is about to be attempted that no guard can skip.

        Returns:
            Other arguments for `step`, or None.
        """
        if not keeps_squares(optimizer):
            return None

        def look() -> None:
            # Of its own models only: another one that has gone bad would hide what is large here.
            self.overflows(optimizer, self._watcher.models_of(optimizer), skipped=False)

        wrapped: tuple[tuple[Any, ...], dict[str, Any]] | None = after_closure(
            args, kwargs, self._watcher.thread.within(look)
        )
        if wrapped is None:
            look()
        return wrapped

    def overflows(self, optimizer: Any, models: Sequence[WatchedModel], *, skipped: bool) -> bool:
        """Whether the optimizer's second moment would overflow by its gradients as they are now.

        The same on every rank, as the reduced gradients are. Never raises: a closure of the script's may be
        what calls it.

        Args:
            optimizer: about to take them.
            models: watched, on the host, that it updates.
            skipped: the guard will keep the update from being applied; for the record.
        """
        return bool(self._watcher.fuses.call(PART, self._overflows, optimizer, models, skipped=skipped))

    def _overflows(self, optimizer: Any, models: Sequence[WatchedModel], *, skipped: bool) -> bool:
        # What is not finite is told of elsewhere. `max` with a NaN would depend on the order.
        finite = [model.reduced_magnitude for model in models if math.isfinite(model.reduced_magnitude)]
        over = None
        if finite and could_overflow(optimizer, max(finite)):
            # A fused optimizer divides by the scale itself.
            scale = getattr(optimizer, "grad_scale", None)
            over = overflow_in(optimizer, 1.0 if scale is None else float(scale))
        if over is None:
            self._told.pop(optimizer, None)
            return False
        self._tell(optimizer, over, models, skipped=skipped)
        return True

    def _tell(self, optimizer: Any, over: Overflow, models: Sequence[WatchedModel], *, skipped: bool) -> None:
        owners = [model for model in models if id(over.parameter) in model.parameter_ids]
        if not owners:
            return
        model = owners[0]
        told = self._told.setdefault(optimizer, set())
        round_, known = self._newest
        # An optimizer inside of another one takes some of the same gradients.
        inside = round_ == model.last_round and over.parameters <= known
        if inside or over.parameters in told or len(told) >= _TOLD:
            return
        self._newest = (model.last_round, over.parameters)
        info, last = model.info_of(over.parameter), model.recorder.newest
        message: dict[str, Any] = {
            "root": model.root,
            "round": model.last_round,
            "step": self._watcher.clock.step,
            "parameter": info.name,
            "module": info.module,
            "module_class": info.module_class,
            "dtype": info.dtype,
            "numel": info.numel,
            "magnitude": over.magnitude,
            "limit": over.limit,
            "parameters_total": len(over.parameters),
            "optimizer": type(optimizer).__name__,
            "skipped": skipped,
        }
        if last is not None and last.round == model.last_round:
            local = model.recorder.magnitude(model.key_of(over.parameter))
            if local is not None:
                message["local_magnitude"] = local
            if last.batch is not None:
                message["batch"] = last.batch
        self._watcher.append("optimizer_state", message)
        if not told:
            self._watcher.round_log.tell_flight(model)
        told.add(over.parameters)
