"""What `gradwatch checkpoints scan` does and shows."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING

import typer

from gradwatch.agent.checkpoints import find, listing, run
from gradwatch.agent.checkpoints.result import Completeness, Layout, ScanResult, StepSource
from gradwatch.cli.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

COLUMNS = ("path", "step", "complete", "finite", "where bad")
# The first that a checkpoint tells is shown.
_SOURCES = (StepSource.CHECKPOINT, StepSource.TRAINER_STATE, StepSource.NAME, StepSource.OPTIMIZER)
_NAMED = 3


def scan_all(folder: Path, layout: Layout, *, quiet: bool) -> list[ScanResult]:
    """Scan the checkpoints under a folder, in a child process.

    Args:
        folder: where they lie; a single one will do.
        layout: which to look for.
        quiet: no progress on stderr.

    Raises:
        UsageError: the folder cannot be read.
    """
    try:
        paths = [folder]
        if not folder.is_file():
            seen = listing.take(folder)
            paths = [folder / candidate.path for candidate in find.find(seen, layout)]
            for unread, reason in seen.unread.items():
                typer.echo(f"gradwatch: {folder / unread} is left out: {reason}", err=True)
    except OSError as error:
        raise UsageError(f"cannot read {folder}: {error.strerror or error}") from error
    return asyncio.run(_scan(paths, quiet=quiet))


def is_bad(result: ScanResult) -> bool:
    """Whether nobody should resume from it. A save in flight may become good yet."""
    if result.completeness is Completeness.IN_FLIGHT:
        return False
    return result.finite is not True or result.completeness is not Completeness.COMPLETE


def row(result: ScanResult, folder: Path) -> list[object]:
    """A checkpoint's line of the table, under `COLUMNS`."""
    steps = {step.source: step.step for step in reversed(result.steps)}
    complete = {Completeness.COMPLETE: "yes", Completeness.IN_FLIGHT: "in flight", Completeness.TORN: "torn"}
    finite = {True: "yes", False: "NO", None: None}
    return [
        os.path.relpath(result.path, folder) if folder.is_dir() else result.path,
        next((steps[source] for source in _SOURCES if source in steps), None),
        complete.get(result.completeness) if result.completeness else None,
        finite[result.finite],
        _where(result),
    ]


async def _scan(paths: list[Path], *, quiet: bool) -> list[ScanResult]:
    results: list[ScanResult] = []
    async with contextlib.aclosing(run.run_scans(paths)) as scans:
        _tell(paths, 0, quiet=quiet)
        async for result in scans:
            results.append(result)
            _tell(paths, len(results), quiet=quiet)
    return results


def _tell(paths: list[Path], done: int, *, quiet: bool) -> None:
    if not quiet and done < len(paths):
        typer.echo(f"scanning {done + 1} of {len(paths)}: {paths[done]}", err=True)


def _where(result: ScanResult) -> str | None:
    if result.error is not None:
        return result.error
    if result.completeness is not Completeness.COMPLETE:
        return result.reason
    named = [
        f"{bad.section.value} {bad.name}: {bad.count} {bad.value}"
        for bad in sorted(result.nonfinite, key=lambda bad: bad.section.value == "buffers")
    ]
    more = sum(count.nonfinite_tensors for count in result.sections.values()) - _NAMED
    if named:
        return "; ".join(named[:_NAMED] + ([f"and {more} more"] if more > 0 else []))
    return next((f"{item.file}: {item.reason}" for item in result.unreadable if item.judged), None)
