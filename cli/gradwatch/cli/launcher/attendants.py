"""The launcher's own children: a sidecar, and a collector where there is none to use."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

from gradwatch.agent.sidecar import cleanup
from gradwatch.cli.launcher import collector_state
from gradwatch.cli.launcher.environment import for_child
from gradwatch.cli.launcher.processes import send
from gradwatch.cli.launcher.sidecar_log import SidecarLog
from gradwatch.cli.launcher.supervise import Supervised

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from gradwatch.cli.launcher.config import RunConfig
    from gradwatch.cli.launcher.processes import Processes
    from gradwatch.cli.launcher.spools import RunSpool
    from gradwatch.collector.statedir import CollectorInfo

_LOOK_SECONDS = 0.25
# So many deaths in a row are no accident any more.
_DEATHS = 4
_SIDECAR_LOG, _COLLECTOR_LOG = cleanup.LOGS


class Attendants:
    """Keeps the sidecar and the embedded collector running.

    Args:
        config: the run's.
        spool: what the sidecar ships; their logs lie there too.
        processes: starts and reaps them.
    """

    def __init__(self, config: RunConfig, spool: RunSpool, processes: Processes) -> None:
        self._config = config
        self._spool = spool
        self._processes = processes
        self._sidecar = Supervised(self._start_sidecar, processes.exit_status)
        self._collector = Supervised(self._start_collector, processes.exit_status)
        self._sidecar_log = SidecarLog(spool.folder / _SIDECAR_LOG)
        self._held = False
        self._look_at = 0.0
        self._drain_until: float | None = None
        self._told_to_drain = False
        self._drained = False

    @property
    def collector(self) -> CollectorInfo | None:
        """The collector of the state folder, once it has written down where it listens."""
        return collector_state.ready(self._config.state_dir)

    @property
    def pids(self) -> set[int]:
        """Their process ids."""
        return {child.pid for child in (self._sidecar, self._collector) if child.pid is not None}

    @property
    def drained(self) -> bool:
        """Whether the sidecar has ended by itself after it was told to drain."""
        return self._drained

    def troubles(self) -> list[str]:
        """What is wrong with them, for the user."""
        return [
            f"the {name} does not stay up: it has ended {child.deaths} times in a row; its last words: "
            f"{_last_line(self._spool.folder / log)}"
            for name, log, child in (
                ("collector", _COLLECTOR_LOG, self._collector),
                ("sidecar", _SIDECAR_LOG, self._sidecar),
            )
            if child.deaths == _DEATHS
        ] + [f"nothing is reported: {refusal}" for refusal in self._sidecar_log.refusals()]

    def tick(self, now: float) -> None:
        """Start what is missing. To be called often.

        Args:
            now: monotonic seconds.
        """
        if self._config.collector is None:
            self._tick_collector(now)
        self._tick_sidecar(now)

    def drain(self, until: float) -> None:
        """Tell the sidecar to ship the rest by the monotonic time `until`, and then to end."""
        self._spool.forget_leftover()
        self._drain_until = until
        self._told_to_drain = self._sidecar.pid is not None
        if self._sidecar.pid is not None:
            send(self._sidecar.pid, signal.SIGTERM)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Tell both to end."""
        for pid in self.pids:
            send(pid, number)

    def _tick_collector(self, now: float) -> None:
        if now >= self._look_at:
            self._look_at = now + _LOOK_SECONDS
            self._held = collector_state.is_held(self._config.state_dir)
        # One that another run has started, or the user, does as well; we take over when it goes.
        self._collector.tick(now, wanted=not self._held)

    def _tick_sidecar(self, now: float) -> None:
        was_running = self._sidecar.running
        self._sidecar.tick(now, wanted=self._drain_until is None)
        if self._drain_until is None or self._sidecar.running or self._drained:
            return
        # It ended. By itself, or was it killed before it was done?
        if was_running and self._told_to_drain and (self._sidecar.last_exit or 0) >= 0:
            self._drained = True
        elif now < self._drain_until:
            self._told_to_drain = True
            self._sidecar.tick(now, wanted=True)

    def _start_sidecar(self) -> int:
        access = self._config.access
        arguments = ["sidecar", "--spool", self._spool.folder, "--state-dir", self._config.state_dir]
        arguments += ["--job", self._config.job, "--parent", os.getpid()]
        arguments += ["--drain-timeout", self._config.drain_seconds]
        if self._config.collector is not None:
            arguments += ["--collector", self._config.collector]
        if self._drain_until is not None:
            arguments += ["--drain"]
        if access.ca is not None:
            arguments += ["--tls-ca", access.ca]
        if access.ca is not None and access.cert is not None and access.key is not None:
            arguments += ["--tls-cert", access.cert, "--tls-key", access.key]
        if access.token_file is not None:
            arguments += ["--token-file", access.token_file]
        checkpoints = None if self._config.policy is None else self._config.policy.checkpoints
        if checkpoints is not None:
            arguments += ["--checkpoints-root", checkpoints.root]
            arguments += ["--checkpoints-layout", checkpoints.layout.value]
        return self._start(_SIDECAR_LOG, arguments)

    def _start_collector(self) -> int:
        arguments: list[object] = [
            "collector",
            "--state-dir",
            self._config.state_dir,
            "--parent",
            os.getpid(),
        ]
        access = self._config.access
        if self._config.http is not None:
            arguments += ["--http", self._config.http]
            if access.cert is not None and access.key is not None:
                arguments += ["--tls-cert", access.cert, "--tls-key", access.key]
        if access.token_file is not None:
            arguments += ["--token-file", access.token_file]
        if self._config.identities is not None:
            arguments += ["--identities", self._config.identities]
        told = {}
        if self._config.webhook is not None:
            # The address may hold a secret, and others see arguments.
            told["GRADWATCH_WEBHOOK"] = self._config.webhook
            told["GRADWATCH_WEBHOOK_SECRET_FILE"] = str(self._config.webhook_secret_file)
        return self._start(_COLLECTOR_LOG, arguments, told)

    def _start(self, log: str, arguments: list[object], told: Mapping[str, str] | None = None) -> int:
        command = [sys.executable, "-m", "gradwatch.cli", *map(str, arguments)]
        folder = self._spool.folder
        environment = {**for_child(os.environ), **(told or {})}
        return self._processes.start_child(command, environment, folder, folder / log)


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").split("\n")
    except OSError as error:
        return f"none ({error.strerror})"
    return next((line for line in reversed(lines) if line.strip()), "none")
