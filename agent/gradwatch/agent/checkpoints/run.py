"""Having checkpoints scanned by a child process. No torch here: the sidecar and the command line use it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from typing import TYPE_CHECKING

from gradwatch.agent.checkpoints import remote
from gradwatch.agent.checkpoints.result import Completeness, ScanResult

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence
    from os import PathLike

    Address = str | PathLike[str]

_MODULE = "gradwatch.agent.checkpoints.scan"
# A document names at most 60 tensors; their names are bounded by the pickle's size only.
_MAX_LINE = 64 << 20
_STDERR_KEPT = 2000
# The child is not a rank, needs no accelerator and one thread.
_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    "PYTHONSAFEPATH": "1",
}


async def run_scan(path: Address, *, limit_seconds: float | None = None) -> ScanResult:
    """Scan one checkpoint in a child process at low priority.

    Args:
        path: a file or a folder, or its URL. The caller has made sure that it may be read: `Place.holds`.
        limit_seconds: after that the child is killed; None to wait.

    Returns:
        The result. A child that crashed, was killed or took too long gives one with `error`.
    """
    try:
        return await asyncio.wait_for(_first(path), limit_seconds)
    except asyncio.TimeoutError:
        return ScanResult(str(path), error=f"the scan took longer than {limit_seconds:g} s")


async def run_scans(paths: Sequence[Address]) -> AsyncGenerator[ScanResult, None]:
    """Scan checkpoints one after the other, in as few child processes as it takes.

    A child that dies is an error for the checkpoint it was at; the next ones get another. Closing the
    generator kills the child. What is fetched from a URL is removed, whatever becomes of the child.
    """
    left = [str(path) for path in paths]
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(remote.scratch()) if any(map(remote.is_url, left)) else None
        options = [] if scratch is None else [f"--scratch={scratch}"]
        while left:
            async with contextlib.aclosing(_one_child(left, options)) as results:
                done = 0
                async for result in results:
                    yield result
                    done += 1
            left = left[done:]


async def _first(path: Address) -> ScanResult:
    async with contextlib.aclosing(run_scans([path])) as results:
        return await anext(results)


async def _one_child(paths: Sequence[str], options: Sequence[str]) -> AsyncGenerator[ScanResult, None]:
    """The results of one child, of which the last is an error if it did not get to its end."""
    try:
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            _MODULE,
            "--json",
            f"--parent={os.getpid()}",
            *options,
            "--",
            *paths,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_MAX_LINE,
            env=_environment(),
        )
    except OSError as error:
        yield ScanResult(paths[0], error=f"the scan could not be started: {error}")
        return
    stdout, stderr = child.stdout, child.stderr
    assert stdout is not None  # noqa: S101 - asked for above
    assert stderr is not None  # noqa: S101
    said = asyncio.create_task(_tail(stderr))
    try:
        for path in paths:
            try:
                result = _parse(await stdout.readline())
            except ValueError as error:
                yield ScanResult(path, error=f"the scan printed something else: {error!s:.200}")
                return
            if result is None:
                code = await child.wait()
                yield _died(path, code, await said)
                return
            yield result
        await child.wait()
    finally:
        if child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()
        said.cancel()


def _parse(line: bytes) -> ScanResult | None:
    return ScanResult.from_json(json.loads(line)) if line.endswith(b"\n") else None


def _died(path: str, code: int, said: str) -> ScanResult:
    if code == -signal.SIGBUS:
        # What a file gives that is mapped and no longer that long: somebody saves over it.
        reason = "it was cut short while it was read"
        return ScanResult(path, completeness=Completeness.IN_FLIGHT, reason=reason)
    ending = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return ScanResult(path, error=f"the scan {ending}: {said}".rstrip(": "))


def _environment() -> dict[str, str]:
    # Without a spool, torch's entry point does nothing in the child.
    ours = {name: value for name, value in os.environ.items() if not name.startswith("GRADWATCH_")}
    return ours | _ENVIRONMENT


async def _tail(stream: asyncio.StreamReader) -> str:
    kept = b""
    while data := await stream.read(1 << 14):
        kept = (kept + data)[-_STDERR_KEPT:]
    lines = kept.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""
