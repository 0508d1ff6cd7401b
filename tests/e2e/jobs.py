"""Real training jobs under `gradwatch run`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.cli.command import Result, finish, start
from tests.ranks import REPOSITORY, free_port

SCRIPTS = Path(__file__).parent / "scripts"
PYTHON_BIN = Path(sys.executable).parent
FIRST_PARAMETER = "2.weight"


class Job:
    """One job.

    Args:
        folder: its report lies there, and the state folder that all jobs in it share.
        command: what is run.
        flags: more arguments of `gradwatch run`.
        env: steers the script.
    """

    def __init__(self, folder: Path, command: list[object], *flags: object, **env: str) -> None:
        self.state_dir = folder / "state"
        self._report = folder / f"report-{free_port()}.json"
        arguments = ["--state-dir", self.state_dir, "--report", self._report, *flags, "--", *command]
        self.process = start("run", *arguments, PYTHONPATH=str(REPOSITORY), **env)

    def kill(self) -> None:
        """End it, and what it has started, if a test has not seen it to its end."""
        if self.process.poll() is None:
            self.process.terminate()
            self.process.communicate(timeout=60)

    def finish(self, timeout: float = 600) -> Result:
        """Wait for its end."""
        return finish(self.process, timeout)

    @property
    def report(self) -> dict[str, Any]:
        """What `--report` wrote."""
        return json.loads(self._report.read_text())


def torchrun(script: str, ranks: int = 2, *flags: str) -> list[object]:
    """A torchrun command, on a port of its own.

    Standalone: with the static rendezvous of `--master-port`, torchrun's own restarts fail with
    or without us, since the new workers read the old ones' addresses (pytorch issue 135712).
    """
    return [
        PYTHON_BIN / "torchrun",
        "--standalone",
        "--nproc-per-node",
        ranks,
        *flags,
        SCRIPTS / f"{script}.py",
    ]


def verdict(report: dict[str, Any]) -> tuple[object, ...]:
    """(rank, step, parameter) of the report's only incident."""
    (incident,) = report["incidents"]
    first = incident["first"]
    return first["rank"], first["step"], first["parameter"]
