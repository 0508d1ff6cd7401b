"""Where the reading commands read: a live collector, else the folder it left behind."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

from gradwatch.cli import access, paths
from gradwatch.cli.errors import UnavailableError, UsageError
from gradwatch.cli.launcher import collector_state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from pydantic import BaseModel

    from gradwatch.collector.reader import Reader

_TIMEOUT_SECONDS = 10.0
_MANY = 10_000

Document = dict[str, Any]


class Source(Protocol):
    """Answers with the documents of the JSON API; each call raises `UnavailableError` if it cannot."""

    def jobs(self) -> list[Document]:
        """All jobs, by name."""

    def job(self, job: str) -> Document:
        """One job."""

    def picture(self, job: str) -> Document:
        """A job as it is drawn."""

    def incidents(self, job: str | None) -> list[Document]:
        """Incidents, newest first; only of `job` unless that is None."""

    def incident(self, incident: str) -> Document:
        """One incident."""

    def events(self, job: str) -> list[Document]:
        """A job's records in order of arrival."""

    def audit(self, job: str) -> list[Document]:
        """A job's audit trail, oldest first."""


def asked(
    url: str | None,
    state_dir: Path | None,
    *,
    ca: Path | None,
    cert: Path | None,
    key: Path | None,
    token_file: Path | None,
) -> Source:
    """Where a reading command's options say to read.

    Raises:
        UnavailableError: as `open_source`.
        UsageError: as `open_source`; a file is of no use.
    """
    shown = access.of_reader(ca=ca, cert=cert, key=key, token_file=token_file)
    return open_source(url, paths.state_dir(state_dir), shown)


def open_source(url: str | None, state_dir: Path, shown: access.Shown) -> Source:
    """Find what can answer.

    Args:
        url: a collector's; None for that of `state_dir`.
        state_dir: where to look, for a collector or for what one has left.
        shown: what to show to a collector, and whom to trust.

    Raises:
        UnavailableError: the collector of `state_dir` is not ready yet.
        UsageError: `url` is no HTTP URL, or the token would be sent in the clear.
    """
    if url is not None:
        return Api(url, shown)
    if collector_state.is_held(state_dir):
        ready = collector_state.ready(state_dir)
        if ready is None:
            raise UnavailableError(
                f"the collector of {state_dir} is only just starting; try again in a second"
            )
        return Api(ready.http, shown)
    return Folder(state_dir)


class Api:
    """A live collector.

    Args:
        url: its HTTP address.
        shown: what to show to it, and whom to trust.

    Raises:
        UsageError: it is no HTTP URL, holds a password, or the token would be sent in the clear.
    """

    def __init__(self, url: str, shown: access.Shown) -> None:
        if "@" in url:
            # Not repeated: it holds what nobody should see.
            raise UsageError("--url: it must hold no user and no password; give --token-file")
        if not url.startswith(("http://", "https://")):
            raise UsageError(f"--url: {url!r} is not a URL, such as http://127.0.0.1:7701")
        access.check_url(url, shown)
        self._shown = shown
        self.url = url.rstrip("/")

    def jobs(self) -> list[Document]:
        """As `Source`."""
        return list(self._get("/api/v1/jobs"))

    def job(self, job: str) -> Document:
        """As `Source`."""
        return dict(self._get(f"/api/v1/jobs/{quote(job)}"))

    def picture(self, job: str) -> Document:
        """As `Source`."""
        return dict(self._get(f"/api/v1/jobs/{quote(job)}/picture"))

    def incidents(self, job: str | None) -> list[Document]:
        """As `Source`."""
        query = {"limit": str(_MANY)} if job is None else {"limit": str(_MANY), "job": job}
        return list(self._get("/api/v1/incidents", **query))

    def incident(self, incident: str) -> Document:
        """As `Source`."""
        return dict(self._get(f"/api/v1/incidents/{quote(incident, safe='')}"))

    def events(self, job: str) -> list[Document]:
        """As `Source`."""
        return self._all_rows(f"/api/v1/jobs/{quote(job)}/events")

    def audit(self, job: str) -> list[Document]:
        """As `Source`."""
        return self._all_rows(f"/api/v1/jobs/{quote(job)}/audit")

    def me(self) -> Document:
        """Who the collector takes us for: `identity`, `role` and `jobs`."""
        return dict(self._get("/api/v1/me"))

    def roll_back(self, job: str, operator: str) -> Document:
        """Ask for a rollback to the newest good checkpoint; the decision.

        Args:
            job: its name.
            operator: who asks, for the audit trail.
        """
        headers = {"X-Gradwatch-Operator": operator}
        path = f"/api/v1/jobs/{quote(job)}/rollback"
        return dict(self._ask("POST", path, headers=headers, json={"to": "last-good"}))

    def _all_rows(self, path: str) -> list[Document]:
        return _all_pages(lambda after: list(self._get(path, after=str(after), limit=str(_MANY))))

    def _get(self, path: str, **query: str) -> Any:
        return self._ask("GET", path, params=query)

    def _ask(self, method: str, path: str, **what: Any) -> Any:
        import httpx

        try:
            # A proxy of the environment is not meant for a collector on loopback.
            with httpx.Client(
                timeout=_TIMEOUT_SECONDS,
                trust_env=False,
                # Without a CA of our own, those that httpx brings along.
                verify=self._shown.tls or True,
                headers=self._headers(),
            ) as client:
                answer = client.request(method, self.url + path, **what)
            answer.raise_for_status()
            return answer.json()
        except httpx.HTTPStatusError as error:
            detail = _detail(error.response)
            known = {httpx.codes.NOT_FOUND, httpx.codes.CONFLICT}
            if detail is not None and error.response.status_code in known:
                raise UnavailableError(detail) from None
            reason = detail or error.response.reason_phrase
            raise UnavailableError(f"{self.url}{path}: {error.response.status_code} {reason}") from None
        except httpx.ConnectError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise UnavailableError(
                    f"{self.url} shows a certificate that cannot be trusted: {error}. Give --tls-ca with the "
                    "CA that signed it, and a --url with a host that it names"
                ) from None
            raise self._no_answer(error) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._no_answer(error) from None
        except ValueError:
            raise UnavailableError(f"{self.url}{path} is not JSON: is that a gradwatch collector?") from None

    def _no_answer(self, error: Exception) -> UnavailableError:
        return UnavailableError(
            f"no collector answers at {self.url}: {error}. Is it running? `gradwatch doctor` tells"
        )

    def _headers(self) -> dict[str, str]:
        token = self._shown.token
        return {} if token is None else {"Authorization": f"Bearer {token}"}


