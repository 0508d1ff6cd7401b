"""What is in force: certificates and identities, read again when their files change."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Generic, TypeVar

from gradwatch.collector.access.admission import admit
from gradwatch.collector.errors import AccessError

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Callable, Iterable, Sequence
    from pathlib import Path

    from gradwatch.collector.access.admission import Refused
    from gradwatch.collector.access.config import Access, Certificates
    from gradwatch.collector.access.identity import Identity

_T = TypeVar("_T")

_log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0


class Door:
    """Knows what to show, and who somebody is.

    Args:
        access: the files.

    Raises:
        AccessError: one of them is of no use.
    """

    def __init__(self, access: Access) -> None:
        files = () if access.identities is None else (access.identities,)
        self._certificates = _Kept("the certificates", access.certificate_files, access.certificates)
        self._known = _Kept("the identities", files, access.known)
        asked = access.client_ca is not None or access.http_client_ca is not None
        if self._known.value.by_certificate and not asked:
            _log.warning(
                "identities are known by certificates, and nobody is asked for one: "
                "give --tls-ca for agents, --http-tls-ca for those who read"
            )

    @property
    def certificates(self) -> Certificates | None:
        """What to show; None for no TLS."""
        return self._certificates.value

    @property
    def last_reload_successful(self) -> bool:
        """Whether every file is the one in force."""
        return self._certificates.loaded and self._known.loaded

    def admit(
        self, authorization: str | None, certificate: Iterable[str] = (), *, basic: bool = False
    ) -> Identity | Refused:
        """Tell who a client is; see `admission.admit`."""
        return admit(authorization, certificate, self._known.value, basic=basic)

    def tls(self) -> ssl.SSLContext | None:
        """For the HTTPS server: each handshake has the certificates that are in force then."""
        given = self.certificates
        if given is None:
            return None

        def choose(connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
            newest = self.certificates
            if newest is not None:
                connection.context = newest.http

        given.http.sni_callback = choose
        return given.http

    def refresh(self) -> None:
        """Look whether files have changed. Those that are of no use leave what was before in force."""
        self._certificates.refresh()
        self._known.refresh()

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Do so each second, within the block."""
        looking = asyncio.create_task(self._look())
        try:
            yield
        finally:
            looking.cancel()
            await asyncio.wait({looking})

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            self.refresh()


class _Kept(Generic[_T]):
    """A value that files give.

    Args:
        name: for the log.
        files: whose change is noticed.
        load: reads them; raises `AccessError`.
    """

    def __init__(self, name: str, files: Sequence[Path], load: Callable[[], _T]) -> None:
        self._name, self._files, self._load = name, files, load
        # Before they are read: a change in between is seen at the next look.
        self._stamps = [_stamp(file) for file in files]
        self.value = load()
        self.loaded = True

    def refresh(self) -> None:
        stamps = [_stamp(file) for file in self._files]
        if stamps == self._stamps:
            return
        self._stamps = stamps
        try:
            self.value = self._load()
        except (AccessError, OSError) as error:
            self.loaded = False
            _log.error("%s do not load, and those before stay in force: %s", self._name, error)
        else:
            self.loaded = True
            _log.info("%s have changed, and the new ones are in force", self._name)


def _stamp(file: Path) -> tuple[int, int, int] | None:
    """What tells one version of a file from another."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
