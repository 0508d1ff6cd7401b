"""`gradwatch collector --on-ray`: the collector as a detached actor of a Ray cluster."""

from __future__ import annotations

import logging
import os
import socket
import time
from typing import TYPE_CHECKING, Any

from gradwatch.cli.errors import CliError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_READY_SECONDS = 60.0
_REACH_SECONDS = 5.0
_POLL_SECONDS = 0.2


def ensure(state_dir: Path, flags: Sequence[object]) -> dict[str, Any]:
    """See to it that the cluster has a collector; where it listens on its node, and its state folder.

    Args:
        state_dir: of one that is started, on the node that Ray chooses.
        flags: more arguments of `gradwatch collector`, for one that is started.

    Raises:
        UsageError: there is no Ray here, or no cluster.
        CliError: the cluster does not run it.
    """
    _check_address(os.environ.get("RAY_ADDRESS", ""))
    try:
        import ray
    except ImportError:
        raise UsageError("--on-ray needs Ray: pip install 'gradwatch[ray]'") from None
    from gradwatch.agent.integrations.ray.collector import ensure_collector

    try:
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError) as error:
        raise _no_cluster(str(error).splitlines()[0]) from None
    try:
        handle = ensure_collector(state_dir, flags=tuple(map(str, flags)))
        until = time.monotonic() + _READY_SECONDS
        while True:
            found: dict[str, Any] | None = ray.get(handle.where.remote(), timeout=_READY_SECONDS)
            if found is not None:
                return {**found, "state_dir": ray.get(handle.run.remote())}
            if time.monotonic() >= until:
                raise CliError(
                    f"the collector does not come up; see collector.log in {state_dir}, on its node"
                )
            time.sleep(_POLL_SECONDS)
    except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
        raise CliError(f"the cluster does not run the collector: {_last_line(error)}") from None
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Ray itself would try for minutes to reach a cluster that is not there."""
    host, _, port = address.rpartition(":")
    if port.isdigit() and "//" not in host:
        try:
            socket.create_connection((host, int(port)), _REACH_SECONDS).close()
        except OSError as error:
            raise _no_cluster(f"RAY_ADDRESS={address}: {error.strerror or error}") from None


def _no_cluster(why: str) -> UsageError:
    return UsageError(
        f"no Ray cluster is found from here ({why}); start one with `ray start --head`, or set RAY_ADDRESS"
    )


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
