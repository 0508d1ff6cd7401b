"""Start the cluster's collector, on another node than the head; Ray may start it again anywhere.

usage: python -m tests.training.ray_collector STATE_DIR
"""

from __future__ import annotations

import sys

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gradwatch.agent.integrations.ray.collector import NAME, NAMESPACE, CollectorActor


def main(state_dir: str) -> None:
    ray.init(address="auto", log_to_driver=False)
    (there,) = (node["NodeID"] for node in ray.nodes() if "node:__internal_head__" not in node["Resources"])
    collector = ray.remote(num_cpus=0, max_restarts=-1)(CollectorActor)
    options = {"name": NAME, "namespace": NAMESPACE, "lifetime": "detached"}
    handle = collector.options(
        **options, scheduling_strategy=NodeAffinitySchedulingStrategy(there, soft=True)
    ).remote(state_dir)
    ray.get(handle.run.remote(), timeout=60)


if __name__ == "__main__":
    main(sys.argv[1])
