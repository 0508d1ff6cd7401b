"""Typed reading of a tree: each value is what the schema says, or a problem is noted. Pure."""

from __future__ import annotations

import re
import textwrap
from typing import TYPE_CHECKING, TypeVar

from gradwatch.collector.policy.compare import parse_comparison
from gradwatch.collector.policy.keys import COMPARISON
from gradwatch.collector.policy.problems import Problem, listed, nearest
from gradwatch.collector.policy.text import Entry, Items, Scalar, Section

if TYPE_CHECKING:
    import enum
    from collections.abc import Collection, Iterable

    from gradwatch.collector.policy.compare import Comparison
    from gradwatch.collector.policy.text import Tree

    _E = TypeVar("_E", bound=enum.Enum)

DURATION = 'a duration such as "90s", "30m", "24h" or "7d"'
_INTEGER = re.compile(r"-?[0-9]{1,15}")
_DURATION = re.compile(r"([0-9]{1,9})([smhd])")
# Of a value that is no good, so many characters.
_SHOWN = 60
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Fields:
    """The keys of one section, read one by one; `finish` notes the keys that nobody asked for.

    Args:
        file: its name.
        path: the section's key; empty for the top.
        tree: what is there; None when nothing is.
        line: where the section is, or would be.
        problems: are added to.
    """

    def __init__(self, file: str, path: str, tree: Tree | None, line: int, problems: list[Problem]) -> None:
        self.file = file
        self.path = path
        self.line = line
        self.problems = problems
        self._asked: list[str] = []
        self._entries = dict(tree.entries) if isinstance(tree, Section) else {}
        if not (tree is None or isinstance(tree, Section)):
            self.note(tree.line, "", f"must be a section with keys, not {_kind(tree)}")

    def note(self, line: int, key: str, message: str) -> None:
        """Note what is wrong at a key of this section; at the section itself when it is empty."""
        path = ".".join(part for part in (self.path, key) if part)
        self.problems.append(Problem(self.file, line, path, message))

    def line_of(self, key: str) -> int:
        """Where a key is; the section when it is not there."""
        entry = self._entries.get(key)
        return self.line if entry is None else entry.line

    def has(self, key: str) -> bool:
        """Whether the key is there."""
        return key in self._entries

    def finish(self) -> None:
        """Note the keys that are not known."""
        for name, entry in self._entries.items():
            if name not in self._asked:
                hint = nearest(name, self._asked)
                self.note(entry.line, name, f"unknown key{hint}; allowed are {listed(sorted(self._asked))}")

    # ------------------------------------------------------------ values

    def text(self, key: str, *, required: bool = False) -> str | None:
        """A text that is not empty."""
        scalar = self._scalar(key, "a text", required=required)
        if scalar is not None and not scalar.text.strip():
            self.note(scalar.line, key, "must not be empty")
            return None
        return None if scalar is None else scalar.text

    def texts(self, key: str, takes: str) -> tuple[str, ...] | None:
        """A text or a list of texts."""
        scalars = self._scalars(key, takes)
        return None if scalars is None else tuple(scalar.text for scalar in scalars)

    def word(self, key: str, kind: type[_E], default: _E, *, without: Collection[_E] = ()) -> _E:
        """One word of an enum."""
        scalar = self._scalar(key, _one_of(kind, without))
        found = None if scalar is None else self._member(key, scalar, kind, without)
        return default if found is None else found

    def required_word(self, key: str, kind: type[_E], *, without: Collection[_E] = ()) -> _E | None:
        """One word of an enum, that must be there."""
        scalar = self._scalar(key, _one_of(kind, without), required=True)
        return None if scalar is None else self._member(key, scalar, kind, without)

    def words(self, key: str, kind: type[_E]) -> tuple[_E, ...] | None:
        """One word of an enum or a list of them, in the enum's order."""
        scalars = self._scalars(key, f"{_one_of(kind)}, or a list of these")
        if scalars is None:
            return None
        found = {self._member(key, scalar, kind) for scalar in scalars}
        return tuple(member for member in kind if member in found) or None

    def integer(self, key: str, least: int, *, most: int | None = None, required: bool = False) -> int | None:
        """A whole number within bounds."""
        takes = f"a whole number from {least} {'on' if most is None else f'to {most}'}"
        scalar = self._scalar(key, takes, required=required)
        if scalar is None:
            return None
        number = int(scalar.text) if _INTEGER.fullmatch(scalar.text) and not scalar.quoted else None
        if number is None or number < least or (most is not None and number > most):
            self.note(scalar.line, key, f"must be {takes}, not {_shown(scalar)}")
            return None
        return number

    def boolean(self, key: str) -> bool | None:
        """True or false."""
        scalar = self._scalar(key, "true or false")
        if scalar is None:
            return None
        if scalar.quoted or scalar.text not in {"true", "false"}:
            self.note(scalar.line, key, f"must be true or false, not {_shown(scalar)}")
            return None
        return scalar.text == "true"

    def comparison(self, key: str) -> Comparison | None:
        """A comparison of a number."""
        scalar = self._scalar(key, COMPARISON)
        found = None if scalar is None else parse_comparison(scalar.text)
        if scalar is not None and found is None:
            self.note(
                scalar.line,
                key,
                f"must be {COMPARISON}, not {_shown(scalar)}; the signs are == != >= <= > <",
            )
        return found

    def duration(self, key: str) -> int | None:
        """A duration in seconds."""
        scalar = self._scalar(key, DURATION)
        if scalar is None:
            return None
        found = _DURATION.fullmatch(scalar.text)
        if found is None or int(found[1]) == 0:
            self.note(scalar.line, key, f"must be {DURATION}, not {_shown(scalar)}")
            return None
        return int(found[1]) * _SECONDS[found[2]]

    # ------------------------------------------------------------ parts

    def section(self, key: str) -> Fields | None:
        """A section below; None when it is not there."""
        entry = self._take(key)
        if entry is None:
            return None
        return Fields(self.file, self._below(key), entry.node, entry.line, self.problems)

    def sections(self, key: str) -> list[Fields] | None:
        """A list of sections; None when it is not there."""
        entry = self._take(key)
        if entry is None:
            return None
        if not isinstance(entry.node, Items):
            self.note(entry.line, key, f"must be a list, not {_kind(entry.node)}")
            return []
        return [
            Fields(self.file, f"{self._below(key)}[{index}]", node, node.line, self.problems)
            for index, node in enumerate(entry.node.nodes)
        ]

    def _below(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def _take(self, key: str) -> Entry | None:
        self._asked.append(key)
        return self._entries.get(key)

    def _scalar(self, key: str, takes: str, *, required: bool = False) -> Scalar | None:
        entry = self._take(key)
        if entry is None:
            if required:
                self.note(self.line, key, f"is missing; it must be {takes}")
            return None
        if not isinstance(entry.node, Scalar):
            self.note(entry.line, key, f"must be {takes}, not {_kind(entry.node)}")
            return None
        return entry.node

    def _scalars(self, key: str, takes: str) -> tuple[Scalar, ...] | None:
        entry = self._take(key)
        if entry is None:
            return None
        nodes = entry.node.nodes if isinstance(entry.node, Items) else (entry.node,)
        scalars = tuple(node for node in nodes if isinstance(node, Scalar) and node.text.strip())
        if len(scalars) < len(nodes) or not scalars:
            self.note(entry.line, key, f"must be {takes}, and not empty")
            return None
        return scalars

    def _member(self, key: str, scalar: Scalar, kind: type[_E], without: Collection[_E] = ()) -> _E | None:
        allowed = {member.value: member for member in kind if member not in without}
        found = allowed.get(scalar.text)
        if found is None:
            hint = nearest(scalar.text, allowed)
            message = f"must be {_one_of(kind, without)}, not {_shown(scalar)}{hint}"
            self.note(scalar.line, key, message)
        return found


def _one_of(kind: type[_E], without: Collection[_E] = ()) -> str:
    words: Iterable[str] = (member.value for member in kind if member not in without)
    return f"one of {listed(words)}"


def _kind(tree: Tree) -> str:
    if isinstance(tree, Scalar):
        return _shown(tree)
    return "a list" if isinstance(tree, Items) else "a section with keys"


def _shown(scalar: Scalar) -> str:
    text = textwrap.shorten(scalar.text, _SHOWN)
    return f'"{text}"' if scalar.quoted else text or "nothing"
