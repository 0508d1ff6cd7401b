"""A child process that is started again when it ends, as long as the actor that it belongs to lives."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from typing import TYPE_CHECKING

from gradwatch.agent.probe.node import VARIABLE as NODE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_FIRST_WAIT_SECONDS = 0.1
_LONGEST_WAIT_SECONDS = 5.0
# One that lived this long was healthy: the next wait is the first one again.
_HEALTHY_SECONDS = 10.0


class Kept:
    """A `gradwatch` command that is kept running.

    Args:
        arguments: of `gradwatch`; `--parent` is added, so that it ends with this process.
        folder: its working folder.
        log: where its output goes.
    """

    def __init__(self, arguments: Sequence[object], folder: Path, log: Path) -> None:
        self._command = [sys.executable, "-m", "gradwatch.cli", *map(str, arguments)]
        self._command += ["--parent", str(os.getpid())]
        self._folder = folder
        self._log = log
        self._process: asyncio.subprocess.Process | None = None
        self._keeping = asyncio.create_task(self._keep())

    @property
    def pid(self) -> int | None:
        """Its process id; None while it does not run."""
        process = self._process
        return None if process is None or process.returncode is not None else process.pid

    async def end(self, seconds: float) -> int | None:
        """Tell it to end, and wait; its exit code, None when it did not end in that time."""
        self._keeping.cancel()
        await asyncio.gather(self._keeping, return_exceptions=True)
        process = self._process
        if process is None:
            return None
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            return await asyncio.wait_for(process.wait(), seconds)
        except asyncio.TimeoutError:
            process.kill()
            return None

    async def _keep(self) -> None:
        wait = _FIRST_WAIT_SECONDS
        while True:
            started = time.monotonic()
            with contextlib.suppress(OSError):
                self._process = await self._start()
                await self._process.wait()
            wait = _FIRST_WAIT_SECONDS if time.monotonic() - started >= _HEALTHY_SECONDS else wait
            await asyncio.sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT_SECONDS)

    async def _start(self) -> asyncio.subprocess.Process:
        # All that it is to know but the node's name is in its arguments.
        kept = {name for name in os.environ if not name.startswith("GRADWATCH_")} | {NODE}
        environ = {name: value for name, value in os.environ.items() if name in kept}
        with self._log.open("ab") as log:
            return await asyncio.create_subprocess_exec(
                *self._command,
                env=environ,
                cwd=self._folder,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
