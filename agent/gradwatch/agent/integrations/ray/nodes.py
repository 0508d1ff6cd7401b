"""The run's Ray nodes: an attendant on each, started when workers are first placed there."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gradwatch.agent.integrations.ray.attendant import Attendant

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_START_SECONDS = 60.0
_MARGIN_SECONDS = 5.0


class Nodes:
    """Where on each node the spool is.

    Args:
        own: node ids whose spool somebody else looks after, and its path.
        collector: gives HOST:PORT, or the handle of an actor that carries connections; asked once.
        settings: of every `Attendant`.
    """

    def __init__(self, own: dict[str, str], collector: Callable[[], Any], settings: dict[str, Any]) -> None:
        self._own = own
        self._collector = functools.cache(collector)
        self._settings = settings
        self._attendants: dict[str, Any] = {}
        self._spools: dict[str, str] = {}
        self._shipped: set[str] = set()

    def spools(self, node_ids: Iterable[str]) -> dict[str, str | Exception]:
        """By node, the spool's path, or why there is none."""
        wanted = sorted(set(node_ids) - self._own.keys())
        for node_id in wanted:
            if node_id not in self._attendants:
                self._attendants[node_id] = self._attendant(node_id)
        asked = {node_id: self._attend(self._attendants[node_id]) for node_id in wanted}
        found: dict[str, str | Exception] = dict(self._own)
        for node_id, answer in asked.items():
            try:
                found[node_id] = self._spools[node_id] = ray.get(answer, timeout=_START_SECONDS)
            except Exception as error:  # noqa: PERF203 - each node by itself
                found[node_id] = error
        return found

    def look_after(self) -> None:
        """An attendant that Ray has started again is told to go on. To be called now and then."""
        for attendant in self._attendants.values():
            self._attend(attendant)

    def drain(self) -> list[str]:
        """Have all that lies on the nodes shipped; where some is left, in words."""
        asked = {node_id: one.drain.remote() for node_id, one in self._attendants.items()}
        seconds = float(self._settings["drain_seconds"]) + _MARGIN_SECONDS
        for node_id, answer in asked.items():
            with contextlib.suppress(Exception):
                if ray.get(answer, timeout=seconds):
                    self._shipped.add(node_id)
        left = [one for one in asked if one not in self._shipped]
        return [f"{self._spools.get(one, 'its spool')} on Ray node {one}" for one in left]

    def end(self) -> None:
        """End the attendants; what is shipped is removed."""
        for node_id, attendant in self._attendants.items():
            if node_id in self._shipped:
                with contextlib.suppress(Exception):
                    ray.get(attendant.clear.remote(), timeout=_MARGIN_SECONDS)
            ray.kill(attendant)

    def _attendant(self, node_id: str) -> Any:
        actor = ray.remote(num_cpus=0, max_restarts=-1)(Attendant)
        place = NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)
        return actor.options(scheduling_strategy=place).remote(**self._settings)

    def _attend(self, attendant: Any) -> Any:
        # Here and not in the constructor: with a handle among its arguments Ray does not promise that it can
        # start an actor again, and says so to the user.
        return attendant.attend.remote(self._collector())
