"""The `gradwatch` command as a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

GRADWATCH = [sys.executable, "-m", "gradwatch.cli"]


def environment(**more: str) -> dict[str, str]:
    """This process's, without what would steer the command."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("GRADWATCH_", "SLURM_"))}
    return env | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"} | more


@dataclass(frozen=True)
class Result:
    """How a command ended, and what it printed."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def ours(self) -> list[str]:
        """The launcher's lines."""
        return [line for line in self.stderr.splitlines() if line.startswith("gradwatch: ")]

    @property
    def json(self) -> Any:
        """stdout as JSON."""
        return json.loads(self.stdout)


def gradwatch(*arguments: object, stdin: str = "", timeout: float = 300, **env: str) -> Result:
    """Run it to its end."""
    done = subprocess.run(
        [*GRADWATCH, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        env=environment(**env),
    )
    return Result(done.returncode, done.stdout, done.stderr)


def start(*arguments: object, **env: str) -> subprocess.Popen[str]:
    """Start it."""
    return subprocess.Popen(
        [*GRADWATCH, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**env),
    )


def finish(process: subprocess.Popen[str], timeout: float = 300) -> Result:
    """Wait for its end."""
    stdout, stderr = process.communicate(timeout=timeout)
    return Result(process.returncode, stdout, stderr)


def until(condition: Callable[[], Any], seconds: float = 180.0) -> Any:
    """Wait until a condition gives something true, and return that."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.02)
    return value


def processes_with(text: str) -> list[psutil.Process]:
    """Living processes with `text` in their arguments, this one aside."""
    return [process for process in psutil.process_iter() if _has(process, text)]


def _has(process: psutil.Process, text: str) -> bool:
    try:
        if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
            return False
        return any(text in argument for argument in process.cmdline())
    except psutil.Error:
        return False


def child_of(launcher: int, name: str) -> psutil.Process | None:
    """The launcher's own child: "sidecar" or "collector"."""
    try:
        children = psutil.Process(launcher).children()
        return next((child for child in children if name in child.cmdline()), None)
    except psutil.Error:
        return None


def spools(state_dir: Path) -> list[Path]:
    """The spools that are there."""
    folder = state_dir / "spool"
    return sorted(folder.iterdir()) if folder.exists() else []
