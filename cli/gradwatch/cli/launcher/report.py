"""The report of a run: what `--report FILE` writes when the job has ended."""

from __future__ import annotations

import dataclasses
import enum
import json
from typing import TYPE_CHECKING, Any

from gradwatch.agent.sidecar.cursor import replace_file

if TYPE_CHECKING:
    from pathlib import Path

    from gradwatch.cli.launcher.job_view import JobView
    from gradwatch.cli.launcher.watch import Coverage


class EndedBy(str, enum.Enum):
    """What ended a run. Tells an exit code of ours from the same one of the command's."""

    COMMAND = "command"
    SIGNAL = "signal"
    NOT_FOUND = "not_found"
    NOT_EXECUTABLE = "not_executable"
    REQUIRE_WATCH = "require_watch"
    ROLLBACK_DUE = "rollback_due"
    HALTED = "halted"


@dataclasses.dataclass(frozen=True)
class Ending:
    """How a run ended: the launcher's exit code, and what decided it."""

    exit_code: int
    ended_by: EndedBy


def build(
    job: str,
    ending: Ending,
    covered: Coverage,
    view: JobView | None,
    warnings: list[str],
    *,
    generation: int = 0,
    exclude_node: str | None = None,
    resume: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The report as a JSON document.

    Args:
        job: the job's name.
        ending: how the run ended.
        covered: how much was watched.
        view: the job as the collector saw it; None when it never answered.
        warnings: all that were said.
        generation: in which the command ran last.
        exclude_node: the host to leave out when the job is started again.
        resume: what the command was last told to resume; None when it was told nothing.
    """
    return {
        "job": job,
        "exit_code": ending.exit_code,
        "ended_by": ending.ended_by.value,
        "generations": max(generation + 1, 1 if view is None else view.generations),
        "attempts": 1 if view is None else view.attempts,
        "ranks_watched": covered.watched,
        "world_size": covered.world_size,
        "incidents": [] if view is None else list(view.incidents),
        "incidents_left_out": 0 if view is None else view.incidents_left_out,
        "decisions": [] if view is None else list(view.decisions),
        "exclude_node": exclude_node,
        "resume": resume,
        "overhead": {} if view is None else view.overhead,
        "warnings": warnings,
    }


def resumed_by_controller(view: JobView | None) -> dict[str, Any] | None:
    """What `resume` is when a framework's controller took the orders; None when there was no rollback."""
    for decision in reversed(() if view is None else view.decisions):
        performed = decision["action"] == "rollback" and decision["outcome"] == "performed"
        if performed and decision["checkpoint"] is not None and not decision["in_process"]:
            generation = decision["generation"] + 1
            honoured = None if view is None else view.has_resumed(generation)
            return {**decision["checkpoint"], "generation": generation, "honoured": honoured}
    return None


def write(path: Path, document: dict[str, Any]) -> None:
    """Replace the file in one step.

    Raises:
        OSError: it cannot be written.
    """
    replace_file(path, (json.dumps(document, indent=2) + "\n").encode())
