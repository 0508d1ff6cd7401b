"""Have every DistributedDataParallel of this process watched.

Nothing is attached to the user's objects: DDP keeps our hook in its reducer, which is neither
pickled nor copied, and every reducer is made by `DistributedDataParallel._ddp_init_helper`, also
that of a deep-copied or unpickled instance. A reducer takes one comm hook. Ours is it, and the functions
by which a user registers theirs, `dist._register_comm_hook` and `dist._register_builtin_comm_hook`
(the methods of DDP end in them), put it inside ours. A second one of the user's meets torch's own error.
"""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed
from torch._compile import _disable_dynamo
from torch.distributed.algorithms.join import Join
from torch.nn import parallel

from gradwatch.agent.probe.ddp_model import DDPModel
from gradwatch.agent.probe.passes import PART

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch._C._distributed_c10d import GradBucket

    from gradwatch.agent.probe.watcher import Watcher

# The names we replace in it are private, and so unknown to its types.
dist: Any = distributed
DistributedDataParallel: Any = parallel.DistributedDataParallel

# What must be there to be wrapped; private names are looked for before anything is touched.
_NEEDED = (
    (DistributedDataParallel, "_ddp_init_helper"),
    (dist, "_register_comm_hook"),
    (dist, "_register_builtin_comm_hook"),
    (Join, "notify_join_context"),
    (DistributedDataParallel, "_pre_forward"),
    (DistributedDataParallel, "_post_forward"),
)


