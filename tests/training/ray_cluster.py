"""A Ray cluster of two nodes on this host, which lives until its standard input ends.

usage: python -m tests.training.ray_cluster

Prints its address. Each node has two CPUs. At a line on its standard input the second node is killed.
"""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster

CPUS = 2


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": CPUS})
    second = cluster.add_node(num_cpus=CPUS)
    print(cluster.address, flush=True)
    if sys.stdin.readline():
        cluster.remove_node(second, allow_graceful=False)
        sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
