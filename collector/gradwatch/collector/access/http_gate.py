"""Before the HTTP application: lets only those in who may ask what they ask."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException
from uvicorn.protocols.http.h11_impl import H11Protocol

from gradwatch.collector.access.admission import Refused
from gradwatch.collector.access.identity import why_no_answer
from gradwatch.collector.access.names import of_http

if TYPE_CHECKING:
    import asyncio

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from gradwatch.collector.access.door import Door

# What a supervisor asks, which has no token to show.
OPEN_PATHS = frozenset({"/-/healthy", "/-/ready"})
# Where the application finds who asks.
IDENTITY = "gradwatch.identity"
# What may be ordered is said in a few words.
MAX_BODY_BYTES = 64 << 10
MAX_HEADER_BYTES = 64 << 10
_NAMES = "gradwatch.certificate"
_TOO_LARGE = f"the body of a request may have {MAX_BODY_BYTES} bytes"
_CHALLENGES = [
    # A browser asks its user for the token: any name, the token as password.
    (b"www-authenticate", b'Basic realm="gradwatch: the token is the password", charset="UTF-8"'),
    (b"www-authenticate", b'Bearer realm="gradwatch"'),
]


class HttpProtocol(H11Protocol):
    """uvicorn's, which leaves the names in the client's certificate where `HttpGate` finds them."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Remember who has connected: uvicorn copies this state into the scope of each request."""
        super().connection_made(transport)
        connection = transport.get_extra_info("ssl_object")
        if connection is not None:
            self.app_state = {**self.app_state, _NAMES: of_http(connection.getpeercert())}


class HttpGate:
    """ASGI: lets only those in who show who they are, to what they may ask.

    Args:
        app: what lies behind; it finds the `Identity` in the scope.
        door: tells who somebody is.
    """

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self._app = app
        self._door = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 401, 403 or 413."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        shown = next((value for name, value in scope["headers"] if name == b"authorization"), None)
        identity = self._door.admit(
            None if shown is None else shown.decode("latin-1"),
            scope.get("state", {}).get(_NAMES, ()),
            basic=scope["method"] in {"GET", "HEAD"},
        )
        if isinstance(identity, Refused):
            await _answer(401, identity.why, send, _CHALLENGES)
            return
        refused = why_no_answer(identity, scope["method"], scope["path"])
        if refused is not None:
            await _answer(403, refused, send)
            return
        if _declared(scope) > MAX_BODY_BYTES:
            await _answer(413, _TOO_LARGE, send)
            return
        await self._app({**scope, IDENTITY: identity}, _limited(receive), send)


def _declared(scope: Scope) -> int:
    length = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
    # Of more digits than any body has, the first ones say enough.
    return int(length[:12]) if length.isdigit() else 0


def _limited(receive: Receive) -> Receive:
    """Of a body whose length was not declared, so much and no more."""
    taken = 0

    async def limited() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > MAX_BODY_BYTES:
            raise HTTPException(413, _TOO_LARGE)
        return message

    return limited


async def _answer(
    status: int, detail: str, send: Send, more: list[tuple[bytes, bytes]] | None = None
) -> None:
    body = json.dumps({"detail": detail}).encode()
    headers: list[Any] = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *(more or []),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
