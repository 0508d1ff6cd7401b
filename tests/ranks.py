"""Run a script as the ranks of one process group, with or without the probe.

The probe is activated as in production: by torch's autoload, from the environment.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

REPOSITORY = Path(__file__).parent.parent
# Until this process ends.
_RESERVED: list[socket.socket] = []


@dataclass(frozen=True)
class RankResult:
    """How one rank ended."""

    returncode: int
    output: str


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def reserved_port() -> int:
    """A port for a process group that nobody else is given before its first rank listens on it.

    It stays bound here. Whoever also sets SO_REUSEADDR, as torch's store does, may listen on it all the same.
    """
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", 0))
    _RESERVED.append(sock)
    return int(sock.getsockname()[1])


def environment(rank: int, world_size: int, port: int, spool: Path | None, **extra: str) -> dict[str, str]:
    """The environment of one rank, as torchrun would set it."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("GRADWATCH_")}
    env |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
    }
    if spool is not None:
        env |= {"GRADWATCH_SPOOL": str(spool), "GRADWATCH_JOB": "test-job"}
    return env | extra


def start_ranks(
    module: str,
    world_size: int,
    arguments: Sequence[str] = (),
    *,
    spool: Path | Sequence[Path] | None = None,
    **extra: str,
) -> list[subprocess.Popen[str]]:
    """Start `python -m module arguments…` once per rank; all with one spool, or each with its own."""
    port = reserved_port()
    spools = spool if isinstance(spool, (list, tuple)) else [spool] * world_size
    return [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env=environment(rank, world_size, port, spools[rank], **extra),
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]


def run_ranks(
    module: str,
    world_size: int,
    arguments: Sequence[str] = (),
    *,
    spool: Path | Sequence[Path] | None = None,
    timeout: float = 600,
    **extra: str,
) -> list[RankResult]:
    """Run the ranks to their end.

    Raises:
        AssertionError: a rank failed; with its output.
    """
    processes = start_ranks(module, world_size, arguments, spool=spool, **extra)
    results = []
    try:
        for process in processes:
            output, _ = process.communicate(timeout=timeout)
            results.append(RankResult(process.returncode, output))
    finally:
        for process in processes:
            process.kill()
    for rank, result in enumerate(results):
        assert result.returncode == 0, f"rank {rank} exited with {result.returncode}:\n{result.output}"
    return results
