"""A TCP connection through Ray: for hosts that cannot reach the collector, as one on loopback.

Ray carries the bytes between two actors: who may call actors of the cluster may connect, and nobody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradwatch.agent.sidecar import whereabouts

if TYPE_CHECKING:
    from collections.abc import Callable

_CHUNK_BYTES = 1 << 18


class FarEnd:
    """The side at the collector: an actor's methods, called by near ends.

    Args:
        state_dir: where the collector of this host leaves its address, asked at each connection.
    """

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self._streams: dict[int, tuple[asyncio.StreamReader, asyncio.StreamWriter]] = {}

    async def open(self) -> int:
        """Connect; returns the connection's number.

        Raises:
            OSError: the collector does not listen.
            UnknownError: it has not left its address.
        """
        found = whereabouts.read(self._state_dir)
        host, _, port = found.grpc.rpartition(":")
        streams = await asyncio.open_connection(host, int(port))
        try:
            # While it lives the port is its own; of one that was killed the port may be another's.
            os.kill(found.pid, 0)
        except OSError:
            streams[1].close()
            raise
        # Of no earlier life of this actor.
        number = secrets.randbits(63)
        self._streams[number] = streams
        return number

    async def send(self, number: int, data: bytes) -> None:
        """Write to a connection; nothing, to one that is closed.

        Raises:
            OSError: it broke.
        """
        if number in self._streams:
            _, writer = self._streams[number]
            writer.write(data)
            await writer.drain()

    async def receive(self, number: int) -> bytes:
        """What has arrived, at least a byte; b"" once there will be nothing more.

        Raises:
            OSError: it broke.
        """
        if number not in self._streams:
            return b""
        reader, _ = self._streams[number]
        return await reader.read(_CHUNK_BYTES)

    def close(self, number: int) -> None:
        """Let go of a connection."""
        _, writer = self._streams.pop(number, (None, None))
        if writer is not None:
            writer.close()


class Relay:
    """An actor at the host of a collector that has left its address in a state folder."""

    def __init__(self, state_dir: str) -> None:
        self._far = FarEnd(Path(state_dir))

    async def open(self) -> int:
        """See `FarEnd`."""
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


class NearEnd:
    """The side at a sidecar: a port on loopback whose connections go on at the far end.

    Args:
        far: gives the handle of the actor there, asked at each connection: it may have moved.
    """

    def __init__(self, far: Callable[[], Any]) -> None:
        self._far = far
        self._server: asyncio.Server | None = None

    async def listen(self) -> int:
        """Listen on a free port; returns it."""
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until either side ends it or breaks."""
        with contextlib.suppress(Exception), contextlib.closing(writer):
            far = self._far()
            number = await far.open.remote()
            try:
                ways = [
                    asyncio.create_task(self._there(far, number, reader)),
                    asyncio.create_task(self._back(far, number, writer)),
                ]
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
            finally:
                far.close.remote(number)

    @staticmethod
    async def _there(far: Any, number: int, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(_CHUNK_BYTES):
            await far.send.remote(number, data)

    @staticmethod
    async def _back(far: Any, number: int, writer: asyncio.StreamWriter) -> None:
        while data := await far.receive.remote(number):
            writer.write(data)
            await writer.drain()
