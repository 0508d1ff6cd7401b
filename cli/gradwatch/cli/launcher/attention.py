"""All that goes on beside the command: sidecar, collector, and what they tell of the job."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from gradwatch.cli.launcher import job_view, preflight, watch
from gradwatch.cli.launcher.attendants import Attendants
from gradwatch.cli.launcher.beside import Beside
from gradwatch.cli.launcher.signals import ENDING

if TYPE_CHECKING:
    from gradwatch.agent.launch.orders import Order
    from gradwatch.cli.launcher.config import RunConfig
    from gradwatch.cli.launcher.console import Console
    from gradwatch.cli.launcher.processes import Processes
    from gradwatch.cli.launcher.signals import Signals
    from gradwatch.cli.launcher.spools import RunSpool

_TICK_SECONDS = 0.02
# A sidecar that was only just started needs a moment before it can drain.
_START_SECONDS = 3.0
_STOP_SECONDS = 5.0


class Attention:
    """Attends to everything but the command; a failure here never reaches it.

    Args:
        config: the run's.
        spool: the run's folder.
        processes: starts and reaps.
        signals: of this process.
        console: for what is to be said.

    Attributes:
        view: the job as the collector sees it; None until it has answered.
        heard_at: monotonic time of the collector's newest word or sign of life; 0 before the first.
    """

    def __init__(
        self, config: RunConfig, spool: RunSpool, processes: Processes, signals: Signals, console: Console
    ) -> None:
        self.view: job_view.JobView | None = None
        self.heard_at = 0.0
        self._config = config
        self._spool = spool
        self._processes = processes
        self._signals = signals
        self._console = console
        self._attendants: Attendants | Beside = (
            Attendants(config, spool, processes) if config.sidecar else Beside(config, spool)
        )
        self._document: bytes | None = None
        self._heard: tuple[int, ...] = ()
        self._said = watch.Said()
        self._said_where = False

    @property
    def pids(self) -> set[int]:
        """The process ids of sidecar and collector."""
        return self._attendants.pids

    def tick(self) -> None:
        """Start what is missing, say what is new. To be called often."""
        try:
            self._attendants.tick(time.monotonic())
            for trouble in self._attendants.troubles():
                self._console.warn(trouble)
            self._listen()
            self._look_at_status()
        except Exception as error:
            self._console.warn(f"something in gradwatch itself failed: {error!r}; the command goes on")

    def order(self) -> Order | None:
        """The newest order for this launcher."""
        return self._spool.journal.order()

    def end(self) -> None:
        """Ship the rest, and end sidecar and collector; the spool goes when all of it is shipped."""
        until = time.monotonic() + self._config.drain_seconds + _START_SECONDS
        self._attendants.drain(until)
        while not self._attendants.drained and time.monotonic() < until:
            self._processes.reap()
            self.tick()
            if any(number in ENDING for number, _ in self._signals.wait(_TICK_SECONDS)):
                break
        self.tick()
        self._stop()
        left = self._spool.leftover()
        if left is not None and not left.journals and not left.unread_bytes:
            self._spool.remove()
            return
        what = "some of the run" if left is None else f"{left.journals} journals, {left.unread_bytes} bytes"
        self._console.warn(
            f"not shipped to the collector: {what} in {self._spool.folder}; the next run ships them"
        )

    def _stop(self) -> None:
        self._attendants.stop()
        until = time.monotonic() + _STOP_SECONDS
        while any(self._processes.exit_status(pid) is None for pid in self.pids):
            if time.monotonic() >= until:
                self._attendants.stop(signal.SIGKILL)
            self._signals.wait(_TICK_SECONDS)
            self._processes.reap()

    def _listen(self) -> None:
        heard = self._spool.journal.word_times()
        # The collector on this state folder lives as long as its process does.
        if heard != self._heard or (self._config.own_collector and self._attendants.collector is not None):
            self._heard = heard
            self.heard_at = time.monotonic()

    def _look_at_status(self) -> None:
        if not self._said_where:
            self._say_where()
        document = self._spool.status()
        if document is None or document == self._document:
            return
        self._document = document
        view = job_view.parse(document)
        if view is None:
            return
        self.view = view
        policy = self._config.policy
        self._said, lines = watch.news(self._said, view, None if policy is None else policy.hash)
        for line in lines:
            self._console.say(line)

    def _say_where(self) -> None:
        config = self._config
        if not config.sidecar:
            self._said_where = True
            self._console.note(f"job {config.job} is reported by the sidecar that runs on {config.state_dir}")
            return
        if config.collector is not None:
            self._said_where = True
            self._console.note(f"job {config.job} reports to the collector at {config.collector}")
            return
        found = self._attendants.collector
        if found is None:
            return
        self._said_where = True
        self._console.note(f"job {config.job}, metrics at {found.http}/metrics")
        asked = None if config.http is None else preflight.parse_address(config.http, "--http")[1]
        if asked and asked != urlsplit(found.http).port:
            self._console.warn(
                f"a collector already runs on {config.state_dir}, at {found.http}; --http is not used"
            )
