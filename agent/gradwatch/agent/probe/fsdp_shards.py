"""The parameters of a model that `fully_shard` shards: what this rank holds of them, and the whole.

A replay computes with whole parameters, and without FSDP's collectives. What is changed here is changed in a
child process that ends afterwards.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from gradwatch.agent.probe.parameters import local

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

CAP_BYTES = 1 << 30
_GIB = 1 << 30
_EXTENSION = "fsdp_pre_all_gather"


class Shards:
    """The shards of one model.

    Args:
        groups: FSDP's `FSDPParamGroup`s; kept weakly.

    Attributes:
        ranks: global, of those that train the model together.
        peers: global, of those whose shards make up the parameters that this rank computes with.
        nbytes: of the whole parameters.
        why_not_whole: why they cannot be put together; None when they can.
    """

    def __init__(self, groups: Sequence[Any]) -> None:
        fsdp_params = [parameter for group in groups for parameter in group.fsdp_params]
        self._fsdp_params = [weakref.ref(parameter) for parameter in fsdp_params]
        self.ranks = sorted(
            {rank for group in groups for rank in group.mesh_info.mesh.mesh.flatten().tolist()}
        )
        self.peers = sorted({rank for parameter in fsdp_params for rank in _peers(parameter)})
        self.nbytes = sum(
            parameter.sharded_param.numel() * _dtype(parameter).itemsize for parameter in fsdp_params
        )
        self.why_not_whole = _why_not_whole(fsdp_params, self.nbytes)

    def fsdp_params(self) -> list[Any]:
        """FSDP's objects of the parameters: as many, and in the same order, on every rank."""
        return [parameter for reference in self._fsdp_params if (parameter := reference()) is not None]

    def held(self) -> list[torch.Tensor]:
        """What this rank holds of each parameter."""
        return [local(parameter.sharded_param).detach() for parameter in self.fsdp_params()]


def make_whole(
    fsdp_params: Sequence[Any], shards: Mapping[int, Sequence[torch.Tensor]]
) -> list[torch.nn.Parameter]:
    """Put whole parameters into the modules.

    Args:
        fsdp_params: FSDP's objects of the parameters.
        shards: by global rank, what it holds of each of these; of all peers.

    Returns:
        As FSDP hands them to the forward pass: cast by its mixed precision policy.
    """
    found = []
    for place, fsdp_param in enumerate(fsdp_params):
        pieces = [shards[rank][place] for rank in _peers(fsdp_param)]
        together = torch.cat(pieces, dim=fsdp_param.fsdp_placement.dim).to(_dtype(fsdp_param))
        whole = torch.nn.Parameter(together, requires_grad=fsdp_param.sharded_param.requires_grad)
        info = fsdp_param._module_info
        users = zip(
            [info.module, *info.shared_modules], [info.param_name, *info.shared_param_names], strict=True
        )
        for module, name in users:
            module._parameters[name] = whole
        found.append(whole)
    return found


def leave_collectives_out(root: torch.nn.Module) -> None:
    """Have FSDP's hooks do what they do for modules without parameters: cast inputs and outputs."""
    modules: Iterable[Any] = root.modules()
    states = [module._get_fsdp_state() for module in modules if hasattr(module, "_get_fsdp_state")]
    # By this, models are known that are watched.
    context = type(states[0]._state_ctx)()
    for state in states:
        state._state_ctx = context
        if hasattr(state, "_fsdp_param_groups"):
            state._fsdp_param_groups = []
        else:
            # Until torch 2.10.
            state._fsdp_param_group = None


def has_other_entrances(root: torch.nn.Module) -> bool:
    """Whether `register_fsdp_forward_method` has made methods besides `forward` begin a pass."""
    codes = (getattr(value, "__code__", None) for value in vars(root).values())
    return any(getattr(code, "co_name", "") == "wrapped_method" for code in codes)


def _peers(fsdp_param: Any) -> list[int]:
    """Global ranks that hold the shards of one parameter, in the order of these."""
    group = getattr(fsdp_param.mesh_info, "shard_process_group", None)
    return [dist.get_rank()] if group is None else dist.get_process_group_ranks(group)


def _dtype(fsdp_param: Any) -> torch.dtype:
    """That a parameter has in the forward pass."""
    dtype: torch.dtype = getattr(fsdp_param, "param_dtype", None) or fsdp_param.sharded_param.dtype
    return dtype


def _why_not_whole(fsdp_params: Sequence[Any], nbytes: int) -> str | None:
    if nbytes > CAP_BYTES:
        return (
            f"the whole parameters take {nbytes / _GIB:.1f} GiB, and a replay puts together at most "
            f"{CAP_BYTES / _GIB:.0f} GiB"
        )
    if any(fsdp_param.is_dtensor for fsdp_param in fsdp_params):
        return "its parameters are also divided by tensor parallelism, and a replay has one rank"
    if any(hasattr(local(fsdp_param.sharded_param), _EXTENSION) for fsdp_param in fsdp_params):
        return "its parameters are gathered by a tensor class of their own"
    return None
