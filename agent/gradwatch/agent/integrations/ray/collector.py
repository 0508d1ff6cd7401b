"""The collector as a detached Ray actor: it outlives the runs, and Ray starts it again when its node dies."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import ray

from gradwatch.agent.integrations.ray.kept import Kept
from gradwatch.agent.integrations.ray.relay import FarEnd
from gradwatch.agent.sidecar import whereabouts
from gradwatch.agent.sidecar.cursor import replace_file

NAME = "gradwatch-collector"
NAMESPACE = "gradwatch"
LOG = "collector.log"
_START_SECONDS = 60.0
_END_SECONDS = 10.0


class CollectorActor:
    """The actor: keeps `gradwatch collector` running on its node, and carries connections to it.

    Args:
        state_dir: the collector's state folder, with its store; made if absent. On a storage that all nodes
            see, what it knows outlives its node.
        flags: more arguments of `gradwatch collector`.

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(self, state_dir: str, flags: tuple[str, ...] = ()) -> None:
        self._state_dir = Path(state_dir)
        self._state_dir.mkdir(parents=True, exist_ok=True)
        self._flags = flags
        self._collector: Kept | None = None
        self._far = FarEnd(self._state_dir)

    async def run(self) -> str:
        """Keep the collector running from now on; returns the state folder. Again, it changes nothing."""
        if self._collector is None:
            arguments = ["collector", "--state-dir", self._state_dir, *self._flags]
            self._collector = Kept(arguments, self._state_dir, self._state_dir / LOG)
        return str(self._state_dir)

    async def take_policy(self, job: str, text: str) -> None:
        """Have the collector follow a policy for a job.

        Raises:
            OSError: it cannot be written beside the collector's state.
        """
        # As `gradwatch run --policy` leaves it for its own.
        folder = self._state_dir / "policies"
        file, named = folder / f"{job}.yaml", folder / f"{job}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, text.encode())
        replace_file(named, json.dumps({"file": str(file)}).encode())

    async def where(self) -> dict[str, Any] | None:
        """Where it listens on its node, as in `collector.json`; None before that is known."""
        try:
            return dataclasses.asdict(whereabouts.read(self._state_dir))
        except whereabouts.UnknownError:
            return None

    async def pids(self) -> tuple[int, int | None]:
        """The process ids of the actor and of the collector."""
        return os.getpid(), None if self._collector is None else self._collector.pid

    async def end(self) -> None:
        """End the collector."""
        if self._collector is not None:
            await self._collector.end(_END_SECONDS)

    async def open(self) -> int:
        """See `FarEnd`."""
        await self.run()
        return await self._far.open()

    async def send(self, number: int, data: bytes) -> None:
        """See `FarEnd`."""
        await self._far.send(number, data)

    async def receive(self, number: int) -> bytes:
        """See `FarEnd`."""
        return await self._far.receive(number)

    async def close(self, number: int) -> None:
        """See `FarEnd`."""
        self._far.close(number)


def ensure_collector(state_dir: str | os.PathLike[str], *, flags: tuple[str, ...] = ()) -> Any:
    """The cluster's collector, started if there is none.

    Args:
        state_dir: of a collector that is started; see `CollectorActor`.
        flags: of a collector that is started: more arguments of `gradwatch collector`.

    Returns:
        The actor's handle.

    Raises:
        ray.exceptions.RayError: it cannot be started.
    """
    actor: Any = ray.remote(num_cpus=0, max_restarts=-1)(CollectorActor)
    handle: Any = actor.options(
        name=NAME, namespace=NAMESPACE, lifetime="detached", get_if_exists=True
    ).remote(os.fspath(state_dir), flags)
    ray.get(handle.run.remote(), timeout=_START_SECONDS)
    return handle
