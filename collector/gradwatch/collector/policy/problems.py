"""What can be wrong with a policy, and with a log that one is tried on.

CollectorError
├── PolicyError   the policy file is of no use; says where and what is allowed
└── EventsError   a line of an event log cannot be read
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradwatch.collector.errors import CollectorError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong in a policy file.

    Attributes:
        file: as it was named.
        line: counts from 1, as editors do.
        key: the path of the key, such as `rules[2].match.count`; empty for the file as a whole.
        message: what is wrong, and what is allowed.
    """

    file: str
    line: int
    key: str
    message: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}"
        return f"{where}: {self.key}: {self.message}" if self.key else f"{where}: {self.message}"


class PolicyError(CollectorError):
    """A policy file is of no use.

    Args:
        problems: all that is wrong with it, in the order of the file; not empty.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class EventsError(CollectorError):
    """A line of an event log cannot be read."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A suggestion for a mistyped word, to follow it in a message; empty when nothing is near."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def listed(words: Iterable[str]) -> str:
    """Words as a list in a sentence."""
    return ", ".join(words)