class DDPWatch:
    """Wraps DDP for one watcher."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._models: weakref.WeakKeyDictionary[Any, DDPModel] = weakref.WeakKeyDictionary()
        self._reducers: weakref.WeakKeyDictionary[Any, DDPModel] = weakref.WeakKeyDictionary()
        self._register_comm_hook: Callable[..., Any] = dist._register_comm_hook

    def install(self) -> None:
        """Wrap DDP's functions.

        Raises:
            RuntimeError: this torch is not built as we know it; nothing has been touched.
        """
        missing = [f"{owner.__name__}.{name}" for owner, name in _NEEDED if not hasattr(owner, name)]
        if missing:
            raise RuntimeError(
                f"torch {torch.__version__} has no {', '.join(missing)}; gradwatch knows torch 2.6 to 2.13"
            )
        self._wrap_init_helper()
        self._wrap_registration()
        self._wrap_join()
        self._wrap_passes()

    def model_of(self, ddp: Any) -> DDPModel | None:
        """The watched model of a DDP instance."""
        return self._models.get(ddp)

    def adopt(self, ddp: Any) -> None:
        """Watch an instance that was made before this process was activated.

        If the user has registered a comm hook already, the reducer is made anew with theirs inside
        ours; that is possible before the first forward pass.

        Raises:
            RuntimeError: it has a comm hook that cannot be composed with any more.
            OSError: the spool cannot be written.
        """
        parameters, sparse = ddp._build_params_for_reducer()
        try:
            self.attach(ddp, parameters)
        except RuntimeError:
            if ddp._lazy_init_ran or not ddp._comm_hooks:
                raise
            names = ddp._build_debug_param_to_name_mapping(parameters)
            ddp._ddp_init_helper(parameters, sparse, names, ddp.static_graph)
            if ddp.static_graph:
                ddp.reducer._set_static_graph()
                ddp.logger._set_static_graph()
            for hook, state in ddp._comm_hooks:
                dist._register_comm_hook(ddp.reducer, state, hook)

    def attach(self, ddp: Any, parameters: Sequence[torch.Tensor]) -> None:
        """Watch one instance, whose reducer has just been made.

        Raises:
            RuntimeError: its reducer already has a comm hook.
            OSError: the spool cannot be written.
        """
        if not self._watcher.admit(ddp.device):
            return
        model = DDPModel(self._watcher, ddp, parameters, self._watcher.models_told)
        self._register_comm_hook(ddp.reducer, model, _comm_hook)
        model.follow_arrivals()
        self._models[ddp] = model
        self._reducers[ddp.reducer] = model
        self._watcher.add(model)
        weakref.finalize(ddp, self._watcher.leave, model).atexit = False

    def _attach_if_hooked(self, ddp: Any, parameters: Any) -> None:
        if _uses_python_reducer(ddp):
            self._watcher.unwatched(
                "DistributedDataParallel runs with torch.compile's python_reducer, which calls no comm hook"
            )
        else:
            self.attach(ddp, parameters)

    def _wrap_init_helper(self) -> None:
        original = DistributedDataParallel._ddp_init_helper

        @functools.wraps(original)
        def _ddp_init_helper(ddp: Any, parameters: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(ddp, parameters, *args, **kwargs)
            self._watcher.fuses.call("attach", self._attach_if_hooked, ddp, parameters)
            return result

        DistributedDataParallel._ddp_init_helper = _ddp_init_helper

    def _wrap_registration(self) -> None:
        register = self._register_comm_hook
        register_builtin = dist._register_builtin_comm_hook

        @functools.wraps(register)
        def _register_comm_hook(reducer: Any, state: Any, comm_hook: Any) -> None:
            if not self._put_inside(reducer, functools.partial(comm_hook, state)):
                register(reducer, state, comm_hook)

        @functools.wraps(register_builtin)
        def _register_builtin_comm_hook(reducer: Any, comm_hook_type: Any) -> None:
            model = self._reducers.get(reducer)
            own = {
                dist.BuiltinCommHookType.ALLREDUCE: DDPModel.all_reduce_builtin,
                dist.BuiltinCommHookType.FP16_COMPRESS: DDPModel.fp16_compress_builtin,
            }.get(comm_hook_type)
            if model is None or own is None or not self._put_inside(reducer, functools.partial(own, model)):
                register_builtin(reducer, comm_hook_type)

        dist._register_comm_hook = _register_comm_hook
        dist._register_builtin_comm_hook = _register_builtin_comm_hook

    def _wrap_join(self) -> None:
        original = Join.notify_join_context

        @functools.wraps(original)
        def notify_join_context(joinable: Any) -> Any:
            work = original(joinable)
            if isinstance(joinable, DistributedDataParallel):
                model = self._models.get(joinable)
                if model is not None:
                    model.join_work = work
            return work

        Join.notify_join_context = staticmethod(notify_join_context)  # type: ignore[method-assign]

    def _wrap_passes(self) -> None:
        """See what enters the module and what leaves it; DDP has moved the inputs to their device by then.

        `torch.compile` around DDP does not look into DDP's own frames, and shall not look into these.
        """
        pre, post = DistributedDataParallel._pre_forward, DistributedDataParallel._post_forward

        @functools.wraps(pre)
        def _pre_forward(ddp: Any, *inputs: Any, **kwargs: Any) -> Any:
            entering = pre(ddp, *inputs, **kwargs)
            self._guarded(PART, ddp, lambda model: model.entered(*entering))
            return entering

        @functools.wraps(post)
        def _post_forward(ddp: Any, output: Any) -> Any:
            leaving = post(ddp, output)
            self._guarded(PART, ddp, lambda model: model.left(leaving))
            return leaving

        DistributedDataParallel._pre_forward = _disable_dynamo(_pre_forward)
        DistributedDataParallel._post_forward = _disable_dynamo(_post_forward)

    def _guarded(self, part: str, ddp: Any, call: Callable[[DDPModel], None]) -> None:
        """Tell a watched model something. Never raises."""
        model = self._models.get(ddp)
        if model is not None:
            self._watcher.fuses.call(part, call, model)

    def _put_inside(self, reducer: Any, inner: Callable[[GradBucket], Any]) -> bool:
        model = self._reducers.get(reducer)
        if model is None or not model.inner_is_default:
            return False
        model.inner, model.inner_is_default = inner, False
        return True


def _comm_hook(model: DDPModel, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Look, reduce, and remember the reduction. Only the reduction may raise."""
    fuses = model.fuses
    fuses.call("scan", model.before_reduction, bucket)
    reduction = model.inner(bucket)
    if fuses.intact("scan"):
        fuses.call("reduced", model.after_launch, bucket, reduction)
    return reduction


def _uses_python_reducer(ddp: Any) -> bool:
    """Whether torch.compile's own reducer does the work of a DDP instance that is being made."""
    known = getattr(ddp, "_use_python_reducer", None)
    if known is None:
        # Older releases decide it only later in `__init__`, by this.
        dynamo: Any = torch._dynamo.config
        known = dynamo._get_optimize_ddp_mode().startswith("python_reducer")
    return bool(known)
