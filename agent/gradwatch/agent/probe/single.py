"""Watch a process that trains alone: no wrapped model, nothing that is reduced.

Its optimizers tell which parameters are trained. These have a hook each from then on, for the order of
arrival; the process becomes rank 0 of 1 only with its first update attempt, its first bad gradient, or
`watch(model)`. A model that is wrapped later takes over.
"""

from __future__ import annotations

import functools
import gc
import os
import weakref
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from gradwatch.agent.probe.guard import after_closure
from gradwatch.agent.probe.model import can_be_followed, is_followed, on_arrival
from gradwatch.agent.probe.owners import names_of
from gradwatch.agent.probe.parameters import parameters_of
from gradwatch.agent.probe.single_model import SingleModel
from gradwatch.agent.probe.training_thread import in_backward
from gradwatch.agent.probe.watcher import SINGLE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch.utils.hooks import RemovableHandle

    from gradwatch.agent.probe.watcher import Watcher

# The part of the probe, for its fuse.
PART = "single"
# How launchers say that a process is one of several.
_WORLD_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")

Call = tuple[tuple[Any, ...], dict[str, Any]]


class SingleWatch:
    """Watches the optimizers of one process.

    Args:
        watcher: the process's.
    """

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._optimizers: list[weakref.ref[Any]] = []
        self._modules: list[weakref.ref[torch.nn.Module]] = []
        self._hooks: dict[int, tuple[int, RemovableHandle]] = {}
        self._model: SingleModel | None = None
        self._outdated = False
        self._admitted = False
        self._off = False
        self._has_made_one = False

    @property
    def follows(self) -> bool:
        """Whether something is trained that can be watched."""
        return bool(self._hooks)

    def leave(self) -> None:
        """A wrapped model is watched from now on, or the process is one of several, or of several threads."""
        self._off = True
        # A copy: another thread may be about to make an optimizer.
        for _, handle in [*self._hooks.values()]:
            handle.remove()
        self._hooks.clear()
        self._drop_model()

    # ------------------------------------------------------------------ what is trained

    def given(self, optimizer: Any) -> None:
        """An optimizer has been given parameters."""
        if self._off or not trains_alone():
            return
        if all(known() is not optimizer for known in self._optimizers):
            self._optimizers.append(weakref.ref(optimizer))
        self._follow(parameters_of(optimizer))

    def adopt(self, module: Any, optimizer: Any) -> None:
        """Watch a module that the script names.

        Args:
            module: not wrapped.
            optimizer: of its parameters; None if it is not known.

        Raises:
            TypeError: it is no module.
            ValueError: it cannot be watched.
            OSError: the spool cannot be written.
        """
        if not isinstance(module, torch.nn.Module):
            raise TypeError(f"watch() takes a model, not {type(module).__name__}")
        if self._watcher.thread.off:
            return  # which has been said
        if self._off or not trains_alone():
            raise ValueError(
                f"{type(module).__name__} is not wrapped, and this process is one of several: "
                "watch() takes the DistributedDataParallel instance here"
            )
        if optimizer is not None:
            self.given(optimizer)
        self._modules.append(weakref.ref(module))
        self._follow(module.parameters())
        self._outdated = True
        if self._current() is None:
            raise ValueError(f"no parameter of {type(module).__name__} requires a gradient")
        self._admit()

    def _follow(self, parameters: Iterable[torch.Tensor]) -> None:
        """Have parameters tell when their gradients arrive; those that can have one."""
        for parameter in parameters:
            if not can_be_followed(parameter):
                continue
            known = self._hooks.get(id(parameter))
            if known is not None and is_followed(parameter, known[1]):
                continue
            # Nothing is kept of the tensor itself: a weak reference would be in the way of
            # `torch.utils.swap_tensors`.
            key = self._watcher.arrivals.new_key()
            self._hooks[id(parameter)] = key, on_arrival(parameter, self._watcher.arrivals.hook(key))
            self._outdated = True

    # ------------------------------------------------------------------ passes and updates

    def backward_begins(self, losses: Any, gradients: Any) -> None:
        """A backward pass begins at `losses`, with `gradients` or ones."""
        model = self._current()
        if model is not None:
            model.backward_begins(losses, gradients)

    def backward_over(self) -> None:
        """Gradients of a backward pass have arrived."""
        model = self._current()
        if model is not None:
            model.backward_ended(self._watcher.arrivals.order)

    def loss_scaled(self, losses: Any) -> None:
        """A GradScaler scales losses."""
        model = self._current()
        if model is not None and not self._admitted:
            # Else the watcher tells it.
            model.loss_scaled(losses)

    def stepping(self, optimizer: Any) -> None:
        """An optimizer is about to step: a process that does is a rank, if it is alone."""
        if self._off:
            return
        parameters = parameters_of(optimizer)
        model = self._model
        if model is None or not model.knows(one for one in parameters if one.requires_grad):
            self.given(optimizer)
        if self._current() is None:
            return
        if in_backward():
            self._watcher.unwatched(
                f"{type(optimizer).__name__} steps inside of the backward pass, where its gradients are "
                "gone before they can be looked at"
            )
        elif not self._admitted:
            self._admit(optimizer)

    def attempted(self, attempt: Any, optimizer: Any, args: Any, kwargs: Any) -> Call | None:
        """The outermost attempt of an update begins.

        Args:
            attempt: the optimizer, or the GradScaler around it.
            optimizer: the optimizer.
            args: of its `step`.
            kwargs: of its `step`.

        Returns:
            Other arguments for `step`, or None.
        """
        model = self._current()
        if model is None or not self._admitted or in_backward():
            return None
        if attempt is optimizer:
            wrapped: Call | None = after_closure(
                args, kwargs, self._watcher.thread.within(lambda: model.attempted_by(optimizer))
            )
            if wrapped is not None:
                return wrapped
        model.attempted_by(optimizer)
        return None

    # ------------------------------------------------------------------ the model

    def _current(self) -> SingleModel | None:
        if self._off:
            return None
        if not trains_alone():
            self.leave()
        elif self._outdated:
            self._outdated = False
            self._drop_model()
            self._make_model()
        return self._model

    def _make_model(self) -> None:
        if self._has_made_one:
            # A training that is over may wait for the collector only, and would be taken for a part of this.
            gc.collect()
        optimizers = [one for known in self._optimizers if (one := known()) is not None]
        modules = [one for known in self._modules if (one := known()) is not None]
        trained = [one for optimizer in optimizers for one in parameters_of(optimizer)]
        trained += [one for module in modules for one in module.parameters()]
        unique = {id(one): one for one in trained if id(one) in self._hooks and can_be_followed(one)}
        parameters = list(unique.values())
        if not parameters:
            return
        device, *others = [one for one, _ in Counter(one.device for one in parameters).most_common()]
        if others:
            elsewhere = ", ".join(map(str, others))
            self._watcher.unwatched(
                f"parameters lie on several devices, and those on {elsewhere} are not looked at"
            )
        self._model = SingleModel(
            self._watcher,
            names_of(optimizers, parameters, modules),
            {one: key for one, (key, _) in dict(self._hooks).items()},
            device=device,
            root=self._watcher.models_told,
            before_telling=self._admit,
        )
        self._has_made_one = True
        if self._admitted:
            self._add(self._model, None)

    def _drop_model(self) -> None:
        model, self._model = self._model, None
        if model is not None:
            model.give_up()
            self._watcher.remove(model)

    def _admit(self, optimizer: Any = None) -> None:
        """This process becomes a rank, unless another one is it already."""
        model = self._model
        if self._admitted or self._off or model is None:
            return
        if not self._watcher.admit(model.device, SINGLE):
            self.leave()
            return
        self._admitted = True
        self._add(model, optimizer)

    def _add(self, model: SingleModel, optimizer: Any) -> None:
        alive = (one for known in self._optimizers if (one := known()) is not None)
        first = optimizer if optimizer is not None else next(alive, None)
        model.count(model.parameters() if first is None else parameters_of(first))
        self._watcher.add(model)


def patch_parameter_groups(given: Callable[[Any], object]) -> None:
    """Have `given` called with each optimizer of this process that is given parameters; it must not raise."""
    from torch.optim.optimizer import Optimizer

    original = Optimizer.add_param_group

    @functools.wraps(original)
    def add_param_group(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        given(self)

    Optimizer.add_param_group = add_param_group  # type: ignore[method-assign]


def trains_alone() -> bool:
    """Whether this process is the only one of its job, as far as it has been told."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size() == 1
    sizes = (os.environ.get(name, "") for name in _WORLD_SIZES)
    return not any(size.isdigit() and int(size) > 1 for size in sizes)
