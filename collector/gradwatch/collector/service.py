"""The gRPC side: one stream per sidecar, in come reports, out go acknowledgements and job statuses."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, TypeAlias

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import reflection  # type: ignore[import-untyped]

from gradwatch.collector.access.grpc_gate import GrpcGate, credentials
from gradwatch.collector.access.identity import why_no_reports
from gradwatch.collector.access.reports import why_not_theirs
from gradwatch.collector.errors import ForbiddenError, PortTakenError, StoreError
from gradwatch.collector.version import collector_version
from gradwatch.collector.wire import read_report, write_directive
from gradwatch.protos.v1 import gradwatch_pb2 as pb
from gradwatch.protos.v1 import gradwatch_pb2_grpc as rpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from gradwatch.collector.access.door import Door
    from gradwatch.collector.access.identity import Identity
    from gradwatch.collector.board import Board, Subscription
    from gradwatch.collector.engine import Engine

_log = logging.getLogger(__name__)

MAX_REPORT_BYTES = 32 << 20

_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_REPORT_BYTES),
    ("grpc.max_send_message_length", -1),
    # Two collectors must not share a port unawares.
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
    # A sidecar whose node vanished is noticed by this.
    ("grpc.keepalive_time_ms", 60_000),
)

_Context: TypeAlias = "grpc.aio.ServicerContext[pb.Report, pb.Directive]"


class Ingest(rpc.IngestServicer):
    """The schema's `Ingest`.

    Args:
        engine: takes the reports.
        board: gives the statuses.
        http_url: where people look.
        gate: tells who a stream is from.
        identity: which collector this is.
    """

    def __init__(self, engine: Engine, board: Board, http_url: str, gate: GrpcGate, identity: str) -> None:
        self._engine = engine
        self._board = board
        self._http_url = http_url
        self._gate = gate
        self._identity = identity

    async def Stream(  # type: ignore[override]  # noqa: N802
        self, request_iterator: AsyncIterator[pb.Report], context: _Context
    ) -> None:
        """Serve one sidecar until it leaves."""
        await self._agent(context)
        welcome = pb.Welcome(version=collector_version(), http_url=self._http_url)
        with self._board.subscribed() as subscription:
            outlet = _Outlet(context, subscription)
            await outlet.write(pb.Directive(welcome=welcome))
            pusher = asyncio.create_task(outlet.push())
            try:
                async for message in request_iterator:
                    await self._take(message, subscription, outlet, context)
            finally:
                pusher.cancel()
                await asyncio.wait({pusher})

    async def _take(
        self, message: pb.Report, subscription: Subscription, outlet: _Outlet, context: _Context
    ) -> None:
        # Asked each time: a stream lasts for days, and an identity may be taken back meanwhile.
        identity = await self._agent(context)
        if message.sidecar.collector not in {"", self._identity}:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION, "this is another collector than the one that was meant"
            )
        forbidden = why_not_theirs(identity, (*subscription.jobs, *message.sidecar.jobs))
        if forbidden is not None:
            await self._gate.forbid(context, forbidden)
        try:
            await self._engine.ingest(read_report(message), identity)
        except ForbiddenError as error:
            await self._gate.forbid(context, str(error))
        except StoreError as error:
            # Unacknowledged, the sidecar keeps it and sends it again.
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        if message.HasField("sidecar"):
            # Who greets again asks how its jobs are: it has the answer when it is acknowledged.
            self._board.want(subscription, message.sidecar.jobs, message.sidecar.launches)
            _log.info("sidecar %s on node %s is connected", message.sidecar.id, message.sidecar.node)
            await outlet.flush()
        await outlet.write(pb.Directive(acked=message.id))

    async def _agent(self, context: _Context) -> Identity:
        """Tell whose the stream is; ends it unless they may report."""
        identity = await self._gate.identity(context)
        forbidden = why_no_reports(identity)
        if forbidden is not None:
            await self._gate.forbid(context, forbidden)
        return identity


class _Outlet:
    """What goes out on one stream: a message at a time, whoever writes."""

    def __init__(self, context: _Context, subscription: Subscription) -> None:
        self._context = context
        self._subscription = subscription
        self._writing = asyncio.Lock()

    async def write(self, directive: pb.Directive) -> None:
        async with self._writing:
            await self._context.write(directive)

    async def flush(self) -> None:
        """Send the orders, tasks and statuses that wait."""
        async with self._writing:
            for what in self._subscription.take_orders():
                await self._context.write(write_directive(what))
            for job, status in self._subscription.take().items():
                await self._context.write(pb.Directive(status=pb.JobStatus(job=job, document=status)))

    async def push(self) -> None:
        """Send each status when it comes, while the stream stands."""
        try:
            while True:
                await self._subscription.event.wait()
                await self.flush()
        except (grpc.aio.UsageError, grpc.aio.InternalError, asyncio.InvalidStateError) as error:
            _log.debug("a sidecar has left: %s", error)


class GrpcServer:
    """The gRPC server: ingest, health, reflection.

    Args:
        engine: takes the reports.
        board: gives the statuses.
        door: tells who clients are, and what to show them.
        identity: which collector this is: reports that are meant for another are not taken.
    """

    def __init__(self, engine: Engine, board: Board, door: Door, identity: str) -> None:
        self._engine = engine
        self._board = board
        self._door = door
        self._gate = GrpcGate(door)
        self._identity = identity
        self._server = grpc.aio.server(options=_OPTIONS, interceptors=[self._gate])

    def bind(self, address: str, *, tls: bool) -> int:
        """Bind HOST:PORT; the port, which the system chooses for 0.

        Raises:
            PortTakenError: it cannot be bound.
        """
        try:
            secure = credentials(self._door) if tls else None
            if secure is not None:
                return self._server.add_secure_port(address, secure)
            return self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise PortTakenError(
                f"cannot listen for gRPC on {address}: the port is taken; free it or choose another"
            ) from error

    async def start(self, http_url: str) -> None:
        """Begin to serve."""
        ingests = Ingest(self._engine, self._board, http_url, self._gate, self._identity)
        rpc.add_IngestServicer_to_server(ingests, self._server)
        checks = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(checks, self._server)
        ingest = pb.DESCRIPTOR.services_by_name["Ingest"].full_name
        for service in ("", ingest):
            await checks.set(service, health_pb2.HealthCheckResponse.SERVING)
        names = (ingest, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        await self._server.start()

    async def stop(self) -> None:
        """Stop serving; a sidecar sends again what is not acknowledged by then."""
        await self._server.stop(grace=0.5)
