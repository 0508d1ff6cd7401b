"""Back to a checkpoint without a restart: all ranks call the script's own function in the same step.

Opt-in by `watch(model, optimizer, load=fn)`. At the end of each update attempt every rank offers the
order that it has seen, and looks at what all had seen one attempt before (`agreement.py`): the answer is
the same on all ranks. Whatever fails, the collector is told, and has the job restarted instead.
"""

from __future__ import annotations

import functools
import os
import sys
import time
import traceback
import weakref
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.join import Join

from gradwatch.agent.probe.agreement import Agreement
from gradwatch.agent.probe.order import OrderFile, generation_of, why_not

if TYPE_CHECKING:
    from collections.abc import Callable

    from gradwatch.agent.probe.order import LoadOrder
    from gradwatch.agent.probe.watcher import Watcher

_NOTHING = 0


class Reload:
    """Obeys orders to load a checkpoint in one process.

    Args:
        watcher: the process's.
    """

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._orders = OrderFile(watcher.settings.spool, watcher.settings.job)
        self._load: Callable[[str], object] | None = None
        self._optimizer: weakref.ref[Any] | None = None
        self._joinables: list[weakref.ref[Any]] = []
        self._agreement: Agreement | None = None
        self._why_off = ""
        self._offered: LoadOrder | None = None
        self._done = _NOTHING
        self._awaits_update = False
        self._pid = os.getpid()

    # ------------------------------------------------------------------ the script's words

    def accept(self, model: Any, optimizer: Any, load: Callable[[str], object]) -> None:
        """The script says how to load. A collective: all ranks of the job come here. Never raises.

        Args:
            model: the DistributedDataParallel instance, or None.
            optimizer: at the end of whose update attempts a checkpoint may be loaded; None for those
                that count as steps.
            load: called with the absolute path of a checkpoint.
        """
        again = self._load is not None
        self._load = load
        self._optimizer = None if optimizer is None else weakref.ref(optimizer)
        self._joinables = [weakref.ref(one) for one in (model, optimizer) if one is not None]
        if again:
            return
        try:
            _check(model, load)
            self._agreement = Agreement()
            self._notice_joins()
            self._watcher.append("can_load", {})
        except Exception as error:
            self._fail(error)

    # ------------------------------------------------------------------ steps

    def attempted(self, attempt: Any, optimizer: Any) -> None:
        """An update attempt that counts as a step is over. Never raises.

        Args:
            attempt: the optimizer, or the GradScaler around it.
            optimizer: the optimizer.
        """
        if self._load is None or (self._optimizer is not None and self._optimizer() is not optimizer):
            return
        if attempt is optimizer:
            self._end_of_step()
        else:
            # What its `update` would do to a scale that has just been loaded is about the step before.
            self._awaits_update = True

    def scale_updated(self) -> None:
        """`GradScaler.update` has been called. Never raises."""
        if self._awaits_update:
            self._awaits_update = False
            self._end_of_step()

    def _end_of_step(self) -> None:
        try:
            # Not in a forked child, nor once the script has ended its process groups.
            if os.getpid() == self._pid and dist.is_initialized() and not _capturing():
                self._round()
        except Exception as error:
            self._fail(error)

    def _round(self) -> None:
        began = time.perf_counter()
        order = self._due()
        if self._agreement is None:
            if order is not None:
                self._done = order.ticket
                self._say_loaded(order, f"loading in process is off: {self._why_off}")
            return
        if torch._C._current_graph_task_id() >= 0:
            raise RuntimeError(
                "the optimizer steps inside of a backward pass, where no checkpoint can be loaded"
            )
        agreed = self._agreement.agreed()
        self._watcher.spent(time.perf_counter() - began)
        if agreed is not None and generation_of(agreed) > self._watcher.settings.generation:
            self._obey(self._agreement, agreed)
            order = self._due()
        began = time.perf_counter()
        self._offered = order
        self._agreement.offer(_NOTHING if order is None else order.ticket)
        self._watcher.spent(time.perf_counter() - began)

    def _due(self) -> LoadOrder | None:
        """The order that is there, unless it has been dealt with."""
        order = self._orders.look()
        if order is None or order.generation <= self._watcher.settings.generation:
            return None
        return None if order.ticket == self._done else order

    # ------------------------------------------------------------------ loading

    def _obey(self, agreement: Agreement, ticket: int) -> None:
        """All ranks come here in the same step."""
        self._done = ticket
        order = self._offered
        if order is None:
            raise RuntimeError("ranks agreed on an order that this one had not offered")
        with self._watcher.clock.unmoved():
            error = self._try_load(order, ticket)
        try:
            everyone = agreement.at_once(1 if error is None else 0) == 1
        except Exception as lost:
            self._say_loaded(order, error or f"not known whether all ranks have loaded: {lost!r}")
            raise
        if error is None and everyone:
            self._go_on(order)
        else:
            self._say_loaded(order, error or "another rank could not load")

    def _try_load(self, order: LoadOrder, ticket: int) -> str | None:
        """Why this rank could not load; None when it has."""
        if order.ticket != ticket:
            return "another rank holds another order of the same generation"
        reason = why_not(order, self._watcher.settings.checkpoints_root)
        if reason is not None or self._load is None:
            return reason
        try:
            # Before the script loads, which may restore it.
            self._watcher.forget_error_feedback()
            self._load(order.path)
        except Exception as error:
            sys.stderr.write(
                f"gradwatch: {order.path} could not be loaded in process; the job will be restarted.\n"
                f"{traceback.format_exc()}"
            )
            return f"{error!r}; the weights of this rank may be half loaded"
        return None

    def _go_on(self, order: LoadOrder) -> None:
        try:
            self._watcher.start_over(order.generation, order.step, _loaded(order, ""))
        except Exception as error:
            # Still in agreement with the others, so that none of them is left waiting.
            self._say_loaded(order, f"no new journal could be begun: {error!r}")
        else:
            self._watcher.append("can_load", {})

    def _say_loaded(self, order: LoadOrder, error: str) -> None:
        self._watcher.append("loaded", _loaded(order, error))

    # ------------------------------------------------------------------ off

    def _fail(self, error: Exception) -> None:
        self._switch_off(repr(error))
        self._watcher.fuses.blow("load", error)

    def _switch_off(self, why: str) -> None:
        self._agreement = None
        self._why_off = self._why_off or why

    def _notice_joins(self) -> None:
        """Switch off when the model is joined: a rank without data does not step, and would be missed.

        All ranks make their `Join` after the same step, so that none of them is left waiting.
        """
        original = Join.__init__

        @functools.wraps(original)
        def __init__(join: Any, joinables: Any, enable: bool = True, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - as in torch
            original(join, joinables, enable, *args, **kwargs)
            ours = [reference() for reference in self._joinables]
            is_ours = any(one is own for one in joinables for own in ours)
            if enable and is_ours and self._agreement is not None:
                self._switch_off("the model is used under join(), where a rank may run out of data")
                sys.stderr.write(f"gradwatch: loading in process is off: {self._why_off}.\n")

        Join.__init__ = __init__  # type: ignore[method-assign, assignment]


def _capturing() -> bool:
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return initialized and torch.cuda.is_current_stream_capturing()


def _check(model: Any, load: Any) -> None:
    if not callable(load):
        raise TypeError(f"watch(load=...) takes a function of a path, not {load!r}")
    if model is not None and model.process_group.size() != dist.get_world_size():
        raise ValueError("the process group of the model is not the whole job, which could not load at once")


def _loaded(order: LoadOrder, error: str) -> dict[str, Any]:
    message: dict[str, Any] = {"order": order.id, "path": order.path, "error": error}
    if order.step is not None:
        message["step"] = order.step
    return message
