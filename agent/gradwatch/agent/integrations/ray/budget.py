"""How often Ray Train may still restart the workers."""

from __future__ import annotations

from typing import Any

UNLIMITED = -1


class Budget:
    """What is left of `FailureConfig(max_failures=…)`, by what the controller says of its state.

    Args:
        max_failures: as the run was configured; -1 for no limit.
    """

    def __init__(self, max_failures: int) -> None:
        self._max_failures = max_failures
        self._failures = 0

    @property
    def left(self) -> int | None:
        """Restarts of a failed group that Ray will still make; None for no limit."""
        return None if self._max_failures == UNLIMITED else max(0, self._max_failures - self._failures)

    def state_changed(self, state: Any) -> None:
        """Ray's controller is in a new state: is it one in which it restarts a group that has failed?"""
        error = getattr(state, "training_failed_error", None)
        # Controller errors and preemptions have budgets of their own.
        is_counted = type(error).__name__ == "WorkerGroupError" and not _is_preemption(error)
        if is_counted and type(state).__name__ == "RestartingState":
            self._failures += 1


def _is_preemption(error: Any) -> bool:
    failures = getattr(error, "worker_failures", {})
    return any(getattr(one, "preempted", False) is True for one in failures.values())
