"""Names whose values are read before each pass, and put back in its replay."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

from gradwatch.agent.probe.autopsy.kept_values import MISSING

if TYPE_CHECKING:
    import types
    from collections.abc import Sequence

INTERNAL = frozenset(
    {"training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_compiled_call_impl"}
    | {"_is_full_backward_hook", "_backward_pre_hooks", "_backward_hooks", "_forward_hooks"}
    | {"_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks"}
    | {"_forward_pre_hooks_with_kwargs", "_state_dict_hooks", "_state_dict_pre_hooks"}
    | {"_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"}
)


class Holder:
    """Some names in a dictionary: attributes of a module or an object, or globals.

    Args:
        key: the same on every rank.
        where: as a phrase begins that speaks of one of the names.
        variables: the dictionary.
        names: those that are kept.
        whole: they are all that there are, but for those of torch.
    """

    def __init__(
        self, key: str, where: str, variables: dict[str, Any], names: Sequence[str], *, whole: bool
    ) -> None:
        self.key, self.where = key, where
        self._variables = variables
        self.names = tuple(names)
        self._whole = whole
        self._size = len(variables) - ("forward" in variables)
        self._get = operator.itemgetter(*names) if len(names) > 1 else None
        # Places of those that hold what can change by itself.
        self.mutable: list[int] = []

    def read(self) -> tuple[Any, ...]:
        """Their values now.

        Raises:
            KeyError: some have come or gone.
        """
        variables = self._variables
        if self._whole and len(variables) - ("forward" in variables) != self._size:
            raise KeyError(self.key)
        return self._get(variables) if self._get is not None else tuple(variables[n] for n in self.names)

    def write(self, values: Sequence[Any]) -> None:
        """Put values back."""
        if self._whole:
            for name in [one for one in self._variables if one not in INTERNAL and one != "forward"]:
                if name not in self.names:
                    del self._variables[name]
        for name, value in zip(self.names, values, strict=True):
            if self._variables.get(name, MISSING) is not value:
                self._variables[name] = value

    def phrase(self, place: int, kind: str) -> str:
        """Speaks of one of the names, which holds something of this type."""
        return f"{self.where} keeps a {kind} ({self.names[place]})"


class Attributes(Holder):
    """Class attributes."""

    def __init__(self, key: str, cls: type, names: Sequence[str]) -> None:
        super().__init__(key, f"class {cls.__qualname__}", {}, names, whole=False)
        self._cls = cls

    def read(self) -> tuple[Any, ...]:
        """See `Holder.read`."""
        own = vars(self._cls)
        return tuple(own.get(name, MISSING) for name in self.names)

    def write(self, values: Sequence[Any]) -> None:
        """See `Holder.write`."""
        for name, value, now in zip(self.names, values, self.read(), strict=True):
            if value is MISSING:
                if now is not MISSING:
                    type.__delattr__(self._cls, name)
            elif now is not value:
                type.__setattr__(self._cls, name, value)


class Cell(Holder):
    """A variable that a function closes over."""

    def __init__(self, key: str, where: str, name: str, cell: types.CellType) -> None:
        super().__init__(key, where, {}, (name,), whole=False)
        self._cell = cell

    def read(self) -> tuple[Any, ...]:
        """See `Holder.read`."""
        return (self._cell.cell_contents,)

    def write(self, values: Sequence[Any]) -> None:
        """See `Holder.write`."""
        if self._cell.cell_contents is not values[0]:
            self._cell.cell_contents = values[0]


class Kept(Holder):
    """A value that nobody can exchange, but that can change."""

    def __init__(self, key: str, where: str, value: Any) -> None:
        super().__init__(key, where, {}, ("a value",), whole=False)
        self._value = value

    def read(self) -> tuple[Any, ...]:
        """See `Holder.read`."""
        return (self._value,)

    def write(self, values: Sequence[Any]) -> None:
        """See `Holder.write`."""
