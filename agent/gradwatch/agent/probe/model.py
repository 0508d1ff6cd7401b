"""A watched model: what the comm hook of one DDP instance needs at hand."""

from __future__ import annotations

import functools
import time
import weakref
from typing import TYPE_CHECKING, Any

import torch

from gradwatch.agent.probe.arrival import when_backward_ends
from gradwatch.agent.probe.averaging import Averaging, active_ranks
from gradwatch.agent.probe.guard import forget_error_feedback
from gradwatch.agent.probe.parameters import name_parameters
from gradwatch.agent.probe.passes import Passes
from gradwatch.agent.probe.rounds import Bucket, DeviceLook, HostLook

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch._C._distributed_c10d import GradBucket, ProcessGroup
    from torch.utils.hooks import RemovableHandle

    from gradwatch.agent.probe.parameters import ParameterInfo
    from gradwatch.agent.probe.passes import Fact, Pass
    from gradwatch.agent.probe.rounds import Look, Moment
    from gradwatch.agent.probe.watcher import Watcher

    Future = torch.futures.Future[torch.Tensor]

# By name, since importing them imports numpy. With these every rank ends up with the same gradients.
_HOOKS = "torch.distributed.algorithms.ddp_comm_hooks"
_POWER_SGD = {f"{_HOOKS}.powerSGD_hook.{name}" for name in ("powerSGD_hook", "batched_powerSGD_hook")}
_AGREEING = _POWER_SGD | {
    f"{_HOOKS}.default_hooks.{name}"
    for name in ("allreduce_hook", "fp16_compress_hook", "bf16_compress_hook")
}

# Values per round beyond one per parameter: one per bucket, of which there are fewer
# than parameters, for the reduced gradients.
_VALUES_PER_PARAMETER = 2
# And five for each micro-batch.
_VALUES_OF_PASSES = 64


