"""A watched root of `fully_shard`: what is known of its gradients before they are reduced and scattered."""

from __future__ import annotations

import time
import weakref
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from gradwatch.agent.probe.fsdp_shards import (
    Shards,
    has_other_entrances,
    leave_collectives_out,
    make_whole,
)
from gradwatch.agent.probe.model import WatchedModel, on_arrival
from gradwatch.agent.probe.parameters import Names, class_name, local, name_places
from gradwatch.agent.probe.passes import Leaves
from gradwatch.agent.probe.rounds import Bucket, ReducedFindings, bad_gradients

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from gradwatch.agent.probe.parameters import ParameterInfo
    from gradwatch.agent.probe.passes import Fact
    from gradwatch.agent.probe.rounds import Moment
    from gradwatch.agent.probe.watcher import Watcher


class FSDPModel(WatchedModel):
    """One root and the groups of parameters below it.

    A round is a backward pass in which gradients are reduced. Each rank looks at its own shards of what the
    reduction gave, so what is bad there differs between ranks.

    Args:
        watcher: the process's.
        module: the root.
        groups: FSDP's `FSDPParamGroup`s, in the order of the module tree; kept weakly.
        device: where the gradients are.
        root: ordinal of this model in its process.
    """

    source = "fsdp-unsharded"
    differs_by_rank = True
    shards: Shards

    def __init__(
        self,
        watcher: Watcher,
        module: torch.nn.Module,
        groups: Sequence[Any],
        *,
        device: torch.device,
        root: int,
    ) -> None:
        fsdp_params = [parameter for group in groups for parameter in group.fsdp_params]
        self._places = [
            (parameter.sharded_param, parameter._module_info.module, parameter._module_info.param_name)
            for parameter in fsdp_params
        ]
        self._sizes = {group.mesh_info.mesh.size() for group in groups}
        super().__init__(
            watcher,
            module,
            [parameter.sharded_param for parameter in fsdp_params],
            device=device,
            root=root,
            wrapper="FSDP2",
            group_size=max(self._sizes),
            group=_ranks_of(groups),
        )
        self._places = []
        self.shards = Shards(groups)
        self._groups = [weakref.ref(group) for group in groups]
        self._fsdp_keys = weakref.WeakKeyDictionary(
            {parameter: self._keys[id(parameter.sharded_param)] for parameter in fsdp_params}
        )
        self._unfollowed = set(self._fsdp_keys.values())
        self._reduced: list[weakref.ref[Any]] = []
        self._reductions = 0
        self._partial = False
        self._whole_parameters: Fact = None

    def _names(self, module: torch.nn.Module | None, parameters: Sequence[torch.Tensor]) -> Names:
        """After `unshard()` the modules hold whole parameters: FSDP knows where the shards belong."""
        del parameters
        if module is None:
            raise ValueError("a sharded model has a module")
        return Names(class_name(module), name_places(module, self._places))

    # ------------------------------------------------------------------ the passes

    def entered(self, args: Any, kwargs: Any) -> None:
        """A forward pass through the root begins with these arguments."""
        if self._moment is not None:
            # An exception has left the backward pass before.
            self._watcher.round_log.forget(self._moment)
            self._watcher.autopsies.forget(self._moment)
            self._moment, self._reduced, self._reductions = None, [], 0
        super().entered(args, kwargs)

    def left(self, output: Any) -> None:
        """It has ended with this output."""
        self._follow_whole_parameters()
        super().left(output)

    def part_left(self, output: Any) -> None:
        """A forward pass through a sharded module, or the root, ends; its parameters are still whole.

        At the first output that is bad these are looked at: later they are shards.
        """
        if self._whole_parameters is not None or self._on_cuda or not torch.is_grad_enabled():
            return
        began = time.perf_counter()
        if self.look.fact(Leaves(output).tensors) is False:
            whole = [one for group in self._alive() if group.is_unsharded for one in _whole(group)]
            self._whole_parameters = self.look.fact(whole)
        self._watcher.spent(time.perf_counter() - began)

    def _follow_whole_parameters(self) -> None:
        """Have parameters tell when their gradients arrive: whole ones, since shards have no such hooks."""
        if not self._unfollowed:
            return
        for group in self._alive():
            for parameter in group.fsdp_params:
                key = self._fsdp_keys.get(parameter)
                whole = getattr(parameter, "_unsharded_param", None)
                if key in self._unfollowed and whole is not None and whole.requires_grad:
                    self._unfollowed.discard(key)
                    self._handles.append(on_arrival(whole, self._watcher.arrivals.hook(key)))

    def _gradients_so_far(self) -> list[torch.Tensor]:
        """Whole ones that have not been reduced yet."""
        found = []
        for group in self._alive():
            for parameter in group.fsdp_params:
                whole = getattr(parameter, "_unsharded_param", None)
                gradients = (parameter.unsharded_accumulated_grad, None if whole is None else whole.grad)
                found += [local(gradient) for gradient in gradients if gradient is not None]
        return found

    def _parameters_until_updated(self) -> Callable[[], Fact]:
        """Of other ranks' shards it is not known."""
        return lambda: None

    def _parameter_fact(self) -> Callable[[], Fact]:
        """This rank's shards, or what it has computed with; finite shards say nothing of the others'."""
        whole = self._whole_parameters
        if self._on_cuda:
            return lambda: None
        known: list[Fact] = []

        def fact() -> Fact:
            if not known:
                known.append(whole if self.look.fact(self.shards.held()) else False)
            return known[0]

        return fact

    # ------------------------------------------------------------------ the reduction

    def before(self, fsdp_params: Sequence[Any], gradients: Sequence[torch.Tensor]) -> None:
        """A group's whole gradients are about to be reduced and scattered.

        Args:
            fsdp_params: FSDP's objects of the parameters.
            gradients: of these, in the same order.
        """
        if self._capturing():
            return
        began = time.perf_counter()
        self.catch_up()
        looked_at = [
            (key, parameter, local(gradient))
            for parameter, gradient in zip(fsdp_params, gradients, strict=True)
            if (key := self._fsdp_keys.get(parameter)) is not None
        ]
        pairs = [(key, gradient) for key, _, gradient in looked_at]
        self.look_before(Bucket(self._reductions, None, lambda: pairs), is_last=False)
        self._reductions += 1
        self._reduced += [weakref.ref(parameter) for _, parameter, _ in looked_at]
        self._watcher.spent(time.perf_counter() - began)

    def backward_over(self, *, complete: bool) -> None:
        """A backward pass is over; a round if something was reduced in it.

        Args:
            complete: whether FSDP has waited for the reductions.
        """
        moment = self._moment
        if moment is None:
            return
        began = time.perf_counter()
        reduced, self._reduced, self._reductions = self._reduced, [], 0
        self._moment, self._whole_parameters = None, None
        self._all_seen(moment)
        complete = complete and all(group.all_reduce_grads for group in self._alive())
        if complete:
            # What comes out also holds what came in with the rounds before: no fault of this reduction.
            self.reduces, self._partial = not self._partial, False
            shards = [one() for one in reduced]
            self.look_after(moment, _gradients(one.sharded_param for one in shards if one is not None))
        else:
            self._partial = True
            self._watcher.autopsies.round_over(self, moment, bad=None)
        self._watcher.spent(time.perf_counter() - began)

    def _reduced_findings(self, moment: Moment) -> ReducedFindings:
        origin = moment.origin_on_host()
        gradients = [
            (self._keys[id(parameter)], local(parameter.grad))
            for parameter in self.parameters()
            if parameter.grad is not None
        ]
        return ReducedFindings(bad_gradients(gradients), origin.overflow)

    # ------------------------------------------------------------------ the guard

    def why_ranks_may_disagree(self) -> str | None:
        """Why no common decision can be had; None when the ranks can agree on one."""
        if self._sizes == {dist.get_world_size()}:
            return None
        return "it is sharded over a part of the ranks, and the others would not skip together with them"

    def gradients(self) -> list[torch.Tensor]:
        """This rank's shards of the reduced gradients."""
        return _gradients(self.parameters())

    # ------------------------------------------------------------------ the update

    def as_taken(self) -> list[torch.Tensor]:
        """The gradients that an optimizer takes: changed as a whole, or this rank's part."""
        gradients = [one.grad for one in self.parameters() if one.grad is not None]
        return [*gradients, *map(local, gradients)]

    def _held_weights(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """This rank's shards."""
        return [(one.sharded_param, local(one.sharded_param)) for one in self.shards.fsdp_params()]

    def _infos_of(self, weights: Sequence[torch.Tensor]) -> list[ParameterInfo]:
        keys = {id(one.sharded_param): self._fsdp_keys[one] for one in self.shards.fsdp_params()}
        return [self.info(keys[id(one)]) for one in weights]

    # ------------------------------------------------------------------ a replay

    def why_not_replayed(self) -> str | None:
        """Why no pass of it can be replayed now; None when one can be."""
        module = self.module()
        if module is not None and has_other_entrances(module):
            return "its passes may begin in another method than forward (register_fsdp_forward_method)"
        if not self.on_host:
            return "on a device, passes of a sharded model are not replayed"
        return self.shards.why_not_whole

    def prepare_replay(self, shards: Mapping[int, Sequence[torch.Tensor]]) -> dict[int, torch.Tensor]:
        """In a child process: have the module compute without anything of another rank.

        Args:
            shards: by rank, what it holds of the parameters.

        Returns:
            The whole parameters by key.
        """
        module = self.module()
        if module is None:
            return {}
        fsdp_params = self.shards.fsdp_params()
        whole = make_whole(fsdp_params, shards)
        leave_collectives_out(module)
        keys = [self._fsdp_keys[fsdp_param] for fsdp_param in fsdp_params]
        return dict(zip(keys, whole, strict=True))

    # ------------------------------------------------------------------ afterwards

    def start_over(self) -> None:
        """A checkpoint has been loaded: what went before is over, and written down."""
        super().start_over()
        self._reduced, self._reductions, self._partial, self._whole_parameters = [], 0, False, None

    def _alive(self) -> list[Any]:
        return [group for reference in self._groups if (group := reference()) is not None]


def _ranks_of(groups: Iterable[Any]) -> list[int]:
    """Global ranks that train the model together, rising; none when they are the whole world."""
    ranks = sorted({rank for group in groups for rank in group.mesh_info.mesh.mesh.flatten().tolist()})
    return ranks if len(ranks) < dist.get_world_size() else []


def groups_of(state: Any) -> list[Any]:
    """The parameter groups of an `FSDPState`: several since torch 2.11, one or none before."""
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def _whole(group: Any) -> list[torch.Tensor]:
    return [
        local(parameter._unsharded_param)
        for parameter in group.fsdp_params
        if hasattr(parameter, "_unsharded_param")
    ]


def _gradients(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
