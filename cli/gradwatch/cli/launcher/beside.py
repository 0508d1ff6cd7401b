"""What stands in for the launcher's own children when a sidecar runs beside it, in another container."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from gradwatch.agent.probe import spool

if TYPE_CHECKING:
    import signal

    from gradwatch.cli.launcher.config import RunConfig
    from gradwatch.cli.launcher.spools import RunSpool

_LOOK_SECONDS = 0.25
# A sidecar whose container is started again takes a while.
_PATIENCE_SECONDS = 30.0


class Beside:
    """The same as `Attendants`, and nothing is started.

    Args:
        config: the run's.
        spool: what the sidecar is to ship.

    Attributes:
        collector: not known here.
        pids: none is ours.
    """

    collector = None

    def __init__(self, config: RunConfig, spool: RunSpool) -> None:
        self.pids: set[int] = set()
        self._config = config
        self._spool = spool
        self._look_at = 0.0
        self._started = time.monotonic()
        self._seen_at: float | None = None
        self._troubles: list[str] = []

    @property
    def drained(self) -> bool:
        """Whether the sidecar has left its word: it leaves one once the launch has ended."""
        return self._spool.leftover() is not None

    def troubles(self) -> list[str]:
        """What is wrong with it, for the user."""
        return self._troubles

    def tick(self, now: float) -> None:
        """Look whether a sidecar is there, and does what the policy needs. To be called often.

        Args:
            now: monotonic seconds.
        """
        if now < self._look_at:
            return
        self._look_at = now + _LOOK_SECONDS
        if self._seen_at is None:
            if spool.is_locked(self._spool.folder / spool.SIDECAR_LOCK):
                self._seen_at = now
            elif now - self._started >= _PATIENCE_SECONDS:
                self._troubles = [self._missing()]
        elif now - self._seen_at >= _PATIENCE_SECONDS:
            self._troubles = self._blind()
            self._look_at = math.inf

    def _missing(self) -> str:
        what = f"no sidecar has taken up this run in {_PATIENCE_SECONDS:g} s: nothing is reported"
        start = f"gradwatch sidecar --state-dir {self._config.state_dir}"
        return f"{what}. Start one beside it, as the same user: {start}"

    def _blind(self) -> list[str]:
        """It keeps a journal as soon as it looks after checkpoints."""
        policy = self._config.policy
        root = None if policy is None or policy.checkpoints is None else policy.checkpoints.root
        if root is None or any(self._spool.folder.glob(spool.progress_filename("sidecar-*"))):
            return []
        what = "the sidecar looks after no checkpoints, so there will be none to go back to"
        return [f"{what}: give it --checkpoints-root {root}"]

    def drain(self, _until: float) -> None:
        """Nothing: it drains by itself when the launch has ended."""

    def stop(self, _number: signal.Signals | None = None) -> None:
        """Nothing: it is not ours."""
