"""Have every model that `fully_shard` (FSDP2) shards watched.

A NaN sits, after the reduce-scatter, in the shard of whoever owns it, not of who made it. So gradients are
looked at where FSDP hands them to its reduce-scatter, still whole and by parameter: `foreach_reduce`, as
`_fsdp_param_group` looks it up. Nothing is imported for it: the modules are patched when the script imports
them.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch._compile import _disable_dynamo

from gradwatch.agent.probe.fsdp_model import FSDPModel, groups_of
from gradwatch.agent.probe.passes import PART
from gradwatch.agent.probe.saves import when_imported

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from gradwatch.agent.probe.watcher import Watcher

_STATE = "torch.distributed.fsdp._fully_shard._fsdp_state"
_GROUP = "torch.distributed.fsdp._fully_shard._fsdp_param_group"
_METHODS = ("_lazy_init", "_pre_forward", "_post_forward", "_root_post_backward_final_callback")
# The part of the probe, for its fuse.
_ATTACH = "fsdp"


class FSDPWatch:
    """Wraps FSDP2 for one watcher.

    Args:
        watcher: the process's.
    """

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        # By the context that the states of one root share, and by FSDP's own parameter objects.
        self._models: weakref.WeakKeyDictionary[Any, FSDPModel] = weakref.WeakKeyDictionary()
        self._owners: weakref.WeakKeyDictionary[Any, FSDPModel] = weakref.WeakKeyDictionary()
        self._group: ModuleType | None = None

    def install(self) -> None:
        """Wrap FSDP2's functions, now or when they are imported. Never raises."""
        # The state's module imports the group's.
        when_imported({_GROUP: self._keep_group, _STATE: self._patch})

    def knows(self, module: Any) -> bool:
        """Whether a module has been sharded by `fully_shard`."""
        return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)

    def _keep_group(self, group: ModuleType) -> None:
        self._group = group

    def _patch(self, state: ModuleType) -> None:
        try:
            group = self._group
            missing = _missing(group, state)
            if group is None or missing:
                self._watcher.unwatched(
                    f"fully_shard (FSDP2) of torch {torch.__version__} has no {', '.join(missing)}, "
                    "which gradwatch needs"
                )
                return
            self._wrap_reduction(group)
            self._wrap_state(state.FSDPState)
        except Exception as error:
            self._watcher.fuses.blow(_ATTACH, error)

    # ------------------------------------------------------------------ models

    def _attach(self, state: Any) -> None:
        """A root is known: the first forward pass begins."""
        watcher = self._watcher
        groups = [group for one in state._state_ctx.all_states for group in groups_of(one)]
        if not groups or not watcher.admit(state._device, "fsdp2"):
            return
        model = FSDPModel(watcher, state._modules[0], groups, device=state._device, root=watcher.models_told)
        self._models[state._state_ctx] = model
        for group in groups:
            for parameter in group.fsdp_params:
                self._owners[parameter] = model
        watcher.add(model)
        weakref.finalize(state._modules[0], watcher.leave, model).atexit = False

    # ------------------------------------------------------------------ wrapping

    def _wrap_reduction(self, group: Any) -> None:
        original = group.foreach_reduce

        @functools.wraps(original)
        def foreach_reduce(fsdp_params: Any, unsharded_grads: Any, *args: Any, **kwargs: Any) -> Any:
            self._guarded(
                "scan", self._owner(fsdp_params), lambda model: model.before(fsdp_params, unsharded_grads)
            )
            return original(fsdp_params, unsharded_grads, *args, **kwargs)

        group.foreach_reduce = _disable_dynamo(foreach_reduce)

    def _wrap_state(self, kind: Any) -> None:
        for name, wrap in (
            ("_lazy_init", self._around_init),
            ("_pre_forward", self._around_entry),
            ("_post_forward", self._around_exit),
            ("_root_post_backward_final_callback", self._around_end),
        ):
            original = getattr(kind, name)
            setattr(kind, name, _disable_dynamo(functools.wraps(original)(wrap(original))))

    def _around_init(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def _lazy_init(state: Any) -> Any:
            is_new = state._is_root is None
            result = original(state)
            if is_new and state._is_root:
                self._watcher.fuses.call(_ATTACH, self._attach, state)
            return result

        return _lazy_init

    def _around_entry(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def _pre_forward(state: Any, module: Any, args: Any, kwargs: Any) -> Any:
            recomputed = _in_backward(state)
            entering = original(state, module, args, kwargs)
            if state._is_root and not recomputed:
                self._guarded(PART, self._model(state), lambda model: model.entered(*entering))
            return entering

        return _pre_forward

    def _around_exit(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def _post_forward(state: Any, module: Any, inputs: Any, output: Any) -> Any:
            if _in_backward(state):
                return original(state, module, inputs, output)
            # The parameters are still whole.
            self._guarded(PART, self._model(state), lambda model: model.part_left(output))
            leaving = original(state, module, inputs, output)
            if state._is_root:
                self._guarded(PART, self._model(state), lambda model: model.left(leaving))
            return leaving

        return _post_forward

    def _around_end(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def _root_post_backward_final_callback(state: Any) -> None:
            original(state)
            complete = state._state_ctx.is_last_backward
            self._guarded("reduced", self._model(state), lambda model: model.backward_over(complete=complete))

        return _root_post_backward_final_callback

    def _model(self, state: Any) -> FSDPModel | None:
        return self._models.get(state._state_ctx)

    def _owner(self, fsdp_params: Any) -> FSDPModel | None:
        return self._owners.get(fsdp_params[0]) if fsdp_params else None

    def _guarded(self, part: str, model: FSDPModel | None, call: Callable[[FSDPModel], None]) -> None:
        """Tell a watched model something. Never raises."""
        if model is not None:
            self._watcher.fuses.call(part, call, model)


def _in_backward(state: Any) -> bool:
    """Whether activation checkpointing runs the forward pass again."""
    return getattr(state._training_state, "name", "") == "PRE_BACKWARD"


def _missing(group: Any, state: Any) -> list[str]:
    """What is not there as we know it; nothing has been touched."""
    reduce = getattr(group, "foreach_reduce", None)
    names = [*inspect.signature(reduce).parameters][:2] if callable(reduce) else []
    missing = (
        []
        if names == ["fsdp_params", "unsharded_grads"]
        else ["foreach_reduce(fsdp_params, unsharded_grads, …)"]
    )
    kind = getattr(state, "FSDPState", None)
    return missing + [f"FSDPState.{name}" for name in _METHODS if not hasattr(kind, name)]