class Folder:
    """What a collector has left behind.

    Args:
        state_dir: its state folder.
    """

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir

    def jobs(self) -> list[Document]:
        """As `Source`."""
        with self._opened() as reader:
            return [job.model_dump(mode="json") for job in reader.jobs()]

    def job(self, job: str) -> Document:
        """As `Source`."""
        with self._opened() as reader:
            found = reader.job(job)
        if found is None:
            raise self._unknown(job)
        return found.model_dump(mode="json")

    def picture(self, job: str) -> Document:
        """As `Source`."""
        with self._opened() as reader:
            found = reader.picture(job)
        if found is None:
            raise self._unknown(job)
        return found.model_dump(mode="json")

    def incidents(self, job: str | None) -> list[Document]:
        """As `Source`."""
        with self._opened() as reader:
            return [incident.model_dump(mode="json") for incident in reader.incidents(job=job)]

    def incident(self, incident: str) -> Document:
        """As `Source`."""
        with self._opened() as reader:
            found = reader.incident(incident)
        if found is None:
            raise UnavailableError(
                f"no incident {incident!r} in {self._state_dir}; `gradwatch incidents` lists them"
            )
        return found.model_dump(mode="json")

    def events(self, job: str) -> list[Document]:
        """As `Source`."""
        with self._opened() as reader:
            return self._all_rows(reader, job, reader.events)

    def audit(self, job: str) -> list[Document]:
        """As `Source`."""
        with self._opened() as reader:
            return self._all_rows(reader, job, reader.audit)

    def _all_rows(self, reader: Reader, job: str, rows: Callable[..., Sequence[BaseModel]]) -> list[Document]:
        if reader.job(job) is None:
            raise self._unknown(job)
        return _all_pages(
            lambda after: [row.model_dump(mode="json") for row in rows(job, after=after, limit=_MANY)]
        )

    def _unknown(self, job: str) -> UnavailableError:
        return UnavailableError(f"no job {job!r} in {self._state_dir}; `gradwatch jobs` lists them")

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Reader]:
        from gradwatch.collector import errors, reader

        try:
            with reader.opened(self._state_dir) as opened:
                yield opened
        except errors.CollectorError as error:
            raise UnavailableError(str(error)) from None


def _all_pages(page: Callable[[int], list[Document]]) -> list[Document]:
    """Read on behind the last id until a page is not full."""
    rows: list[Document] = []
    while True:
        more = page(rows[-1]["id"] if rows else 0)
        rows += more
        if len(more) < _MANY:
            return rows


def _detail(answer: Any) -> str | None:
    try:
        detail = answer.json()["detail"]
    except (ValueError, KeyError, TypeError):
        return None
    return detail if isinstance(detail, str) else None
