"""What the collector is given to show, and what it wants to be shown: from files to values."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gradwatch.collector.access.admission import Known, digest
from gradwatch.collector.access.identities_file import read_identities
from gradwatch.collector.access.identity import ANYBODY
from gradwatch.collector.errors import AccessError

if TYPE_CHECKING:
    from pathlib import Path

    from gradwatch.collector.access.identity import Identity

_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Access:
    """What the servers show, and what they want to be shown.

    Attributes:
        cert: PEM file: the servers' certificate, then those between it and its CA; None for no TLS.
        key: PEM file with its private key, without a passphrase.
        client_ca: PEM file: over gRPC, clients must show a certificate that one of these CAs has signed.
        token: whoever shows it may do everything; None for no such token.
        identities: file with those who may do some things.
        http_client_ca: as `client_ca`, over HTTPS.
    """

    cert: Path | None = None
    key: Path | None = None
    client_ca: Path | None = None
    token: str | None = field(default=None, repr=False)
    identities: Path | None = None
    http_client_ca: Path | None = None

    @property
    def missing(self) -> list[str]:
        """The flags without which nothing but loopback may be listened on."""
        flags = {"--tls-cert": self.cert, "--tls-key": self.key}
        lacking = [flag for flag, value in flags.items() if value is None]
        return lacking if self.token or self.identities else [*lacking, "--token-file or --identities"]

    @property
    def certificate_files(self) -> tuple[Path, ...]:
        """The files that `certificates` reads."""
        files = (self.cert, self.key, self.client_ca, self.http_client_ca)
        return tuple(path for path in files if path is not None)

    def certificates(self) -> Certificates | None:
        """Read the certificates.

        Returns:
            None for no TLS.

        Raises:
            AccessError: a file is missing, cannot be read, or is of no use.
        """
        if self.cert is None and self.key is None:
            for flag, given in (("--tls-ca", self.client_ca), ("--http-tls-ca", self.http_client_ca)):
                if given is not None:
                    raise AccessError(
                        f"{flag} wants certificates of clients: give --tls-cert and --tls-key too"
                    )
            return None
        if self.cert is None or self.key is None:
            raise AccessError(f"TLS needs certificate and key: give {self.missing[0]} too")
        cert, key = _read(self.cert, "--tls-cert"), _read(self.key, "--tls-key")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.cert, self.key, password=_no_passphrase)
        except ssl.SSLError as error:
            raise AccessError(
                f"--tls-cert {self.cert} with --tls-key {self.key}: {error.reason or error}; "
                "they must be a certificate and its own private key, both in PEM form"
            ) from error
        client_ca = None if self.client_ca is None else _read_ca(self.client_ca, "--tls-ca")
        if self.http_client_ca is not None:
            http_ca = _read_ca(self.http_client_ca, "--http-tls-ca")
            context.load_verify_locations(cadata=http_ca.decode("ascii"))
            context.verify_mode = ssl.CERT_REQUIRED
            # Who resumes a session is not asked for a certificate again, and the one it showed may have
            # expired. Of TLS 1.2 OpenSSL keeps sessions, and Python cannot forbid it.
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.num_tickets = 0
        return Certificates(cert, key, client_ca, context)

    def known(self) -> Known:
        """Read whom to let in.

        Raises:
            AccessError: the identities file cannot be read, or is of no use.
        """
        if self.identities is None and self.token is None:
            return Known(open=True)
        by_digest: dict[bytes, Identity] = {}
        by_certificate: dict[str, Identity] = {}
        if self.identities is not None:
            source = _read(self.identities, "--identities")
            by_digest, by_certificate = read_identities(source, str(self.identities))
        if self.token is not None:
            # An identity that has the same token is the narrower of the two.
            by_digest = {digest(self.token): ANYBODY} | by_digest
        return Known(by_digest, by_certificate)


@dataclass(frozen=True)
class Certificates:
    """Certificates that have been looked at.

    Attributes:
        cert: PEM.
        key: PEM.
        client_ca: PEM, of the CAs that sign the certificates of gRPC's clients; None to ask for none.
        http: for one HTTPS connection.
    """

    cert: bytes
    key: bytes = field(repr=False)
    client_ca: bytes | None
    http: ssl.SSLContext


def _read_ca(path: Path, flag: str) -> bytes:
    found = _read(path, flag)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=found.decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        raise AccessError(f"{flag} {path} is no certificate in PEM form") from error
    return found


def _read(path: Path, flag: str) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_BYTES)
    except OSError as error:
        raise AccessError(f"{flag}: cannot read {path}: {error.strerror}") from error


def _no_passphrase() -> str:
    # Else OpenSSL would ask on a terminal that belongs to others.
    raise AccessError("--tls-key: the key is locked with a passphrase; give one without")
