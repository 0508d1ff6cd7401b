"""The sidecar as a process: configuration, signals, and a bounded end."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib.metadata
import json
import logging
import os
import secrets
import signal
from typing import TYPE_CHECKING

from gradwatch.agent.checkpoints.result import Layout
from gradwatch.agent.probe import spool
from gradwatch.agent.probe.node import node_name
from gradwatch.agent.sidecar import cleanup, cursor, tail, whereabouts
from gradwatch.agent.sidecar.access import NOT_VERIFIED, Access, AccessError, Credentials
from gradwatch.agent.sidecar.checkpoints import About, Checkpoints
from gradwatch.agent.sidecar.client import Client, CollectorUnavailableError
from gradwatch.agent.sidecar.sidecar import Drained, Sidecar
from gradwatch.protos.v1 import gradwatch_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gradwatch.agent.checkpoints.place import Place
    from gradwatch.agent.sidecar.whereabouts import Whereabouts

_log = logging.getLogger(__name__)

# Without its launcher nobody waits for us, and the next run ships the rest.
ORPHAN_DRAIN_SECONDS = 3.0
_PARENT_POLL_SECONDS = 0.25
# A scan's child is killed in this time.
_STOP_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class SidecarConfig:
    """What a sidecar is told.

    Attributes:
        spool: the folder to ship; for `attend`, the folder of all.
        state_dir: where the collector of this node leaves its address, and earlier runs
            their spools; None where there is no such folder.
        collector: HOST:PORT; None to look into `state_dir`.
        job: whose status to keep in the spool; None for no status.
        drain_seconds: how long to go on after SIGTERM.
        parent: end when this process is no longer our parent.
        drain: ship what is there, then end.
        access: what to show to the collector, and whom to trust.
        checkpoints: where they lie; None to look after none.
        checkpoints_layout: how they lie there.
    """

    spool: Path
    state_dir: Path | None
    collector: str | None
    job: str | None
    drain_seconds: float = 10.0
    parent: int | None = None
    drain: bool = False
    access: Access = dataclasses.field(default_factory=Access)
    checkpoints: Place | None = None
    checkpoints_layout: Layout = Layout.AUTO


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
    ending, orphaned = told_to_end(), asyncio.Event()
    if config.drain:
        ending.set()
    watching = asyncio.create_task(_watch_parent(config.parent, orphaned, ending))
    try:
        return await ship(config, ending, orphaned)
    finally:
        watching.cancel()


def told_to_end() -> asyncio.Event:
    """What SIGTERM and SIGINT set from now on."""
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    return told


async def ship(config: SidecarConfig, ending: asyncio.Event, orphaned: asyncio.Event | None = None) -> bool:
    """Ship one spool until `ending` is set, and then the rest, for no longer than there is time.

    Args:
        config: what the sidecar is told.
        ending: set by whoever wants it to end.
        orphaned: set when nobody waits for it.

    Returns:
        Whether everything was shipped.

    Raises:
        SpoolTakenError: another live sidecar ships this spool.
        OSError: the spool cannot be used.
    """
    lock = spool.try_lock(config.spool / spool.SIDECAR_LOCK)
    if lock is None:
        raise SpoolTakenError(f"another sidecar ships {config.spool}")
    try:
        # The word of a sidecar before us is no longer true.
        (config.spool / cleanup.DRAINED).unlink(missing_ok=True)
        drained = await _ship(config, ending, orphaned)
        with contextlib.suppress(OSError):
            document = json.dumps(dataclasses.asdict(drained)).encode()
            cursor.replace_file(config.spool / cleanup.DRAINED, document)
        return drained.complete
    finally:
        os.close(lock)


async def _ship(config: SidecarConfig, ending: asyncio.Event, orphaned: asyncio.Event | None) -> Drained:
    identity = secrets.token_hex(16)
    collector = _Collector(config)

    def take(directive: pb.Directive) -> None:
        sidecar.take(directive)
        if checkpoints is not None and directive.HasField("task"):
            checkpoints.take(directive.task)

    client = Client(
        collector.address, lambda: _hello(config, identity, collector.id), take, collector.credentials
    )
    sidecar = Sidecar(config.spool, _neighbours(config), client)
    checkpoints = _checkpoints(config, sidecar)
    looking_after = asyncio.create_task(_look_after(checkpoints, ending, sidecar.drain))
    shipping = asyncio.create_task(sidecar.ship())
    told = asyncio.create_task(sidecar.draining.wait())
    await asyncio.wait({shipping, told}, return_when=asyncio.FIRST_COMPLETED)
    limit = config.drain_seconds
    if orphaned is not None and orphaned.is_set():
        limit = min(limit, ORPHAN_DRAIN_SECONDS)
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(shipping, limit)
    for task in (told, looking_after):
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
    return drained


async def _look_after(
    checkpoints: Checkpoints | None, ending: asyncio.Event, drain: Callable[[], None]
) -> None:
    """Look after the checkpoints, beside the shipping, until told to end; only then the rest is shipped."""
    if checkpoints is not None and not ending.is_set():
        running = asyncio.create_task(checkpoints.run())
        await ending.wait()
        running.cancel()
        await asyncio.wait({running}, timeout=_STOP_SECONDS)
        checkpoints.close()
    await ending.wait()
    drain()


def _checkpoints(config: SidecarConfig, sidecar: Sidecar) -> Checkpoints | None:
    if config.checkpoints is None:
        return None
    return Checkpoints(
        config.checkpoints,
        config.checkpoints_layout,
        folder=config.spool,
        state_dir=config.state_dir,
        about=lambda: about(config),
        open_journals=sidecar.open_journals,
        wrote=sidecar.look,
    )


def about(config: SidecarConfig) -> About | None:
    """Whose checkpoints these are, by the first launch of our spool; None while there is none."""
    try:
        launch = next(iter(tail.list_launches(config.spool)), None)
        if launch is None:
            return None
        first = spool.Segment(spool.launch_journal_name(launch), launch, 0).filename
        with (config.spool / first).open("rb") as file:
            started = json.loads(file.readline())["launch_started"]
        return About(str(started["job"]), int(started.get("generation", 0)), node_name(), launch)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _hello(config: SidecarConfig, identity: str, collector: str) -> pb.Sidecar:
    launches: list[str] = []
    with contextlib.suppress(OSError):
        launches = tail.list_launches(config.spool)
    return pb.Sidecar(
        id=identity,
        node=node_name(),
        version=importlib.metadata.version("gradwatch"),
        jobs=[config.job] if config.job else [],
        launches=launches,
        collector=collector,
    )


def _neighbours(config: SidecarConfig) -> Path | None:
    if config.state_dir is None:
        return None
    folder = config.state_dir / "spool"
    return folder if folder.is_dir() else None


class _Collector:
    """The collector that is meant: named, or by what it has left in the state folder.

    Attributes:
        id: which one it is; empty while that is not known, as of one that is named by its address alone.
            Once it is killed, its port may be another's before it is back.
    """

    def __init__(self, config: SidecarConfig) -> None:
        self._config = config
        self.id = ""

    def address(self) -> str:
        """Where it is now; raises `CollectorUnavailableError`."""
        if self._config.collector is not None:
            return self._config.collector
        found = self._found()
        self.id = found.id
        return found.grpc

    def credentials(self) -> Credentials:
        """What to show, and whom to trust; raises `CollectorUnavailableError`."""
        try:
            credentials = self._config.access.read()
        except AccessError as error:
            raise CollectorUnavailableError(str(error)) from error
        if self._config.collector is not None:
            return credentials
        # The collector of this machine says itself whether it speaks TLS.
        if not self._found().grpc_tls:
            return dataclasses.replace(credentials, ca=None)
        if credentials.ca is None:
            raise CollectorUnavailableError(
                f"{NOT_VERIFIED}: it wants --tls-ca, the CA that signed its certificate"
            )
        return credentials

    def _found(self) -> Whereabouts:
        if self._config.state_dir is None:
            raise CollectorUnavailableError("no collector is named, and no state folder to find one in")
        try:
            return whereabouts.read(self._config.state_dir)
        except whereabouts.UnknownError as error:
            raise CollectorUnavailableError(str(error)) from error


async def _watch_parent(parent: int | None, orphaned: asyncio.Event, ending: asyncio.Event) -> None:
    """Notice that the launcher is gone, even one that was killed."""
    while parent is not None and os.getppid() == parent:  # noqa: ASYNC110
        await asyncio.sleep(_PARENT_POLL_SECONDS)  # the kernel tells no event of this
    if parent is not None:
        orphaned.set()
        ending.set()
