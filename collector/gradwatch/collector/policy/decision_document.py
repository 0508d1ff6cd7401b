"""A decision as JSON: the field names are a contract. Pure."""

from __future__ import annotations

import datetime as dt
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gradwatch.collector.policy.decision import Decision


def as_document(decision: Decision) -> dict[str, Any]:
    """The decision as in incidents, reports and `--json`. What is not known is null."""
    document: Mapping[str, Any] = asdict(decision)
    evidence = document["evidence"]
    return {
        "id": decision.id,
        "action": decision.action.value,
        "outcome": decision.outcome.value,
        "rule": decision.rule,
        "reason": decision.reason,
        "effect": decision.effect,
        "policy_hash": decision.policy_hash,
        "checkpoint": document["checkpoint"],
        "at": rfc3339(decision.at),
        "job": decision.job,
        "run": decision.run,
        "generation": decision.generation,
        "incident": decision.incident,
        "first_bad_step": decision.first_bad_step,
        "quarantine": list(decision.quarantine),
        "skip_batches": decision.skip_batches,
        "exclude_node": decision.exclude_node,
        "in_process": decision.in_process,
        "concluded": decision.concluded,
        "evidence": {
            "facts": evidence["facts"],
            "rules": [_plain(one) for one in evidence["rules"]],
            "passed_over": [_plain(one) for one in evidence["passed_over"]],
            "budgets": [_plain(one) for one in evidence["budgets"]],
        },
    }


def rfc3339(seconds: float) -> str:
    """A time in UTC."""
    return dt.datetime.fromtimestamp(seconds, tz=dt.timezone.utc).isoformat().replace("+00:00", "Z")


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: getattr(value, "value", value) for name, value in values.items()}
