"""Our own children, the sidecar and the embedded collector: restarted when they die."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

FIRST_WAIT_SECONDS = 0.1
LONGEST_WAIT_SECONDS = 5.0
# A child that lived this long was healthy: the next wait is the first one again.
HEALTHY_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Backoff:
    """When a child may be started again.

    Attributes:
        wait: seconds from the last death to the next start.
        not_before: monotonic time of the next start.
    """

    wait: float = FIRST_WAIT_SECONDS
    not_before: float = 0.0

    def after_death(self, started: float, now: float) -> Backoff:
        """The backoff once a child that was started at `started` is found dead at `now`."""
        wait = FIRST_WAIT_SECONDS if now - started >= HEALTHY_SECONDS else self.wait
        return Backoff(min(wait * 2, LONGEST_WAIT_SECONDS), now + wait)


class Supervised:
    """One child that should be running.

    Attributes:
        pid: None while it does not run.
        last_exit: exit code, or minus the signal, of the last one that ended.
        deaths: in a row, without a healthy life in between.

    Args:
        start: starts it and returns its pid; OSError counts as a death.
        exit_status: of a pid; None while it runs.
    """

    def __init__(self, start: Callable[[], int], exit_status: Callable[[int], int | None]) -> None:
        self.pid: int | None = None
        self.last_exit: int | None = None
        self.deaths = 0
        self._start = start
        self._exit_status = exit_status
        self._backoff = Backoff()
        self._started = 0.0

    def tick(self, now: float, *, wanted: bool) -> None:
        """Notice a death, and start it when it is wanted and due.

        Args:
            now: monotonic seconds.
            wanted: whether it should run at all.
        """
        if self.pid is not None:
            self.last_exit = self._exit_status(self.pid)
            if self.last_exit is None:
                return
            self.pid = None
            self.deaths = 1 if now - self._started >= HEALTHY_SECONDS else self.deaths + 1
            self._backoff = self._backoff.after_death(self._started, now)
        if wanted and now >= self._backoff.not_before:
            self._started = now
            try:
                self.pid = self._start()
            except OSError:
                self.deaths += 1
                self._backoff = self._backoff.after_death(now, now)

    @property
    def running(self) -> bool:
        """Whether it was running at the last tick."""
        return self.pid is not None
