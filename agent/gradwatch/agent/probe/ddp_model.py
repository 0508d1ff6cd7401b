"""A watched DistributedDataParallel: what the comm hook of one instance needs at hand."""

from __future__ import annotations

import time
import weakref
from typing import TYPE_CHECKING, Any

import torch

from gradwatch.agent.probe.arrival import when_backward_ends
from gradwatch.agent.probe.averaging import Averaging, active_ranks
from gradwatch.agent.probe.guard import forget_error_feedback
from gradwatch.agent.probe.model import WatchedModel
from gradwatch.agent.probe.rank import part_of_the_world
from gradwatch.agent.probe.rounds import Bucket

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch._C._distributed_c10d import GradBucket, ProcessGroup

    from gradwatch.agent.probe.rounds import Moment
    from gradwatch.agent.probe.watcher import Watcher

    Future = torch.futures.Future[torch.Tensor]

# By name, since importing them imports numpy. With these every rank ends up with the same gradients.
_HOOKS = "torch.distributed.algorithms.ddp_comm_hooks"
_POWER_SGD = {f"{_HOOKS}.powerSGD_hook.{name}" for name in ("powerSGD_hook", "batched_powerSGD_hook")}
_AGREEING = _POWER_SGD | {
    f"{_HOOKS}.default_hooks.{name}"
    for name in ("allreduce_hook", "fp16_compress_hook", "bf16_compress_hook")
}


class DDPModel(WatchedModel):
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
    """

    source = "ddp-bucket"
    replicates = True

    def __init__(self, watcher: Watcher, ddp: Any, parameters: Sequence[torch.Tensor], root: int) -> None:
        self.averaging = Averaging(
            gradient_as_bucket_view=ddp.gradient_as_bucket_view,
            batched_grad_copy=getattr(ddp, "batched_grad_copy", False),
        )
        super().__init__(
            watcher,
            ddp.module,
            parameters,
            device=ddp.device,
            root=root,
            wrapper="DistributedDataParallel",
            group_size=ddp.process_group.size(),
            group=part_of_the_world(ddp.process_group),
        )
        self.inner: Callable[[GradBucket], Future] = self.all_reduce_mean
        self.inner_is_default = True
        self.join_work: Any = None
        self._ddp = weakref.ref(ddp)
        self._reductions: list[Future] = []
        self._waiting: tuple[Moment, list[Future]] | None = None
        # By index of the bucket: the ids of its parameters and their keys, when it was last seen.
        self._buckets: dict[int, tuple[list[int], tuple[int, ...]]] = {}

    def _arrival_hooks(self, parameter: torch.Tensor) -> list[Callable[[torch.Tensor], None]]:
        hooks = super()._arrival_hooks(parameter)
        return [*hooks, self.averaging.arrival_hook(parameter)] if self.averaging.tracks_views else hooks

    # ------------------------------------------------------------------ the reduction

    def before_reduction(self, bucket: GradBucket) -> None:
        """Look at a bucket. Runs on the stream that the reduction is ordered after."""
        if self._capturing():
            return
        began = time.perf_counter()
        self.catch_up()
        self.look_before(self._bucket(bucket), is_last=bucket.is_last())
        self._watcher.spent(time.perf_counter() - began)

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
        super().start_over()
        self._reductions, self._waiting = [], None

    def catch_up(self, *, wait: bool = False) -> None:
        """Write down what is known by now of earlier rounds; with `wait`, all there is to know of them."""
        self._settle_reduced()
        super().catch_up(wait=wait)

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
        self.look_after(moment, [_tensor(reduction.value()) for reduction in reductions])

    def _bucket(self, bucket: GradBucket) -> Bucket:
        buffer = bucket.buffer()
        index = bucket.index()
        keys = self._keys_in(bucket, index)
        if buffer.layout != torch.strided:
            # One sparse gradient, of which the bucket gives no view.
            return Bucket(index, buffer, lambda: [(keys[0], buffer)])
        return Bucket(index, buffer, lambda: list(zip(keys, bucket.gradients(), strict=True)), keys)

    def _keys_in(self, bucket: GradBucket, index: int) -> tuple[int, ...]:
        """Of its parameters; torch makes the buckets anew once or never."""
        ids = list(map(id, bucket.parameters()))
        known = self._buckets.get(index)
        if known is None or known[0] != ids:
            known = self._buckets[index] = ids, tuple(map(self._keys.__getitem__, ids))
        return known[1]

    def _group(self) -> ProcessGroup:
        ddp = self._ddp()
        if ddp is None:
            raise RuntimeError("the DistributedDataParallel instance of this bucket is gone")
        return ddp.process_group  # type: ignore[no-any-return]


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
