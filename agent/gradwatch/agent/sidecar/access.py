"""What a client of the collector shows and trusts, from files. Standard library only."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

# A line of the sidecar's log that holds one of these tells that waiting alone will not help.
REFUSED = "the collector refuses this sidecar"
NOT_VERIFIED = "TLS with the collector failed"

_SHORTEST_TOKEN = 16
_OTHERS = 0o077


class AccessError(Exception):
    """A certificate or token file is of no use; the message names it and says what to do."""


@dataclass(frozen=True)
class Credentials:
    """What the files say.

    Attributes:
        ca: PEM: the collector's certificate must be signed by one of these; None for no TLS.
        cert: PEM: what to show when the collector asks for a certificate.
        key: PEM: its private key.
        token: what to show always.
    """

    ca: bytes | None = None
    cert: bytes | None = None
    key: bytes | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Access:
    """Where the files are; None for none. They may be renewed: each read takes what is there."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    token_file: Path | None = None

    def read(self) -> Credentials:
        """Read and check all of them.

        Raises:
            AccessError: one is missing, cannot be read, or is of no use.
        """
        ca = None if self.ca is None else _read(self.ca, "--tls-ca")
        if ca is not None:
            try:
                ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=ca.decode("ascii"))
            except (ssl.SSLError, ValueError) as error:
                raise AccessError(f"--tls-ca: {self.ca} holds no certificate in PEM form") from error
        cert, key = self._pair()
        token = None if self.token_file is None else read_token(self.token_file)
        return Credentials(ca, cert, key, token)

    def _pair(self) -> tuple[bytes | None, bytes | None]:
        if self.cert is None and self.key is None:
            return None, None
        if self.cert is None or self.key is None:
            lacking = "--tls-cert" if self.cert is None else "--tls-key"
            raise AccessError(f"a certificate and its key go together: give {lacking} too")
        pair = _read(self.cert, "--tls-cert"), _read(self.key, "--tls-key")
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(
                self.cert, self.key, password=_no_passphrase
            )
        except ssl.SSLError as error:
            raise AccessError(
                f"--tls-cert {self.cert} with --tls-key {self.key}: {error.reason or error}; "
                "they must be a certificate and its own private key, both in PEM form"
            ) from error
        return pair


def read_token(path: Path) -> str:
    """The token that a file holds; blanks and newlines around it do not count.

    Raises:
        AccessError: there is none, or none that can be used.
    """
    token = _read(path, "--token-file").strip()
    usable = token.isascii() and all(33 <= byte <= 126 for byte in token)  # noqa: PLR2004 - printable, no blank
    if len(token) < _SHORTEST_TOKEN or not usable:
        raise AccessError(
            f"--token-file: {path} must hold one token of {_SHORTEST_TOKEN} printable ASCII characters or "
            "more without blanks, such as `openssl rand -hex 32` makes"
        )
    return token.decode("ascii")


def exposed_to_others(path: Path) -> bool:
    """Whether a file's mode lets others than its owner at it, or cannot be told."""
    try:
        return bool(path.stat().st_mode & _OTHERS)
    except OSError:
        return True


def _read(path: Path, flag: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise AccessError(f"{flag}: cannot read {path}: {error.strerror}") from error


def _no_passphrase() -> str:
    # Else OpenSSL would ask on a terminal that belongs to others.
    raise AccessError("--tls-key: the key is locked with a passphrase; give one without")