class WatchedModel:
    """One DDP instance under watch.

    It is the state that torch keeps beside our comm hook. Nothing of it is reachable from the user's
    objects, so they pickle and copy as without us.

    Args:
        watcher: the process's.
        ddp: the wrapped model; kept weakly.
        parameters: those of its reducer, in the reducer's order.
        root: ordinal of this model in its process.

    Attributes:
        inner: the hook that does the reduction: the user's, or DDP's own averaging.
        inner_is_default: whether the user may still put theirs in its place.
        join_work: handle of the last notification under `join()`.
        last_round: the newest round that was reduced.
        bad_round: the first round since the last update whose reduced gradients are bad, as far as
            the host knows. It stays until the next round: one model may have several optimizers.
        attempted: an update was attempted since that newest round.
    """

    def __init__(self, watcher: Watcher, ddp: Any, parameters: Sequence[torch.Tensor], root: int) -> None:
        self.root = root
        self.fuses = watcher.fuses
        self.inner: Callable[[GradBucket], Future] = self.all_reduce_mean
        self.inner_is_default = True
        self.join_work: Any = None
        self.last_round = 0
        self.bad_round: int | None = None
        self.attempted = False
        self.averaging = Averaging(
            gradient_as_bucket_view=ddp.gradient_as_bucket_view,
            batched_grad_copy=getattr(ddp, "batched_grad_copy", False),
        )
        self._watcher = watcher
        self._ddp = weakref.ref(ddp)
        self._module_class = type(ddp.module).__name__
        self._group_size = ddp.process_group.size()
        self._moment: Moment | None = None
        self._reductions: list[Future] = []
        self._waiting: tuple[Moment, list[Future]] | None = None
        self._handles: list[RemovableHandle] = []
        self._infos: dict[int, ParameterInfo] = {}
        self._keys: dict[int, int] = {}
        self.parameter_ids = frozenset(id(parameter) for parameter in parameters)
        self._parameters = [weakref.ref(parameter) for parameter in parameters]
        for parameter, info in name_parameters(ddp.module, parameters):
            key = watcher.arrivals.new_key()
            self._infos[key] = info
            self._keys[id(parameter)] = key
        self._on_cuda = ddp.device.type == "cuda"
        self.look = self._choose_look(ddp.device, len(self._infos))
        self._passes = Passes(
            self.look.fact,
            lambda: watcher.arrivals.ordinal,
            self.fuses,
            watcher.spent,
            self._gradients_so_far,
        )
        self._pass: Pass | None = None

    def follow_arrivals(self) -> None:
        """Have every parameter tell when its gradient arrives."""
        for parameter in self.parameters():
            key = self._keys[id(parameter)]
            hooks = [self._watcher.arrivals.hook(key)]
            if self.averaging.tracks_views:
                hooks.append(self.averaging.arrival_hook(parameter))
            self._handles += [_on_arrival(parameter, hook) for hook in hooks]

    def leave_arrivals(self) -> None:
        """Take the hooks off: the parameters may be wrapped again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # ------------------------------------------------------------------ the passes

    def entered(self, args: Any, kwargs: Any) -> None:
        """A forward pass through the module begins with these arguments."""
        if not torch.is_grad_enabled() or self._capturing():
            self._pass = None
            return
        began = time.perf_counter()
        self._pass = self._passes.entered(args, kwargs, self._watcher.batch)
        self._watcher.spent(time.perf_counter() - began)

    def left(self, output: Any) -> None:
        """It has ended with this output."""
        if self._pass is None:
            return
        began = time.perf_counter()
        self._passes.left(self._pass, output)
        self._pass = None
        self._watcher.spent(time.perf_counter() - began)

    def loss_scaled(self, losses: Any) -> None:
        """A GradScaler scales losses."""
        if not self._capturing():
            self._passes.scaled(losses)

    def _gradients_so_far(self) -> list[torch.Tensor]:
        return [gradient for parameter in self.parameters() if (gradient := parameter.grad) is not None]

    def _parameter_fact(self) -> Callable[[], Fact]:
        if self._on_cuda:
            # When a hit is read out, an update may have been applied.
            fact = self.look.fact(self.parameters())
            return lambda: fact
        return functools.cache(lambda: self.look.fact(self.parameters()))

    # ------------------------------------------------------------------ the reduction

    def before_reduction(self, bucket: GradBucket) -> None:
        """Look at a bucket. Runs on the stream that the reduction is ordered after."""
        if self._capturing():
            return
        began = time.perf_counter()
        watcher = self._watcher
        self.catch_up()
        moment = self._moment
        if moment is None:
            moment = self._moment = watcher.begin_round(
                self.root, self._passes.take(), self._parameter_fact()
            )
        findings = self.look.local(
            moment,
            Bucket(bucket.index(), bucket.buffer(), lambda: self._gradients(bucket)),
            brief=watcher.brief,
        )
        if findings is not None:
            watcher.found(self, findings)
        if bucket.is_last():
            watcher.end_local(moment, seen=isinstance(self.look, HostLook))
        watcher.spent(time.perf_counter() - began)

    def after_launch(self, bucket: GradBucket, reduction: Future) -> None:
        """The bucket's reduction is under way; after the last one, see to what they give."""
        if self._moment is None:
            return
        self._reductions.append(reduction)
        if not bucket.is_last():
            return
        self._waiting = (self._moment, self._reductions)
        self._moment, self._reductions = None, []
        # DDP's own end-of-backward callback, which waits for the reductions, is queued
        # after this hook returns: so ours goes behind it.
        when_backward_ends(lambda: when_backward_ends(self._backward_ended))

    def all_reduce_mean(self, bucket: GradBucket) -> Future:
        """What DDP does without a comm hook: divide, then sum over the ranks."""
        ddp = self._ddp()
        if ddp is None:
            raise RuntimeError("the DistributedDataParallel instance of this bucket is gone")
        divisor = ddp.process_group.size()
        if self.join_work is not None and not ddp._divide_by_initial_world_size:
            divisor = active_ranks(self.join_work)
        buffer = self.averaging.divide(bucket, divisor)
        return _only(ddp.process_group.allreduce([buffer]))

    def all_reduce_builtin(self, bucket: GradBucket) -> Future:
        """`BuiltinCommHookType.ALLREDUCE`: always a division."""
        group = self._group()
        return _only(group.allreduce([bucket.buffer().div_(group.size())]))

    def fp16_compress_builtin(self, bucket: GradBucket) -> Future:
        """`BuiltinCommHookType.FP16_COMPRESS`: divided and summed in fp16."""
        group = self._group()
        buffer = bucket.buffer()
        work = group.allreduce([buffer.to(torch.float16).div_(group.size())])
        return work.get_future().then(lambda done: buffer.copy_(done.value()[0]))

    # ------------------------------------------------------------------ the guard

    def why_ranks_may_disagree(self) -> str | None:
        """Why the reduced gradients may differ between ranks; None when they do not."""
        hook = _full_name(self.inner)
        if self.inner_is_default or hook.startswith(f"{__name__}.") or hook in _AGREEING:
            return None
        return (
            f"its comm hook {hook} may leave ranks with different gradients, and they would not skip together"
        )

    @property
    def has_error_feedback(self) -> bool:
        """Whether its comm hook carries something from round to round."""
        return _full_name(self.inner) in _POWER_SGD

    def forget_error_feedback(self) -> None:
        """Clear what a compressing comm hook carries from round to round."""
        if self.has_error_feedback:
            forget_error_feedback(self.inner.args[0])  # type: ignore[attr-defined]

    # ------------------------------------------------------------------ afterwards

    def start_over(self) -> None:
        """A checkpoint has been loaded: what went before is over, and written down."""
        self._moment, self._reductions, self._waiting = None, [], None
        self.last_round, self.bad_round, self.attempted = 0, None, False

    def catch_up(self) -> None:
        """Write down what is known by now of earlier rounds."""
        self._settle_reduced()
        self._watcher.landed(self, self.look.arrived())

    def _backward_ended(self) -> None:
        if not self._watcher.fuses.intact("reduced"):
            return
        try:
            began = time.perf_counter()
            self._settle_reduced()
            self._watcher.spent(time.perf_counter() - began)
        except Exception as error:
            self._waiting = None
            self._watcher.fuses.blow("reduced", error)

    def _settle_reduced(self) -> None:
        if self._waiting is None:
            return
        moment, reductions = self._waiting
        if not all(reduction.done() for reduction in reductions):
            return
        self._waiting = None
        bad = self.look.reduced(moment, [_tensor(reduction.value()) for reduction in reductions])
        if bad is not None:
            self._watcher.end_reduced(moment, bad=bad)
        if self.attempted:
            self.attempted, self.bad_round = False, None
        self.last_round = moment.round
        if bad and self.bad_round is None:
            self.bad_round = moment.round

    # ------------------------------------------------------------------ about it

    def info(self, key: int) -> ParameterInfo:
        """The parameter with this key."""
        return self._infos[key]

    def parameters(self) -> list[torch.Tensor]:
        """The reducer's parameters that are still there."""
        return [parameter for reference in self._parameters if (parameter := reference()) is not None]

    def as_message(self, *, with_parameters: bool) -> dict[str, Any]:
        """The `Model` message in its JSON mapping."""
        message: dict[str, Any] = {
            "root": self.root,
            "module_class": self._module_class,
            "wrapper": "DistributedDataParallel",
            "group_size": self._group_size,
            "parameter_count": sum(info.numel for info in self._infos.values()),
        }
        if with_parameters:
            message["parameters"] = [info.as_message() for info in self._infos.values()]
        return message

    def _gradients(self, bucket: GradBucket) -> list[tuple[int, torch.Tensor]]:
        keys = (self._keys[id(parameter)] for parameter in bucket.parameters())
        return list(zip(keys, bucket.gradients(), strict=True))

    def _group(self) -> ProcessGroup:
        ddp = self._ddp()
        if ddp is None:
            raise RuntimeError("the DistributedDataParallel instance of this bucket is gone")
        return ddp.process_group  # type: ignore[no-any-return]

    def _choose_look(self, device: torch.device, parameters: int) -> Look:
        if not self._on_cuda:
            return HostLook()
        return self._device_look(device, parameters, torch.cuda.Event)

    def _device_look(self, device: torch.device, parameters: int, new_event: Callable[[], Any]) -> DeviceLook:
        return DeviceLook(
            _VALUES_PER_PARAMETER * parameters + _VALUES_OF_PASSES,
            device,
            new_event,
            self._watcher.drop,
            with_flag=self._watcher.guarding is not None,
        )

    def _capturing(self) -> bool:
        return self._on_cuda and torch.cuda.is_current_stream_capturing()


def _on_arrival(parameter: torch.Tensor, hook: Callable[[torch.Tensor], None]) -> RemovableHandle:
    return parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call, no-any-return]


def _full_name(hook: Any) -> str:
    """`module.name` of a comm hook, inside the `partial` that gives it its state."""
    function = getattr(hook, "func", hook)
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', repr(function))}"


def _only(work: Any) -> Future:
    """The one tensor of a collective's result, as a comm hook returns it."""
    return work.get_future().then(lambda done: done.value()[0])  # type: ignore[no-any-return]


def _tensor(value: Any) -> torch.Tensor:
    tensor: torch.Tensor = value[0] if isinstance(value, (list, tuple)) else value
    return tensor
