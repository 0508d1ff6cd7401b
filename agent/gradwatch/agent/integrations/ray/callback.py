"""The callback that Ray Train calls: in the driver, the controller and the workers.

It travels between them by value: a cluster whose image has no Gradwatch trains on, with a word about it.
All that it does is in modules that are imported where it arrives.
"""

from __future__ import annotations

import os
import platform
import sys
from typing import TYPE_CHECKING, Any

import ray.cloudpickle
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerCallback, WorkerGroupCallback

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class WatchCallback(ControllerCallback, WorkerGroupCallback, WorkerCallback):
    """Watch the workers of a Ray Train run: `RunConfig(callbacks=[WatchCallback()])`.

    Under `gradwatch run` it is there already, and a second one does nothing.

    Args:
        job: the job's name; the run's own by default.
        policy: the policy file, for a run that `gradwatch run` does not start; there `--policy` says it.
        asks_for_checkpoint: the train function asks `good_checkpoint()`, and not Ray, what to resume from.
            Then a Ray that Gradwatch does not know can be rolled back too.

    Raises:
        ValueError: something is wrong in the policy.
        OSError: the policy cannot be read.
    """

    def __init__(
        self,
        *,
        job: str | None = None,
        policy: str | os.PathLike[str] | None = None,
        asks_for_checkpoint: bool = False,
    ) -> None:
        told = {name: value for name, value in os.environ.items() if name.startswith("GRADWATCH_")}
        self._driver: dict[str, Any] = {
            "environ": told,
            "job": job,
            "asks_for_checkpoint": asks_for_checkpoint,
            "policy": None if policy is None else _policy(policy, launched="GRADWATCH_SPOOL" in told),
        }
        self._controller: Any = None
        self._off = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_controller": None}

    # ------------------------------------------------------------ in the controller

    def after_controller_start(self, train_run_context: Any) -> None:
        """The run begins."""

        def begin() -> None:
            from gradwatch.agent.integrations.ray import controller

            self._controller = controller.begin(self._driver, train_run_context)

        self._quietly(begin)

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        """Workers are about to be started."""
        self._ask("group_starts", worker_group_context)

    def before_init_train_context(self, workers: Any) -> dict[str, Any]:
        """The workers are there, and have run nothing of the user's."""
        self._ask("prepare", workers, _prepare)
        return {}

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Ray has asked the workers how they are."""
        self._ask("polled", worker_group_status)

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """The run goes on, or ends."""
        self._ask("state_changed", previous_state, current_state)

    # ------------------------------------------------------------ in a worker

    def after_init_train_context(self) -> None:
        """The train function is about to be called."""

        def begin() -> None:
            from gradwatch.agent.integrations.ray import worker

            worker.train_context_ready()

        self._quietly(begin)

    # ------------------------------------------------------------ never the training's trouble

    def _ask(self, name: str, *args: Any) -> None:
        if self._controller is not None:
            self._quietly(getattr(self._controller, name), *args)

    def _quietly(self, call: Callable[..., None], *args: Any) -> None:
        if self._off:
            return
        try:
            call(*args)
        except Exception as error:
            if getattr(error, "gradwatch_meant", False):
                raise
            self._off = True
            _say(_why_not(error))


def _policy(path: str | os.PathLike[str], *, launched: bool) -> dict[str, Any] | None:
    if launched:
        _say(f"the callback's policy {path} is left out: under `gradwatch run`, --policy says it")
        return None
    from gradwatch.agent.integrations.ray import policy

    return policy.read(path)


def _prepare(environ: Mapping[str, str]) -> str | None:
    """Put the probe into a worker's process; why that could not be."""
    try:
        from gradwatch.agent.integrations.ray import worker

        worker.prepare(environ)
    except Exception as error:
        return _why_not(error)
    return None


def _why_not(error: Exception) -> str:
    missing = isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("gradwatch")
    what = (
        f"gradwatch is not installed in {sys.executable}: install it in the cluster's image (pip)"
        if missing
        else f"{type(error).__name__}: {error}"
    )
    return f"NOT WATCHED: workers on {platform.node()}: {what}. The training goes on without it."


def _say(text: str) -> None:
    print(f"gradwatch: {text}", file=sys.stderr, flush=True)  # noqa: T201 - Ray shows it to the driver


ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # type: ignore[no-untyped-call]
