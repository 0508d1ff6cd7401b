"""A recorded history: the JSON lines of `gradwatch events JOB --json`, read back. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from gradwatch.collector import observations as obs
from gradwatch.collector.policy.problems import EventsError
from gradwatch.collector.schema import EventDocument

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_KINDS: Mapping[str, type] = {
    "hello": obs.Hello,
    "model": obs.ModelSeen,
    "nonfinite": obs.NonFinite,
    "checkpoint": obs.CheckpointSeen,
    "fault": obs.Fault,
    "unwatched": obs.Unwatched,
    "launch_started": obs.LaunchStarted,
    "launch_ended": obs.LaunchEnded,
    "skipped": obs.Skipped,
    "guard_off": obs.GuardOff,
    "command_started": obs.CommandStarted,
    "command_stopped": obs.CommandStopped,
    "checkpoint_root": obs.CheckpointRoot,
    "checkpoint_scanned": obs.CheckpointScanned,
    "checkpoint_gone": obs.CheckpointGone,
    "task_done": obs.TaskDone,
    "loaded": obs.Loaded,
    "can_load": obs.CanLoad,
    "progress": obs.Progress,
}
_BODIES: Mapping[str, TypeAdapter[Any]] = {kind: TypeAdapter(body) for kind, body in _KINDS.items()}


@dataclass(frozen=True, slots=True)
class Logged:
    """One line of the log: a journal's record, or how far its process had come.

    Attributes:
        seq: the record's; below 0 for a progress.
        at: the record's own time; None when it is not known.
        received_at: the collector's time when it arrived, in seconds since the epoch; what
            shares it arrived in one report.
    """

    id: int
    job: str
    incarnation: str
    seq: int
    at: float | None
    received_at: float
    body: obs.Body | obs.Progress


@dataclass(frozen=True, slots=True)
class Log:
    """A recorded history, in order of arrival; records of a kind that is not known are only counted."""

    events: tuple[Logged, ...]
    unknown_kinds: tuple[str, ...] = ()


def read_log(lines: Iterable[str], file: str) -> Log:
    """Read a log.

    Args:
        lines: one JSON object each; empty ones are passed over.
        file: its name, for messages.

    Raises:
        EventsError: a line is no event.
    """
    events: list[Logged] = []
    unknown: set[str] = set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            document = EventDocument.model_validate_json(line)
            if document.kind not in _BODIES:
                unknown.add(document.kind)
                continue
            body = _BODIES[document.kind].validate_json(json.dumps(document.body))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise EventsError(
                f"{file}:{number}: this is no line of `gradwatch events JOB --json`: "
                f"{where + ': ' if where else ''}{first['msg']}"
            ) from None
        at = None if document.at is None else document.at.timestamp()
        received_at = document.received_at.timestamp()
        where_from = (document.id, document.job, document.incarnation, document.seq)
        events.append(Logged(*where_from, at, received_at, body))
    return Log(tuple(sorted(events, key=lambda one: one.id)), tuple(sorted(unknown)))
