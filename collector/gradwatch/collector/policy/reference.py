"""The reference's table of match keys and actions, as docs/policy.md has it. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradwatch.collector.model import Cause
from gradwatch.collector.observations import Phase, Value
from gradwatch.collector.policy.keys import ACTIONS, MATCH_KEYS

if TYPE_CHECKING:
    import enum
    from collections.abc import Sequence

BEGIN = "<!-- begin of what gradwatch.collector.policy.reference makes -->"
END = "<!-- end of what gradwatch.collector.policy.reference makes -->"

_WORDS: dict[str, type[enum.Enum]] = {"cause": Cause, "phase": Phase, "value": Value}


def table() -> str:
    """All match keys and actions, as a Markdown table."""
    rows = [("match key", "takes", "what it is about")]
    for key in MATCH_KEYS:
        words = _WORDS.get(key.name)
        among = "" if words is None else ": " + ", ".join(f"`{word.value}`" for word in words)
        rows.append((f"`{key.name}`", key.takes, f"{key.meaning}{among}"))
    rows.append(("**action**", "", "**what it does**"))
    rows += [(f"`{action.value}`", "", meaning) for action, meaning in ACTIONS.items()]
    header, *body = (_row(row) for row in rows)
    return "\n".join([header, _row(["---"] * 3), *body])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
