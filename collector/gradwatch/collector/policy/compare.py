"""Typed comparisons of whole numbers: `3`, `">=3"`, `"<10"`. Pure."""

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

OPERATORS: Mapping[str, Callable[[int, int], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_FORM = re.compile(r"(==|!=|>=|<=|>|<)?\s*([0-9]{1,15})")
_END = 10**16


@dataclass(frozen=True, slots=True)
class Comparison:
    """Compares a number with `than`."""

    sign: str
    than: int

    def __call__(self, number: int) -> bool:
        """Whether the number holds."""
        return OPERATORS[self.sign](number, self.than)

    def __str__(self) -> str:
        return f"{self.sign}{self.than}"

    def intervals(self, least: int) -> tuple[tuple[int, int], ...]:
        """The numbers that hold, of those from `least` on, as stretches with both ends in them."""
        than = self.than
        stretches = {
            "==": [(than, than)],
            "!=": [(least, than - 1), (than + 1, _END)],
            ">=": [(than, _END)],
            ">": [(than + 1, _END)],
            "<=": [(least, than)],
            "<": [(least, than - 1)],
        }[self.sign]
        return tuple((max(first, least), last) for first, last in stretches if max(first, least) <= last)

    def implies(self, other: "Comparison", least: int) -> bool:
        """Whether every number from `least` on that holds here holds there."""
        wider = other.intervals(least)
        return all(
            any(first <= low and high <= last for first, last in wider) for low, high in self.intervals(least)
        )

    def may_yet(self, number: int) -> bool:
        """Whether a number that does not hold may do so once it has grown."""
        return any(last > number for _, last in self.intervals(0)) and not self(number)


def parse_comparison(text: str) -> Comparison | None:
    """Read a comparison; None when the text is none."""
    found = _FORM.fullmatch(text.strip())
    return None if found is None else Comparison(found[1] or "==", int(found[2]))
