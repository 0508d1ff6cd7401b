"""The names in a client's certificate: its common name, and its DNS and URI alternative names. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

# gRPC's own names of these; the alternative names are there by kind as well as all together.
_GRPC = ("x509_common_name", "peer_dns", "peer_uri")
_KINDS = frozenset({"DNS", "URI"})


def of_grpc(auth_context: Mapping[str, Iterable[bytes]]) -> frozenset[str]:
    """As gRPC's `ServicerContext.auth_context()` tells them; none without a certificate."""
    found = (value for name in _GRPC for value in auth_context.get(name, ()))
    return frozenset(value.decode(errors="replace") for value in found)


def of_http(certificate: Mapping[str, Any] | None) -> frozenset[str]:
    """As `ssl.SSLObject.getpeercert()` tells them; none without a certificate."""
    if not certificate:
        return frozenset()
    subject = (pair for part in certificate.get("subject", ()) for pair in part)
    common = (value for name, value in subject if name == "commonName")
    others = (value for kind, value in certificate.get("subjectAltName", ()) if kind in _KINDS)
    return frozenset((*common, *others))
