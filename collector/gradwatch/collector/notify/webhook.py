"""Tells a webhook of each confirmed incident, until it has been told."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx
import tenacity

from gradwatch.collector import document
from gradwatch.collector.errors import StoreError
from gradwatch.collector.notify import message, outbox
from gradwatch.collector.notify.outbox import Outcome

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from gradwatch.collector.engine import Engine
    from gradwatch.collector.model import Incident

_log = logging.getLogger(__name__)

_TIMEOUT_SECONDS = 10.0
_MAX_WAIT_SECONDS = 60.0


@dataclass(frozen=True)
class Webhook:
    """Whom to tell.

    Attributes:
        url: HTTP or HTTPS. It may hold a secret of the receiver's, so only its host is ever logged.
        secret: signs what is sent.
    """

    url: str = field(repr=False)
    secret: bytes = field(repr=False)

    @property
    def host(self) -> str:
        """What may be said of the URL."""
        return urlsplit(self.url).hostname or "?"


class Notifier:
    """Tells of incidents in the order in which they were confirmed, each until it is told or no longer news.

    Args:
        engine: whose incidents.
        webhook: whom to tell.
    """

    def __init__(self, engine: Engine, webhook: Webhook) -> None:
        self._engine = engine
        self._webhook = webhook
        self._told: set[str] = set()
        self._counts: Counter[Outcome] = Counter()
        self._news = asyncio.Event()
        engine.listeners.append(lambda _jobs: self._news.set())

    @property
    def counts(self) -> Mapping[Outcome, int]:
        """How many notifications came to which end, since the collector began."""
        return {outcome: self._counts[outcome] for outcome in Outcome}

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Tell, until the block ends."""
        self._told = await self._engine.told_of()
        self._news.set()
        telling = asyncio.create_task(self._tell_all())
        try:
            yield
        finally:
            telling.cancel()
            await asyncio.wait({telling})

    async def _tell_all(self) -> None:
        async with httpx.AsyncClient(timeout=_TIMEOUT_SECONDS) as client:
            while True:
                await self._news.wait()
                self._news.clear()
                for incident in outbox.due(self._engine.state, self._told, self._engine.clock()):
                    await self._tell(client, incident)

    async def _tell(self, client: httpx.AsyncClient, incident: Incident) -> None:
        try:
            outcome, why = await self._deliver(client, incident)
        except Exception:
            _log.exception("a bug: the webhook cannot be told of incident %s", incident.id)
            outcome, why = Outcome.REFUSED, "a bug of ours"
        self._told.add(incident.id)
        self._counts[outcome] += 1
        if outcome is Outcome.SENT:
            _log.info("the webhook at %s was told of incident %s", self._webhook.host, incident.id)
        else:
            _log.error(
                "the webhook at %s was not told of incident %s: %s", self._webhook.host, incident.id, why
            )
        try:
            await self._engine.keep_told(incident.id, outcome.value)
        except StoreError as error:
            # At worst it is told again by the next collector, with the same id.
            _log.warning("%s", error)

    async def _deliver(self, client: httpx.AsyncClient, incident: Incident) -> tuple[Outcome, str]:
        left = outbox.NEWS_SECONDS - (self._engine.clock() - (incident.confirmed_at or 0.0))
        retrying = tenacity.AsyncRetrying(
            wait=tenacity.wait_exponential(max=_MAX_WAIT_SECONDS),
            stop=tenacity.stop_after_delay(left),
            retry=tenacity.retry_if_exception_type((httpx.TransportError, _NotTakenError)),
            before_sleep=self._say_once,
        )
        try:
            return await retrying(self._post, client, incident.id)
        except tenacity.RetryError as error:
            return Outcome.GIVEN_UP, str(error.last_attempt.exception())

    async def _post(self, client: httpx.AsyncClient, incident: str) -> tuple[Outcome, str]:
        engine = self._engine
        # As it is now: while nobody took it more may have become known.
        content = message.body(document.incident(engine.state.incidents[incident], engine.books))
        signed = message.headers(incident, self._webhook.secret, engine.clock(), content)
        answer = await client.post(self._webhook.url, content=content, headers=signed)
        if answer.is_success:
            return Outcome.SENT, ""
        why = f"it answers {answer.status_code} {answer.reason_phrase}"
        if outbox.is_final(answer.status_code):
            return Outcome.REFUSED, why
        raise _NotTakenError(why)

    def _say_once(self, state: tenacity.RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome is not None:
            _log.warning(
                "the webhook at %s does not take it, and is tried again: %s",
                self._webhook.host,
                state.outcome.exception(),
            )


class _NotTakenError(Exception):
    """The receiver answered, and has not taken it."""
