"""Make the table of values in the chart's README from its values; with --check say whether it is up to date.

usage: python -m scripts.chart_readme [--check]
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from collections.abc import Iterator

CHART = Path(__file__).parents[1] / "helm" / "gradwatch"
BEGIN = "<!-- begin of what scripts.chart_readme makes -->\n"
END = "<!-- end of what scripts.chart_readme makes -->\n"
_KEY = re.compile(r"(?P<indent> *)(?P<key>[A-Za-z]+):")
_COMMENT = re.compile(r" *# (?P<text>.*)")


def main() -> int:
    """Write the README, or compare it."""
    path = CHART / "README.md"
    old = path.read_text()
    new = with_table(old, table(CHART))
    if "--check" in sys.argv[1:]:
        if new == old:
            return 0
        print(f"{path} is not what values.yaml gives; run: python -m scripts.chart_readme", file=sys.stderr)
        return 1
    path.write_text(new)
    return 0


def with_table(readme: str, made: str) -> str:
    """The README with another table between its marks."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{made}{END}{after}"


def table(chart: Path) -> str:
    """One row for each value.

    Raises:
        ValueError: a value has no comment, or is not in the schema.
    """
    text = (chart / "values.yaml").read_text()
    schema = json.loads((chart / "values.schema.json").read_text())
    comments = comments_of(text)
    rows = ["| value | takes | default | |", "| --- | --- | --- | --- |"]
    for path, value, takes in _leaves(yaml.safe_load(text), schema, schema, ()):
        name = ".".join(path)
        if not comments.get(path):
            raise ValueError(f"values.yaml: there is no comment above {name}")
        default = json.dumps(value, separators=(", ", ": ")) if value or value is False else ""
        default = f"`{value}`" if isinstance(value, str) and value else default and f"`{default}`"
        rows.append(f"| `{name}` | {takes} | {default} | {comments[path]} |")
    return "\n".join(rows) + "\n"


def comments_of(text: str) -> dict[tuple[str, ...], str]:
    """The comment right above each key."""
    found: dict[tuple[str, ...], str] = {}
    path: list[tuple[int, str]] = []
    comment: list[str] = []
    for line in text.splitlines():
        if match := _COMMENT.fullmatch(line):
            comment.append(match["text"])
            continue
        if match := _KEY.match(line):
            indent = len(match["indent"])
            path = [*(one for one in path if one[0] < indent), (indent, match["key"])]
            found[tuple(key for _, key in path)] = " ".join(comment)
        comment = []
    return found


def _leaves(
    values: dict[str, Any], schema: dict[str, Any], root: dict[str, Any], path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Any, str]]:
    for key, value in values.items():
        here = (*path, key)
        if key not in schema["properties"]:
            raise ValueError(f"values.schema.json: there is no {'.'.join(here)}")
        one = _resolved(schema["properties"][key], root)
        if isinstance(value, dict) and "properties" in one and here != ("resources",):
            yield from _leaves(value, one, root, here)
        else:
            yield here, value, _takes(one, root)


def _resolved(schema: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    name = schema.get("$ref", "").removeprefix("#/definitions/")
    found: dict[str, Any] = root["definitions"][name] if name else schema
    return found


def _takes(schema: dict[str, Any], root: dict[str, Any]) -> str:
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    kind = {"object": "a map", "array": "a list", "boolean": "`true`, `false`", "string": "text"}.get(
        schema["type"], "a number"
    )
    items = schema.get("items")
    strings = items is not None and _resolved(items, root).get("type") == "string"
    low, high = schema.get("minimum"), schema.get("maximum")
    if kind == "a number" and low is not None:
        return f"{low} to {high}" if high is not None else f"from {low} on"
    return "a list of texts" if strings else kind


if __name__ == "__main__":
    sys.exit(main())
