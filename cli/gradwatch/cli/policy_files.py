"""Files and documents of the policy commands."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradwatch.cli.errors import CliError, UsageError
from gradwatch.collector.policy.decision_document import as_document, rfc3339
from gradwatch.collector.policy.document import guard_setting, load_policy, policy_hash
from gradwatch.collector.policy.problems import PolicyError
from gradwatch.collector.policy.sentences import explain

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gradwatch.collector.policy.model import Policy
    from gradwatch.collector.policy.problems import Problem
    from gradwatch.collector.policy.replay import Row

COLUMNS = ("at", "step", "rank", "cause", "rule", "action", "outcome", "what", "why")


def read(path: Path) -> bytes:
    """A file's content; of standard input when it is named -.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        return sys.stdin.buffer.read() if path == Path("-") else path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None


def check(path: Path) -> Policy:
    """Load a policy that is to be used.

    Raises:
        UsageError: it cannot be read, or holds errors; each is a line of the message.
    """
    try:
        return load_policy(read(path), str(path))
    except PolicyError as error:
        raise UsageError(str(complaint(error))) from None


def complaint(error: PolicyError) -> CliError:
    """All that is wrong with a policy, a line each."""
    return CliError("\ngradwatch: ".join(str(error).splitlines()))


def checked(file: Path, problems: Iterable[Problem], policy: Policy | None = None) -> dict[str, Any]:
    """What `policy check --json` prints."""
    return {
        "file": str(file),
        "valid": policy is not None,
        "policy_hash": None if policy is None else policy_hash(policy),
        "mode": None if policy is None else policy.mode.value,
        "guard": None if policy is None else guard_setting(policy),
        "checkpoints": None
        if policy is None or policy.checkpoints is None
        else {"root": policy.checkpoints.root, "layout": policy.checkpoints.layout.value},
        "says": [] if policy is None else explain(policy),
        "problems": [
            {"file": one.file, "line": one.line, "key": one.key, "message": one.message} for one in problems
        ],
    }


def row_document(row: Row) -> dict[str, Any]:
    """An incident with its decision; one about which nothing is decided says why in `reason`."""
    incident, decision = row.incident, row.answer.decision
    if decision is not None:
        return as_document(decision)
    return {
        "id": None,
        "action": None,
        "outcome": None,
        "rule": None,
        "reason": row.answer.reason,
        "silence": None if row.answer.silence is None else row.answer.silence.value,
        "at": rfc3339(incident.opened_at),
        "job": incident.attempt.job,
        "generation": incident.attempt.generation,
        "incident": incident.id,
    }


def row_cells(row: Row) -> list[object]:
    """The same, for a person."""
    incident, decision = row.incident, row.answer.decision
    first, cause = incident.verdict.first, incident.verdict.cause
    about = [
        None if first is None else first.step,
        None if first is None else first.rank,
        None if cause is None else cause.value,
    ]
    if decision is None:
        return [rfc3339(incident.opened_at), *about, None, None, None, None, row.answer.reason]
    return [
        rfc3339(decision.at),
        *about,
        decision.rule,
        decision.action.value,
        decision.outcome.value,
        decision.effect,
        decision.reason,
    ]
