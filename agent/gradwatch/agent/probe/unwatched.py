"""Why a process that trains is not watched.

Silence is the worst failure of a tool like this: so the first optimizer step in a process in
which nothing is watched says so, with the cause when it can be told.
"""

from __future__ import annotations

import gc
import sys
from typing import Any

import torch.distributed as dist

from gradwatch.agent.probe.parameters import parameters_of


def why_unwatched(optimizer: Any) -> str:
    """Name the wrapper that is in use instead of DistributedDataParallel."""
    if _used("deepspeed"):
        return "the model is wrapped by DeepSpeed, which gradwatch does not know"
    if _used("megatron.core"):
        return "the model is wrapped by Megatron, which gradwatch does not know"
    if any(
        type(one).__name__ == "DTensor" or hasattr(one, "_local_tensor") for one in parameters_of(optimizer)
    ):
        return "the model is made of DTensors, and no fully_shard (FSDP2) model has run a forward pass"
    fsdp = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")
    if fsdp is not None and _alive(fsdp.FullyShardedDataParallel):
        return (
            "the model is wrapped by FullyShardedDataParallel (FSDP1), which gradwatch does not know; "
            "torch recommends fully_shard in its place"
        )
    if not (dist.is_available() and dist.is_initialized()):
        return "the process is one of several, and no torch.distributed process group was made"
    return "no model is wrapped in DistributedDataParallel"


def _used(package: str) -> bool:
    return package in sys.modules


def _alive(kind: type) -> bool:
    """Whether an instance exists. Walks the heap: for use once."""
    return any(isinstance(item, kind) for item in gc.get_objects())
