"""Who is let in: TLS on both servers, and one shared token."""

from __future__ import annotations

import base64
import binascii
import hmac
import json
import ssl
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from gradwatch.collector.errors import AccessError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, MutableMapping
    from pathlib import Path

    from starlette.types import ASGIApp, Receive, Scope, Send

# What a supervisor asks, which has no token to show.
OPEN_PATHS = frozenset({"/-/healthy", "/-/ready"})
_OPEN_METHODS = "/grpc.health.v1.Health/"
_HELP = "give --token-file (GRADWATCH_TOKEN_FILE) with the token that the collector was given"
_MISSING = f"this collector wants a token, and none was shown: {_HELP}"
_BEARER_ONLY = "only questions are taken with Basic: send `Authorization: Bearer TOKEN`"
_WRONG = f"this collector wants another token than the one that was shown: {_HELP}"


@dataclass(frozen=True)
class Access:
    """What the servers show, and what they want to be shown.

    Attributes:
        cert: PEM file: the servers' certificate, then those between it and its CA; None for no TLS.
        key: PEM file with its private key, without a passphrase.
        client_ca: PEM file: a sidecar must show a certificate that one of these CAs has signed.
        token: every client must show it; None for no token.
    """

    cert: Path | None = None
    key: Path | None = None
    client_ca: Path | None = None
    token: str | None = field(default=None, repr=False)

    @property
    def missing(self) -> list[str]:
        """The flags without which nothing but loopback may be listened on."""
        flags = {"--tls-cert": self.cert, "--tls-key": self.key, "--token-file": self.token}
        return [flag for flag, value in flags.items() if value is None]

    def load(self) -> Certificates | None:
        """Read the certificates.

        Returns:
            None for no TLS.

        Raises:
            AccessError: a file is missing, cannot be read, or is of no use.
        """
        if self.cert is None and self.key is None:
            if self.client_ca is not None:
                raise AccessError(
                    "--tls-ca wants certificates of sidecars: give --tls-cert and --tls-key too"
                )
            return None
        if self.cert is None or self.key is None:
            raise AccessError(f"TLS needs certificate and key: give {self.missing[0]} too")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        cert, key = _read(self.cert, "--tls-cert"), _read(self.key, "--tls-key")
        try:
            context.load_cert_chain(self.cert, self.key, password=_no_passphrase)
        except ssl.SSLError as error:
            raise AccessError(
                f"--tls-cert {self.cert} with --tls-key {self.key}: {error.reason or error}; "
                "they must be a certificate and its own private key, both in PEM form"
            ) from error
        client_ca = None
        if self.client_ca is not None:
            client_ca = _read(self.client_ca, "--tls-ca")
            try:
                ssl.create_default_context(cadata=client_ca.decode("ascii"))
            except (ssl.SSLError, UnicodeDecodeError) as error:
                raise AccessError(f"--tls-ca {self.client_ca} is no certificate in PEM form") from error
        return Certificates(cert, key, client_ca, context)


@dataclass(frozen=True)
class Certificates:
    """Certificates that have been looked at.

    Attributes:
        http: for the HTTP server. Clients are not asked for certificates there: browsers, Prometheus and
            a supervisor's probes rarely have one.
    """

    cert: bytes
    key: bytes = field(repr=False)
    client_ca: bytes | None
    http: ssl.SSLContext

    def grpc(self) -> grpc.ServerCredentials:
        """For the gRPC server; its library speaks nothing older than TLS 1.2."""
        return grpc.ssl_server_credentials(
            [(self.key, self.cert)], self.client_ca, require_client_auth=self.client_ca is not None
        )


def why_refused(authorization: str | None, token: str, *, basic: bool = False) -> str | None:
    """Judge what a client shows, in a time that tells nothing of the token.

    Args:
        authorization: the header of that name: `Bearer TOKEN`, or `Basic` with the token as password.
        token: the one that is wanted.
        basic: whether `Basic` will do. A browser that has it once sends it with whatever another site makes
            it ask for, so it will not do for what changes anything.

    Returns:
        What to tell the client; None when it is let in.
    """
    if not authorization:
        return _MISSING
    scheme, _, shown = authorization.partition(" ")
    if scheme.lower() == "basic":
        if not basic:
            return _BEARER_ONLY
        try:
            shown = base64.b64decode(shown, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return _WRONG
    elif scheme.lower() != "bearer":
        return _MISSING
    return None if hmac.compare_digest(shown.strip().encode(), token.encode()) else _WRONG


class TokenGate:
    """ASGI: lets only those in who show the token.

    Args:
        app: what lies behind.
        token: the token.
    """

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 401."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            shown = next((value for name, value in scope["headers"] if name == b"authorization"), None)
            refused = why_refused(
                None if shown is None else shown.decode("latin-1"),
                self._token,
                basic=scope["method"] in {"GET", "HEAD"},
            )
            if refused is not None:
                await _answer_401(refused, send)
                return
        await self._app(scope, receive, send)


async def _answer_401(detail: str, send: Callable[[MutableMapping[str, Any]], Awaitable[None]]) -> None:
    body = json.dumps({"detail": detail}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        # A browser asks its user for the token: any name, the token as password.
        (b"www-authenticate", b'Basic realm="gradwatch: the token is the password", charset="UTF-8"'),
        (b"www-authenticate", b'Bearer realm="gradwatch"'),
    ]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """gRPC: lets only those in who show the token; whoever asks for health needs none.

    Args:
        token: the token.
    """

    def __init__(self, token: str) -> None:
        self._token = token

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Give the method's handler, or one that refuses."""
        if handler_call_details.method.startswith(_OPEN_METHODS):
            return await continuation(handler_call_details)
        shown = dict(handler_call_details.invocation_metadata).get("authorization")
        refused = why_refused(shown if isinstance(shown, str) else None, self._token)
        if refused is None:
            return await continuation(handler_call_details)
        detail = refused

        async def refuse(_requests: object, context: Any) -> None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, detail)

        return grpc.stream_stream_rpc_method_handler(refuse)


def _read(path: Path, flag: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise AccessError(f"{flag}: cannot read {path}: {error.strerror}") from error


def _no_passphrase() -> str:
    # Else OpenSSL would ask on a terminal that belongs to others.
    raise AccessError("--tls-key: the key is locked with a passphrase; give one without")
