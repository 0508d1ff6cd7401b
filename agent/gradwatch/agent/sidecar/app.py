"""The sidecar as a process: configuration, signals, and a bounded end."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib.metadata
import json
import logging
import os
import platform
import secrets
import signal
from typing import TYPE_CHECKING

from gradwatch.agent.probe import spool
from gradwatch.agent.sidecar import cleanup, cursor, tail
from gradwatch.agent.sidecar.access import NOT_VERIFIED, Access, AccessError, Credentials
from gradwatch.agent.sidecar.client import Client, CollectorUnavailableError
from gradwatch.agent.sidecar.sidecar import Sidecar
from gradwatch.protos.v1 import gradwatch_pb2 as pb

if TYPE_CHECKING:
    from pathlib import Path

_log = logging.getLogger(__name__)

# Without its launcher nobody waits for us, and the next run ships the rest.
ORPHAN_DRAIN_SECONDS = 3.0
_PARENT_POLL_SECONDS = 0.25


@dataclasses.dataclass(frozen=True)
class SidecarConfig:
    """What a sidecar is told.

    Attributes:
        spool: the folder to ship.
        state_dir: where the collector of this node leaves its address, and earlier runs
            their spools; None where there is no such folder.
        collector: HOST:PORT; None to look into `state_dir`.
        job: whose status to keep in the spool; None for no status.
        drain_seconds: how long to go on after SIGTERM.
        parent: end when this process is no longer our parent.
        drain: ship what is there, then end.
        access: what to show to the collector, and whom to trust.
    """

    spool: Path
    state_dir: Path | None
    collector: str | None
    job: str | None
    drain_seconds: float = 10.0
    parent: int | None = None
    drain: bool = False
    access: Access = dataclasses.field(default_factory=Access)


class SpoolTakenError(Exception):
    """Another sidecar ships this spool."""


async def serve(config: SidecarConfig) -> bool:
    """Ship until told to end by SIGTERM or SIGINT.

    Returns:
        Whether everything was shipped.

    Raises:
        SpoolTakenError: another live sidecar ships this spool.
        OSError: the spool cannot be used.
    """
    lock = spool.try_lock(config.spool / spool.SIDECAR_LOCK)
    if lock is None:
        raise SpoolTakenError(f"another sidecar ships {config.spool}")
    loop = asyncio.get_running_loop()
    client = Client(
        lambda: _address(config),
        _hello(config),
        lambda status: sidecar.take_status(status),  # noqa: PLW0108 - it is bound on the next line
        lambda: _credentials(config),
    )
    sidecar = Sidecar(
        config.spool,
        _neighbours(config),
        client,
        lambda document: _is_final(config, document),
        wants_status=config.job is not None,
    )
    if config.drain:
        sidecar.draining.set()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, sidecar.draining.set)
    orphaned = asyncio.Event()
    watching = asyncio.create_task(_watch_parent(config.parent, orphaned, sidecar.draining))
    shipping = asyncio.create_task(sidecar.ship())
    told = asyncio.create_task(sidecar.draining.wait())
    await asyncio.wait({shipping, told}, return_when=asyncio.FIRST_COMPLETED)
    limit = min(config.drain_seconds, ORPHAN_DRAIN_SECONDS) if orphaned.is_set() else config.drain_seconds
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(shipping, limit)
    for task in (watching, told):
        task.cancel()
    await client.close()
    drained = sidecar.drained()
    if not drained.complete:
        _log.warning(
            "not shipped within %g s: %d journals, %d bytes in %s; the next run ships them",
            limit,
            drained.journals,
            drained.unread_bytes,
            drained.spool,
        )
    with contextlib.suppress(OSError):
        document = json.dumps(dataclasses.asdict(drained)).encode()
        cursor.replace_file(config.spool / cleanup.DRAINED, document)
    return drained.complete


def _hello(config: SidecarConfig) -> pb.Sidecar:
    return pb.Sidecar(
        id=secrets.token_hex(16),
        node=platform.node() or "unknown",
        version=importlib.metadata.version("gradwatch"),
        jobs=[config.job] if config.job else [],
    )


def _neighbours(config: SidecarConfig) -> Path | None:
    if config.state_dir is None:
        return None
    folder = config.state_dir / "spool"
    return folder if folder.is_dir() else None


def _address(config: SidecarConfig) -> str:
    return config.collector or _found(config)[0]


def _credentials(config: SidecarConfig) -> Credentials:
    try:
        credentials = config.access.read()
    except AccessError as error:
        raise CollectorUnavailableError(str(error)) from error
    if config.collector is not None:
        return credentials
    # The collector of this machine says itself whether it speaks TLS.
    _, speaks_tls = _found(config)
    if not speaks_tls:
        return dataclasses.replace(credentials, ca=None)
    if credentials.ca is None:
        raise CollectorUnavailableError(
            f"{NOT_VERIFIED}: it wants --tls-ca, the CA that signed its certificate"
        )
    return credentials


def _found(config: SidecarConfig) -> tuple[str, bool]:
    """Where the collector of this machine listens, and whether it speaks TLS there."""
    if config.state_dir is None:
        raise CollectorUnavailableError("no collector is named, and no state folder to find one in")
    path = config.state_dir / "collector.json"
    try:
        found = json.loads(path.read_bytes())
        return str(found["grpc"]), found.get("grpc_tls") is True
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CollectorUnavailableError(f"no collector has left its address in {path}: {error}") from error


async def _watch_parent(parent: int | None, orphaned: asyncio.Event, draining: asyncio.Event) -> None:
    """Notice that the launcher is gone, even one that was killed."""
    while parent is not None and os.getppid() == parent:  # noqa: ASYNC110
        await asyncio.sleep(_PARENT_POLL_SECONDS)  # the kernel tells no event of this
    if parent is not None:
        orphaned.set()
        draining.set()


def _is_final(config: SidecarConfig, document: bytes) -> bool:
    """Whether a status tells that our own launches have ended: nothing new will follow from us."""
    try:
        launches = json.loads(document)["launches"]
        ended = {launch["id"] for launch in launches if launch["ended_at"] is not None}
        own = {
            tail.incarnation_of(name)
            for name in tail.list_journals(config.spool)
            if name.startswith(spool.launch_journal_name(""))
        }
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return own <= ended
