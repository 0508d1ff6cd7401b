"""Before the gRPC services: lets only those in whom the collector knows."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
import grpc.aio

from gradwatch.collector.access.admission import Refused
from gradwatch.collector.access.names import of_grpc

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from gradwatch.collector.access.config import Certificates
    from gradwatch.collector.access.door import Door
    from gradwatch.collector.access.identity import Identity

_OPEN_METHODS = "/grpc.health.v1.Health/"
# gRPC's own names of what it tells of a connection.
_CERTIFICATE, _REUSED = "x509_pem_cert", "ssl_session_reused"
# Whoever resumes a session is not asked for a certificate again, and the one it showed may have expired.
_RESUMED = "TLS sessions are not resumed here, as the certificate is not looked at then: connect anew"


class GrpcGate(grpc.aio.ServerInterceptor):
    """gRPC: lets only those in who show who they are; whoever asks for health need not.

    Args:
        door: tells who somebody is.
    """

    def __init__(self, door: Door) -> None:
        self._door = door

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Give the method's handler, behind a question who asks."""
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(_OPEN_METHODS):
            return handler
        behind = handler.stream_stream
        if behind is None:
            raise NotImplementedError("a method that is no stream both ways has no gate yet")

        async def ask_first(requests: object, context: Any) -> None:
            await self.identity(context)
            if not inspect.isasyncgenfunction(behind):
                await behind(requests, context)
                return
            async for answer in behind(requests, context):
                await context.write(answer)

        return grpc.stream_stream_rpc_method_handler(
            ask_first, handler.request_deserializer, handler.response_serializer
        )

    async def identity(self, context: Any) -> Identity:
        """Tell who a call is from; ends the call if it is from nobody."""
        shown = dict(context.invocation_metadata() or ()).get("authorization")
        connection = context.auth_context()
        found = self._door.admit(shown if isinstance(shown, str) else None, of_grpc(connection))
        if _CERTIFICATE in connection and next(iter(connection.get(_REUSED, ())), b"") == b"true":
            found = Refused(_RESUMED)
        if isinstance(found, Refused):
            await _end(context, grpc.StatusCode.UNAUTHENTICATED, found.why)
        return found

    @staticmethod
    async def forbid(context: Any, why: str) -> NoReturn:
        """End a call that asks for what is not allowed to whoever asks."""
        await _end(context, grpc.StatusCode.PERMISSION_DENIED, why)


def credentials(door: Door) -> grpc.ServerCredentials | None:
    """For the server: each handshake has the certificates that are in force then. None for no TLS.

    The library speaks nothing older than TLS 1.2. Whether clients are asked for certificates stays as it is.
    """
    shown = door.certificates
    if shown is None:
        return None

    def newest() -> Any:
        nonlocal shown
        if door.certificates is shown or door.certificates is None:
            return None
        shown = door.certificates
        return _configuration(shown)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(shown), newest, require_client_authentication=shown.client_ca is not None
    )


async def _end(context: Any, code: grpc.StatusCode, why: str) -> NoReturn:
    await context.abort(code, why)
    raise AssertionError("a call that is aborted goes no further")


def _configuration(shown: Certificates) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(shown.key, shown.cert)], shown.client_ca)
