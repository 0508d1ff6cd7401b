"""What a webhook is told, and how it is signed. Pure.

The signature is that of Standard Webhooks (https://www.standardwebhooks.com, version 1): HMAC-SHA256 of
`ID.TIMESTAMP.BODY` under the secret, in base64; libraries for many languages verify it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradwatch.collector.schema import IncidentDocument

EVENT = "incident.confirmed"
_PREFIX = "whsec_"
# As the specification asks for.
_SECRET_BYTES = range(24, 65)


def body(incident: IncidentDocument) -> bytes:
    """The JSON that is sent: the incident as the API gives it, but for how it came to it, which is long."""
    told = incident.model_dump(mode="json", exclude={"flight"})
    at = told["confirmed_at"] or told["opened_at"]
    return json.dumps({"type": EVENT, "timestamp": at, "data": told}, separators=(",", ":")).encode()


def headers(incident: str, secret: bytes, now: float, content: bytes) -> dict[str, str]:
    """The headers that go with it.

    Args:
        incident: its id. A message that is sent again has it too: whoever has seen it drops it.
        secret: both sides know it.
        now: seconds since the epoch; a receiver refuses what is old.
        content: the body.
    """
    at = str(int(now))
    signed = hmac.digest(secret, f"{incident}.{at}.".encode() + content, hashlib.sha256)
    return {
        "content-type": "application/json",
        "webhook-id": incident,
        "webhook-timestamp": at,
        "webhook-signature": f"v1,{base64.b64encode(signed).decode()}",
    }


def read_secret(text: str) -> bytes:
    """A secret as it is handed out: base64 of 24 to 64 bytes, `whsec_` before it or not.

    Raises:
        ValueError: it is no such text; says why, and nothing of the text.
    """
    try:
        secret = base64.b64decode(text.strip().removeprefix(_PREFIX), validate=True)
    except binascii.Error:
        raise ValueError("it is not base64: make one with `openssl rand -base64 32`") from None
    if len(secret) not in _SECRET_BYTES:
        raise ValueError(f"it has {len(secret)} bytes, and must have 24 to 64: `openssl rand -base64 32`")
    return secret
