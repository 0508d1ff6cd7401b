"""Where a collector is, as it has left it in its state folder. Standard library only."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

INFO = "collector.json"


class UnknownError(Exception):
    """No collector has left its address there."""


@dataclass(frozen=True)
class Whereabouts:
    """What the file says.

    Attributes:
        grpc: HOST:PORT.
        grpc_tls: whether it speaks TLS there.
        id: which collector it is: that of the state folder, the same after each start; empty for one
            that does not say.
        pid: its process.
        http: URL of its API.
    """

    grpc: str
    grpc_tls: bool
    id: str
    pid: int
    http: str


def read(state_dir: Path) -> Whereabouts:
    """What the collector of a state folder has left. It may have ended since.

    Raises:
        UnknownError: there is nothing, or nothing of use.
    """
    path = state_dir / INFO
    try:
        found = json.loads(path.read_bytes())
        return Whereabouts(
            grpc=str(found["grpc"]),
            grpc_tls=found.get("grpc_tls") is True,
            id=str(found.get("id", "")),
            pid=int(found.get("pid", 0)),
            http=str(found.get("http", "")),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnknownError(f"no collector has left its address in {path}: {error}") from error
