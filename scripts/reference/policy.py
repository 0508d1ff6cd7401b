"""The policy's page, whose tables of settings, match keys and actions are made from the schema."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradwatch.collector.model import Cause
from gradwatch.collector.observations import Phase, Value
from gradwatch.collector.policy.keys import ACTIONS, MATCH_KEYS
from scripts.reference.settings import SETTINGS

if TYPE_CHECKING:
    import enum
    from collections.abc import Iterable, Sequence

_WORDS: dict[str, type[enum.Enum]] = {"cause": Cause, "phase": Phase, "value": Value}


def page(old: str) -> str:
    """The whole page, in Markdown.

    Args:
        old: the page, whose tables are made anew.
    """
    for name, table in (("settings", settings()), ("match keys and actions", keys_and_actions())):
        begin, end = f"<!-- {name}: made by scripts.reference -->", f"<!-- end of {name} -->"
        before, _, rest = old.partition(begin)
        old = f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}"
    return old


def settings() -> str:
    """All settings, as a Markdown table."""
    rows = [(f"`{one.name}`", one.takes, one.default, one.meaning) for one in SETTINGS]
    return _table(("key", "takes", "default", "meaning"), rows)


def keys_and_actions() -> str:
    """All match keys and actions, as a Markdown table."""
    rows = []
    for key in MATCH_KEYS:
        words = _WORDS.get(key.name)
        among = "" if words is None else ": " + ", ".join(f"`{word.value}`" for word in words)
        rows.append((f"`{key.name}`", key.takes, f"{key.meaning}{among}"))
    rows.append(("**action**", "", "**what it does**"))
    rows += [(f"`{action.value}`", "", meaning) for action, meaning in ACTIONS.items()]
    return _table(("match key", "takes", "what it is about"), rows)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))
