"""Two nodes on one machine: network namespaces that are wired to one another and to the machine.

Needs root and iproute2. Processes of both share the files and the process table, as on a cluster with a
shared file system they would share the former.
"""

from __future__ import annotations

import random
import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Self

JOB_INTERFACE = "job"
MASTER_ADDRESS = "10.213.0.1"


@dataclass(frozen=True)
class Node:
    """One of the two.

    Attributes:
        name: of its network namespace, and its host name.
        rank: 0 or 1.
        machine_address: of the machine, as this node reaches it.
    """

    name: str
    rank: int
    machine_address: str

    def command(self, command: Sequence[object]) -> list[str]:
        """The command, to be run on this node. It keeps the process id."""
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.name]
        return ["ip", "netns", "exec", self.name, *named, *map(str, command)]


class Network:
    """Both nodes, from entering to leaving; gone afterwards, whatever happened.

    Raises:
        RuntimeError: `ip` is missing, or refuses; with what it says.
    """

    def __init__(self) -> None:
        mark = f"{random.randrange(16**4):04x}"
        subnet = f"10.{random.randrange(214, 250)}.{random.randrange(250)}"
        self.nodes = [Node(f"gw{mark}n{rank}", rank, f"{subnet}.{4 * rank + 1}") for rank in (0, 1)]
        self._subnet = subnet

    @staticmethod
    def missing() -> str | None:
        """Why there can be no network; None when there can."""
        if shutil.which("ip") is None or shutil.which("unshare") is None:
            return "iproute2 or util-linux is not installed"
        tried = subprocess.run(["unshare", "--net", "--uts", "true"], capture_output=True, check=False)
        return None if tried.returncode == 0 else "network namespaces need root"

    def __enter__(self) -> Self:
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:
            subprocess.run(["ip", "netns", "del", node.name], capture_output=True, check=False)

    def _make(self) -> None:
        first, second = self.nodes
        for node in self.nodes:
            _ip("netns", "add", node.name)
            _ip("-n", node.name, "link", "set", "lo", "up")
            # To the machine, where the collector is.
            here = f"{node.name}m"
            _ip("link", "add", here, "type", "veth", "peer", "name", "machine", "netns", node.name)
            _ip("addr", "add", f"{node.machine_address}/30", "dev", here)
            _ip("link", "set", here, "up")
            _ip("-n", node.name, "addr", "add", f"{self._subnet}.{4 * node.rank + 2}/30", "dev", "machine")
            _ip("-n", node.name, "link", "set", "machine", "up")
        # To one another, for the training.
        _ip(
            *("-n", first.name, "link", "add", JOB_INTERFACE, "type", "veth"),
            *("peer", "name", JOB_INTERFACE, "netns", second.name),
        )
        for node in self.nodes:
            _ip("-n", node.name, "addr", "add", f"10.213.0.{node.rank + 1}/24", "dev", JOB_INTERFACE)
            _ip("-n", node.name, "link", "set", JOB_INTERFACE, "up")


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
