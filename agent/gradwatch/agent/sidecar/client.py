"""The one stream to the collector: a report at a time, each until it is acknowledged."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import grpc
import tenacity

from gradwatch.agent.sidecar.access import NOT_VERIFIED, REFUSED, Credentials
from gradwatch.protos.v1 import gradwatch_pb2 as pb
from gradwatch.protos.v1 import gradwatch_pb2_grpc as rpc

if TYPE_CHECKING:
    from collections.abc import Callable

_log = logging.getLogger(__name__)

# A collector that is alive acknowledges within a transaction's time. Instead of HTTP/2
# keepalive, which servers answer with GOAWAY when it is more frequent than they like.
ACK_SECONDS = 30.0
_FIRST_WAIT_SECONDS = 0.1
_LONGEST_WAIT_SECONDS = 2.0
# Closed at once so often in a row, it is no collector that is just ending.
_NO_ACCIDENT = 5
_CLOSED = "Socket closed"
_OPTIONS = (
    # Reconnecting is ours to time; a shared subchannel would add its own backoff.
    ("grpc.use_local_subchannel_pool", 1),
    # A proxy of the environment is not meant for a collector, least of all on loopback.
    ("grpc.enable_http_proxy", 0),
)


class CollectorUnavailableError(Exception):
    """The collector cannot be reached, or the stream to it broke."""


class ForbiddenError(CollectorUnavailableError):
    """The collector knows us, and does not take this from us."""


class Client:
    """A stream that mends itself.

    Args:
        address: gives HOST:PORT, asked at every connect since a collector may have moved.
            May raise `CollectorUnavailableError`.
        hello: gives who we are; goes with each stream's first report.
        on_directive: called with everything the collector pushes. Must not raise.
        credentials: gives what to show and whom to trust, asked at every connect since files are renewed.
            May raise `CollectorUnavailableError`.
    """

    def __init__(
        self,
        address: Callable[[], str],
        hello: Callable[[], pb.Sidecar],
        on_directive: Callable[[pb.Directive], None],
        credentials: Callable[[], Credentials] = Credentials,
    ) -> None:
        self._address = address
        self._hello = hello
        self._on_directive = on_directive
        self._credentials = credentials
        self._channel: grpc.aio.Channel | None = None
        self._call: grpc.aio.StreamStreamCall[pb.Report, pb.Directive] | None = None
        self._reader: asyncio.Task[None] | None = None
        self._acks: dict[int, asyncio.Future[None]] = {}
        self._last_id = 0
        self._said = ""
        self._greeted: pb.Sidecar | None = None

    @property
    def connected(self) -> bool:
        """Whether the stream is up, as far as we know."""
        return self._reader is not None and not self._reader.done()

    async def connect(self) -> None:
        """Open the stream; tries until it is open."""
        await self._persist(None)

    async def deliver(self, report: pb.Report, *, unless_forbidden: bool = False) -> None:
        """Send a report until the collector has acknowledged it; never gives up.

        Args:
            report: its `id` and `sidecar` are set here.
            unless_forbidden: do give up when the collector does not take it from us.

        Raises:
            ForbiddenError: then only.
        """
        await self._persist(report, unless_forbidden=unless_forbidden)

    async def ask(self) -> None:
        """Have the collector push how our jobs are now; when this returns, that has arrived."""
        await self._persist(self._greeting())

    async def close(self) -> None:
        """Drop the stream."""
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.wait({self._reader})
        if self._call is not None:
            self._call.cancel()
        if self._channel is not None:
            await self._channel.close()
        self._reader = self._call = self._channel = None
        self._fail_acks(CollectorUnavailableError("closed"))

    async def _persist(self, report: pb.Report | None, *, unless_forbidden: bool = False) -> None:
        async for attempt in tenacity.AsyncRetrying(
            wait=tenacity.wait_random_exponential(multiplier=_FIRST_WAIT_SECONDS, max=_LONGEST_WAIT_SECONDS),
            retry=tenacity.retry_if_exception_type(CollectorUnavailableError),
            before_sleep=self._say,
        ):
            forbidden: ForbiddenError | None = None
            with attempt:
                if not self.connected:
                    await self._open()
                if report is not None:
                    try:
                        await self._exchange(self._greeted_anew(report))
                    except ForbiddenError as error:
                        if not unless_forbidden:
                            raise
                        forbidden = error
            if forbidden is not None:
                raise forbidden
        if self._said:
            _log.info("the collector answers again")
            self._said = ""

    async def _open(self) -> None:
        await self.close()
        address = self._address()
        credentials = self._credentials()
        self._channel = _channel(address, credentials)
        self._call = rpc.IngestStub(self._channel).Stream(metadata=_metadata(credentials))
        self._reader = asyncio.create_task(self._read(self._call))
        self._last_id = 0
        greeting = self._greeting()
        await self._exchange(greeting)
        self._greeted = greeting.sidecar
        _log.info("connected to the collector at %s", address)

    def _greeting(self) -> pb.Report:
        return pb.Report(sidecar=self._hello())

    def _greeted_anew(self, report: pb.Report) -> pb.Report:
        """The report; with it who we are, if that has changed: a launch may have begun since."""
        hello = self._hello()
        if hello != self._greeted:
            report.sidecar.CopyFrom(hello)
            self._greeted = hello
        return report

    async def _exchange(self, report: pb.Report) -> None:
        if self._call is None:
            raise CollectorUnavailableError("not connected")
        self._last_id += 1
        report.id = self._last_id
        try:
            await asyncio.wait_for(self._write(self._call, report), ACK_SECONDS)
        except asyncio.TimeoutError:
            await self.close()
            raise CollectorUnavailableError(f"no acknowledgement within {ACK_SECONDS:.0f} s") from None
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            await self.close()
            raise _translated(error) from error

    async def _write(
        self, call: grpc.aio.StreamStreamCall[pb.Report, pb.Directive], report: pb.Report
    ) -> None:
        acked: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # Retrieved here, or asyncio complains when the write fails before anyone awaits it.
        acked.add_done_callback(lambda future: future.cancelled() or future.exception())
        self._acks[report.id] = acked
        try:
            await call.write(report)
            await acked
        finally:
            del self._acks[report.id]

    async def _read(self, call: grpc.aio.StreamStreamCall[pb.Report, pb.Directive]) -> None:
        reason = CollectorUnavailableError("the collector ended the stream")
        try:
            while isinstance(directive := await call.read(), pb.Directive):
                if directive.HasField("acked"):
                    self._resolve(directive.acked)
                self._on_directive(directive)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            reason = _translated(error)
        finally:
            self._fail_acks(reason)

    def _resolve(self, report_id: int) -> None:
        acked = self._acks.get(report_id)
        if acked is not None and not acked.done():
            acked.set_result(None)

    def _fail_acks(self, reason: CollectorUnavailableError) -> None:
        for acked in self._acks.values():
            if not acked.done():
                acked.set_exception(reason)

    def _say(self, state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome is not None else None
        said = str(error)
        if _CLOSED in said and state.attempt_number >= _NO_ACCIDENT:
            said = (
                f"{NOT_VERIFIED}: the connection is closed at once; it may want TLS (--tls-ca), "
                "or a certificate of this side (--tls-cert, --tls-key)"
            )
        if said != self._said:
            self._said = said
            _log.warning("%s; trying again until it answers", said)


def _channel(address: str, credentials: Credentials) -> grpc.aio.Channel:
    if credentials.ca is None:
        return grpc.aio.insecure_channel(address, options=_OPTIONS)
    tls = grpc.ssl_channel_credentials(credentials.ca, credentials.key, credentials.cert)
    return grpc.aio.secure_channel(address, tls, options=_OPTIONS)


def _metadata(credentials: Credentials) -> tuple[tuple[str, str], ...]:
    return () if credentials.token is None else (("authorization", f"Bearer {credentials.token}"),)


def _translated(error: Exception) -> CollectorUnavailableError:
    if isinstance(error, grpc.aio.AioRpcError) and error.code() is grpc.StatusCode.PERMISSION_DENIED:
        return ForbiddenError(_describe(error))
    return CollectorUnavailableError(_describe(error))


def _describe(error: Exception) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        if error.code() in {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED}:
            return f"{REFUSED}: {error.details()}"
        if error.code() is grpc.StatusCode.UNAVAILABLE and "andshake" in str(error.details()):
            return f"{NOT_VERIFIED}: {error.details()}"
        return f"{error.code().name.lower()}: {error.details()}"
    return str(error) or type(error).__name__
