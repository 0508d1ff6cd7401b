"""An actor on each Ray node where workers run: it has the node's spool, and keeps a sidecar running."""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path
from typing import Any

import ray

from gradwatch.agent.integrations.ray.kept import Kept
from gradwatch.agent.integrations.ray.relay import NearEnd
from gradwatch.agent.sidecar import cleanup

LOG, _ = cleanup.LOGS
_ID_CHARACTERS = 12
# Beyond what the sidecar itself takes to ship the rest.
_MARGIN_SECONDS = 3.0


class Attendant:
    """The actor. Ray starts it again when it dies; it then goes on in the same spool.

    Args:
        job: whose status the sidecar keeps in the spool.
        state_dir: the state folder on this node; another is taken where it cannot be made.
        run_id: names the spool in it, together with the node's id.
        flags: more arguments of the sidecar.
        drain_seconds: how long the sidecar tries to ship the rest.

    Raises:
        OSError: no spool can be made.
    """

    def __init__(
        self,
        *,
        job: str,
        state_dir: str,
        run_id: str,
        flags: tuple[str, ...] = (),
        drain_seconds: float = 10.0,
    ) -> None:
        self._job = job
        self._state_dir, self._spool = _made(
            Path(state_dir), f"{run_id}-{ray.get_runtime_context().get_node_id()[:_ID_CHARACTERS]}"
        )
        self._collector: Any = None
        self._flags = flags
        self._drain_seconds = drain_seconds
        self._sidecar: Kept | None = None
        self._starting = asyncio.Lock()

    async def attend(self, collector: Any) -> str:
        """Keep a sidecar running from now on; returns the spool's path. Again, it changes nothing.

        Args:
            collector: HOST:PORT, or the handle of an actor that carries connections to one.
        """
        self._collector = collector
        async with self._starting:
            if self._sidecar is None:
                self._sidecar = Kept(await self._arguments(), self._spool, self._spool / LOG)
        return str(self._spool)

    async def _arguments(self) -> list[object]:
        address = self._collector
        if not isinstance(address, str):
            address = f"127.0.0.1:{await NearEnd(lambda: self._collector).listen()}"
        arguments: list[object] = ["sidecar", "--spool", self._spool, "--state-dir", self._state_dir]
        arguments += ["--job", self._job, "--collector", address]
        return [*arguments, "--drain-timeout", self._drain_seconds, *self._flags]

    async def drain(self) -> bool:
        """Have the sidecar ship the rest, and end; returns whether the collector has everything."""
        if self._sidecar is None:
            return False
        return await self._sidecar.end(self._drain_seconds + _MARGIN_SECONDS) == 0

    def clear(self) -> None:
        """Remove the spool, of which everything is shipped."""
        cleanup.remove_spool(self._spool)

    def pids(self) -> tuple[int, int | None]:
        """The process ids of the actor and of the sidecar."""
        return os.getpid(), None if self._sidecar is None else self._sidecar.pid


def _made(state_dir: Path, name: str) -> tuple[Path, Path]:
    """A state folder, and a spool in it."""
    try:
        spool = state_dir / "spool" / name
        spool.mkdir(parents=True, exist_ok=True)
    except OSError:
        state_dir = Path(tempfile.gettempdir()) / f"gradwatch-{os.getuid()}"
        spool = state_dir / "spool" / name
        spool.mkdir(parents=True, exist_ok=True)
    return state_dir, spool
