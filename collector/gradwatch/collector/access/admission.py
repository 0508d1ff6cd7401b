"""From what a client shows to who it is. Pure."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gradwatch.collector.access.identity import ANYBODY, Identity

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_HELP = "give --token-file (GRADWATCH_TOKEN_FILE) with the token that the collector was given"
_MISSING = f"this collector wants a token, and none was shown: {_HELP}"
_BEARER_ONLY = "only questions are taken with Basic: send `Authorization: Bearer TOKEN`"
_WRONG = f"this collector wants another token than the one that was shown: {_HELP}"


@dataclass(frozen=True)
class Refused:
    """Nobody whom the collector knows.

    Attributes:
        why: for the client. It holds nothing of what was shown.
    """

    why: str


@dataclass(frozen=True)
class Known:
    """Those whom the collector knows.

    Attributes:
        by_digest: those who are known by a token, by its SHA-256.
        by_certificate: those who are known by a certificate, by the name in it.
        open: nobody has to show anything.
    """

    by_digest: Mapping[bytes, Identity] = field(default_factory=dict, repr=False)
    by_certificate: Mapping[str, Identity] = field(default_factory=dict)
    open: bool = False


def digest(token: str) -> bytes:
    """What is kept of a token.

    Plain SHA-256 does for 256 random bits: whoever has the digest would have to try them all, and no work
    factor adds to that. For a password, which people choose out of far fewer, it would not do.
    """
    return hashlib.sha256(token.encode()).digest()


def admit(
    authorization: str | None, certificate: Iterable[str], known: Known, *, basic: bool = False
) -> Identity | Refused:
    """Tell who a client is.

    A token says so; without one, the names in a certificate that TLS has verified. Where both name
    somebody, it must be the same one.

    Args:
        authorization: the header of that name: `Bearer TOKEN`, or `Basic` with the token as password.
        certificate: the names in the client's certificate.
        known: whom the collector knows.
        basic: whether `Basic` will do. A browser that has it once sends it with whatever another site makes
            it ask for, so it will not do for what changes anything.
    """
    if known.open:
        return ANYBODY
    certified = _by_certificate(certificate, known)
    if isinstance(certified, Refused):
        return certified
    if not authorization:
        return certified or Refused(_MISSING)
    holder = _by_token(authorization, known, basic=basic)
    if certified is not None and isinstance(holder, Identity) and holder.name is not None:
        return Refused(f"the token is of {holder} and the certificate of {certified}: show only one of them")
    return holder


def _by_certificate(names: Iterable[str], known: Known) -> Identity | Refused | None:
    found = {known.by_certificate[name] for name in names if name in known.by_certificate}
    if len(found) > 1:
        several = ", ".join(sorted(str(identity.name) for identity in found))
        return Refused(f"the certificate names several identities ({several}): it must name one")
    return next(iter(found), None)


def _by_token(authorization: str, known: Known, *, basic: bool) -> Identity | Refused:
    token = _token_of(authorization, basic=basic)
    if isinstance(token, Refused):
        return token
    # All are looked at, each in a time that tells nothing of it.
    shown, found = digest(token), None
    for kept, identity in known.by_digest.items():
        if hmac.compare_digest(kept, shown):
            found = identity
    return found or Refused(_WRONG)


def _token_of(authorization: str, *, basic: bool) -> str | Refused:
    scheme, _, shown = authorization.partition(" ")
    if scheme.lower() == "basic":
        if not basic:
            return Refused(_BEARER_ONLY)
        try:
            shown = base64.b64decode(shown, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return Refused(_WRONG)
    elif scheme.lower() != "bearer":
        return Refused(_MISSING)
    return shown.strip()
