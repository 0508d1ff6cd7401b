"""Start the cluster's collector, on another node than the head; Ray may start it again anywhere.

usage: python -m tests.training.ray_collector STATE_DIR
"""

from __future__ import annotations

import contextlib
import os
import sys
import time

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gradwatch.agent.integrations.ray.collector import NAME, NAMESPACE, CollectorActor


@ray.remote(num_cpus=0)
def raylet() -> int:
    """The process of the node."""
    return os.getppid()


def main(state_dir: str) -> None:
    ray.init(address="auto", log_to_driver=False)
    (there,) = (node["NodeID"] for node in ray.nodes() if "node:__internal_head__" not in node["Resources"])
    strictly, softly = (NodeAffinitySchedulingStrategy(there, soft=soft) for soft in (False, True))
    node = ray.get(raylet.options(scheduling_strategy=strictly).remote(), timeout=60)
    collector = ray.remote(num_cpus=0, max_restarts=-1)(CollectorActor)
    # Strictly there it could start nowhere else again; softly, Ray now and then takes the head.
    while True:
        handle = collector.options(
            name=NAME, namespace=NAMESPACE, lifetime="detached", scheduling_strategy=softly
        ).remote(state_dir)
        actor, _ = ray.get(handle.pids.remote(), timeout=60)
        if psutil.Process(actor).ppid() == node:
            break
        ray.kill(handle)
        wait_until_gone()
    ray.get(handle.run.remote(), timeout=60)


def wait_until_gone() -> None:
    with contextlib.suppress(ValueError):
        while ray.get_actor(NAME, NAMESPACE):
            time.sleep(0.1)


if __name__ == "__main__":
    main(sys.argv[1])
