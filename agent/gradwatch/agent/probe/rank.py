"""Who this process is in the job, and its claim to be that."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from gradwatch.agent.probe import spool
from gradwatch.agent.probe.node import node_name
from gradwatch.agent.probe.version import probe_version

if TYPE_CHECKING:
    from pathlib import Path

    from gradwatch.agent.probe.settings import Settings


@dataclass(frozen=True)
class Identity:
    """This process's place in the job.

    Attributes:
        attempt_key: equal on the ranks of one rendezvous and on no others; None where the
            job's store does not give one.
        duplicate: another live process on this node already is this rank.
    """

    incarnation: str
    rank: int
    world_size: int
    attempt_key: str | None
    duplicate: bool

    def hello(self, settings: Settings, device: torch.device, framework: str) -> dict[str, Any]:
        """The `Hello` message in its JSON mapping."""
        message: dict[str, Any] = {
            "incarnation": self.incarnation,
            "job": settings.job,
            "generation": settings.generation,
            "rank": self.rank,
            "world_size": self.world_size,
            "node": node_name(),
            "pid": os.getpid(),
            "device": str(device),
            "torch_version": torch.__version__,
            "probe_version": probe_version(),
            "framework": framework,
            "duplicate_claim": self.duplicate,
        }
        if self.attempt_key is not None:
            message["attempt_key"] = self.attempt_key
        local_rank = os.environ.get("LOCAL_RANK", "")
        if local_rank.isdigit():
            message["local_rank"] = int(local_rank)
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            message["device_name"] = properties.name
            uuid = getattr(properties, "uuid", None)
            if uuid is not None:
                message["device_id"] = str(uuid)
        return message


def world_size() -> int:
    """Ranks of the job, as far as this process has been told by now."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def part_of_the_world(group: Any) -> list[int]:
    """Global ranks of a process group, rising; none when it is the whole world."""
    ranks = sorted(dist.get_process_group_ranks(group))
    return ranks if len(ranks) < dist.get_world_size() else []


def identify(folder: Path) -> tuple[Identity, int | None]:
    """Say who this process is, and claim the rank on this node.

    Returns:
        The identity, and the descriptor that holds the claim: to be kept open for the
        life of the process. None when another process holds it.

    Raises:
        OSError: the spool cannot be written.
    """
    distributed = dist.is_available() and dist.is_initialized()
    rank = dist.get_rank() if distributed else 0
    incarnation = spool.new_incarnation()
    claim = spool.try_lock(folder / spool.claim_filename(rank if distributed else None))
    identity = Identity(
        incarnation=incarnation,
        rank=rank,
        world_size=world_size(),
        attempt_key=_attempt_key(incarnation) if distributed and claim is not None else None,
        duplicate=claim is None,
    )
    return identity, claim


def unwatched_message(settings: Settings, reason: str) -> dict[str, Any]:
    """The `Unwatched` message of this process in its JSON mapping."""
    message: dict[str, Any] = {
        "job": settings.job,
        "generation": settings.generation,
        "node": node_name(),
        "pid": os.getpid(),
        "reason": reason,
    }
    if dist.is_available() and dist.is_initialized():
        message |= {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
    return message


def _attempt_key(incarnation: str) -> str | None:
    """The incarnation of whichever rank came first in this rendezvous.

    The store of the default process group is made anew for every rendezvous, and
    `compare_set` is one atomic round trip, which no other rank has to answer.
    """
    try:
        store = dist.distributed_c10d._get_default_store()
        return bytes(store.compare_set("gradwatch/attempt", "", incarnation)).decode()
    except Exception:
        # A store of the user's own without compare_set: the collector then goes by the hellos.
        return None
