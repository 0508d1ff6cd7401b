"""From YAML text to a tree of texts with their lines: the one place that knows YAML. Pure.

Nothing is resolved here: `off`, `1e3` and `2024-01-01` are texts, and the schema says what a text
means. So YAML's own ideas (`off` is false, `1:30` is ninety) never get at a policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import yaml  # type: ignore[import-untyped]

from gradwatch.collector.policy.problems import PolicyError, Problem

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_BYTES = 64 * 1024
MAX_DEPTH = 8
MAX_NODES = 10_000


@dataclass(frozen=True, slots=True)
class Scalar:
    """A text, number or word."""

    text: str
    quoted: bool
    line: int


@dataclass(frozen=True, slots=True)
class Items:
    """A list."""

    nodes: tuple[Tree, ...]
    line: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A key with its value; `line` is the key's."""

    node: Tree
    line: int


@dataclass(frozen=True, slots=True)
class Section:
    """A mapping."""

    entries: Mapping[str, Entry]
    line: int


Tree: TypeAlias = Scalar | Items | Section


def parse(source: bytes, file: str) -> Tree:
    """Read YAML, within limits of size, depth and number of nodes, and without aliases.

    Args:
        source: the file's content, UTF-8.
        file: its name, for messages.

    Raises:
        PolicyError: it is no YAML, goes beyond a limit, or has a key twice.
    """
    if len(source) > MAX_BYTES:
        raise _error(file, 1, f"the file has {len(source)} bytes; at most {MAX_BYTES} are read")
    try:
        text = source.decode()
    except UnicodeDecodeError as error:
        line = source[: error.start].count(b"\n") + 1
        raise _error(file, line, "this is not UTF-8 text") from None
    try:
        root = _Loader(text, file).get_single_node()
        if root is None:
            raise _error(file, 1, "the file is empty")
        return _tree(root, file, "")
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = 1 if mark is None else mark.line + 1
        raise _error(file, line, f"this is not YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        first, *_ = str(error).splitlines()
        raise _error(file, 1, f"this is not YAML: {first}") from None


class _Loader(yaml.BaseLoader):  # type: ignore[misc]
    """Composes nodes without giving them types, and stops at a limit before anything is built."""

    def __init__(self, text: str, file: str) -> None:
        super().__init__(text)
        self._file = file
        self._depth = 0
        self._nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            sign = "*" if isinstance(event, yaml.AliasEvent) else "&"
            raise _error(self._file, line, f"{sign}{event.anchor}: aliases are not allowed; write it out")
        if event.tag is not None and event.tag != "!":
            raise _error(self._file, line, f"{event.tag}: tags are not allowed; leave it out")
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise _error(self._file, line, f"more than {MAX_NODES} values; it must be shorter")
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _error(self._file, line, f"nested more than {MAX_DEPTH} deep; it must be flatter")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def _tree(node: Any, file: str, key: str) -> Tree:
    line = node.start_mark.line + 1
    if isinstance(node, yaml.ScalarNode):
        return Scalar(node.value, quoted=node.style is not None, line=line)
    if isinstance(node, yaml.SequenceNode):
        items = (_tree(item, file, f"{key}[{index}]") for index, item in enumerate(node.value))
        return Items(tuple(items), line)
    entries: dict[str, Entry] = {}
    for name, value in node.value:
        at = name.start_mark.line + 1
        if not isinstance(name, yaml.ScalarNode):
            raise _error(file, at, "a key must be a word", key)
        path = f"{key}.{name.value}" if key else name.value
        if name.value in entries:
            raise _error(file, at, f"the key is there twice; first in line {entries[name.value].line}", path)
        entries[name.value] = Entry(_tree(value, file, path), at)
    return Section(entries, line)


def _error(file: str, line: int, message: str, key: str = "") -> PolicyError:
    return PolicyError([Problem(file, line, key, message)])
