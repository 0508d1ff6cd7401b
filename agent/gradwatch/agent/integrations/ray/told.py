"""What is new in the job's status, in sentences: for runs that no launcher tells it of. Pure."""

from __future__ import annotations

import json
from typing import Any


def news(document: bytes, told: frozenset[str]) -> tuple[frozenset[str], list[str]]:
    """The verdicts, and the refusals of decisions, that have not been told.

    Args:
        document: `status.json` of the spool.
        told: the ids of those that were, from the last call.

    Returns:
        The ids with the new ones, and a line for each of these; nothing for a document that cannot be read.
    """
    try:
        status: dict[str, Any] = json.loads(document)
        run = status["run"]
        # The collector may remember earlier runs of that name.
        incidents = [one for one in status["incidents"] if one["run"] == run]
        decisions = [one for one in status["decisions"] if one["run"] == run]
        lines = {
            str(one["id"]): f"incident {one['id']}: {' '.join(one['verdict'])}"
            for one in incidents
            if one["status"] != "suspected"
        }
        lines |= {
            str(one["id"]): f"{one['action']} refused: {one['reason']}; {one['concluded']}"
            for one in decisions
            if one["outcome"] == "refused"
        }
    except (ValueError, KeyError, TypeError):
        return told, []
    new = [identifier for identifier in lines if identifier not in told]
    return told | set(new), [lines[identifier] for identifier in new]
