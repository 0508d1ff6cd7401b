"""What `gradwatch checkpoints scan` does and shows."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import typer

from gradwatch.agent.checkpoints import find, run
from gradwatch.agent.checkpoints.result import Completeness, Layout, ScanResult, StepSource
from gradwatch.cli.errors import UsageError

if TYPE_CHECKING:
    from gradwatch.agent.checkpoints.place import Place

COLUMNS = ("path", "step", "complete", "finite", "where bad")
# The first that a checkpoint tells is shown.
_SOURCES = (StepSource.CHECKPOINT, StepSource.TRAINER_STATE, StepSource.NAME, StepSource.OPTIMIZER)
_NAMED = 3


def scan_all(place: Place, layout: Layout, *, quiet: bool) -> list[ScanResult]:
    """Scan the checkpoints at a place, in a child process.

    Args:
        place: where they lie; a single one will do.
        layout: which to look for.
        quiet: no progress on stderr.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        seen = place.take()
    except OSError as error:
        raise UsageError(f"cannot read {place}: {error.strerror or error}") from error
    found = ["."] if "." in seen.files else [candidate.path for candidate in find.find(seen, layout)]
    for unread, reason in seen.unread.items():
        typer.echo(f"gradwatch: {place.address(unread)} is left out: {reason}", err=True)
    return asyncio.run(_scan([place.address(path) for path in found], quiet=quiet))


def is_bad(result: ScanResult) -> bool:
    """Whether nobody should resume from it. A save in flight may become good yet."""
    if result.completeness is Completeness.IN_FLIGHT:
        return False
    return result.finite is not True or result.completeness is not Completeness.COMPLETE


def row(result: ScanResult, place: Place) -> list[object]:
    """A checkpoint's line of the table, under `COLUMNS`."""
    steps = {step.source: step.step for step in reversed(result.steps)}
    complete = {Completeness.COMPLETE: "yes", Completeness.IN_FLIGHT: "in flight", Completeness.TORN: "torn"}
    finite = {True: "yes", False: "NO", None: None}
    return [
        result.path.removeprefix(f"{place}/"),
        next((steps[source] for source in _SOURCES if source in steps), None),
        complete.get(result.completeness) if result.completeness else None,
        finite[result.finite],
        _where(result),
    ]


async def _scan(paths: list[str], *, quiet: bool) -> list[ScanResult]:
    results: list[ScanResult] = []
    async with contextlib.aclosing(run.run_scans(paths)) as scans:
        _tell(paths, 0, quiet=quiet)
        async for result in scans:
            results.append(result)
            _tell(paths, len(results), quiet=quiet)
    return results


def _tell(paths: list[str], done: int, *, quiet: bool) -> None:
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
