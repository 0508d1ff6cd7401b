"""Certificates and token as a command is given them: looked at before anything starts."""

from __future__ import annotations

import ipaddress
import ssl
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from gradwatch.agent.sidecar.access import Access, AccessError, exposed_to_others, read_token
from gradwatch.cli.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Shown:
    """What a command that asks over HTTP shows and trusts.

    Attributes:
        token: None for none.
        tls: whom to trust, and the certificate to show; None to trust the usual CAs and show none.
    """

    token: str | None = field(default=None, repr=False)
    tls: ssl.SSLContext | None = None


def of_client(
    *,
    ca: Path | None = None,
    cert: Path | None = None,
    key: Path | None = None,
    token_file: Path | None = None,
) -> Access:
    """What a client of the collector shows and trusts.

    Raises:
        UsageError: a file is of no use.
    """
    paths = [None if path is None else path.absolute() for path in (ca, cert, key, token_file)]
    access = Access(*paths)
    try:
        access.read()
    except AccessError as error:
        raise UsageError(str(error)) from None
    _warn_if_exposed(token_file)
    return access


def of_reader(*, ca: Path | None, cert: Path | None, key: Path | None, token_file: Path | None) -> Shown:
    """The same for a command that asks once.

    Raises:
        UsageError: a file is of no use.
    """
    read = of_client(ca=ca, cert=cert, key=key, token_file=token_file).read()
    if read.ca is None and cert is None:
        return Shown(read.token)
    context = ssl.create_default_context(cadata=None if read.ca is None else read.ca.decode("ascii"))
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if cert is not None and key is not None:
        context.load_cert_chain(cert, key)
    return Shown(read.token, context)


def token(token_file: Path | None) -> str | None:
    """The token in a file; None for no file.

    Raises:
        UsageError: the file is of no use.
    """
    if token_file is None:
        return None
    try:
        found = read_token(token_file)
    except AccessError as error:
        raise UsageError(str(error)) from None
    _warn_if_exposed(token_file)
    return found


def check_collector(address: str, access: Access) -> None:
    """Refuse what cannot be meant for a collector at HOST:PORT.

    Raises:
        UsageError: a certificate would be shown, or the token sent, without TLS.
    """
    if access.ca is not None:
        return
    if access.cert is not None:
        raise UsageError("--tls-cert and --tls-key are shown by TLS, which wants --tls-ca too")
    if access.token_file is not None:
        host = address.rpartition(":")[0].removeprefix("[").removesuffix("]")
        _keep_private(host, "give --tls-ca, the CA that signed the collector's certificate")


def check_url(url: str, shown: Shown) -> None:
    """Refuse to send a token to another machine by http.

    Raises:
        UsageError: it would be.
    """
    parts = urlsplit(url)
    if parts.scheme == "http" and shown.token is not None:
        _keep_private(parts.hostname or "", "give an https:// URL")


def is_loopback(host: str) -> bool:
    """Whether only this machine is reached there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _keep_private(host: str, instead: str) -> None:
    if not is_loopback(host):
        raise UsageError(f"the token would cross the network to {host} in the clear: {instead}")


def _warn_if_exposed(token_file: Path | None) -> None:
    # A warning only: Kubernetes mounts its secrets like that.
    if token_file is not None and exposed_to_others(token_file):
        sys.stderr.write(
            f"gradwatch: WARNING: others can read the token in {token_file}; "
            "`chmod 600` it, if it is yours alone\n"
        )
