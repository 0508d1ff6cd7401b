"""By which variables a script knows its objects: the names that its author uses for them."""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import FrameType

# Code that is not the script's.
_OTHERS = ("torch", "gradwatch.agent.probe")
# Since then `f_locals` is a view of the frame, and no copy of its variables.
_VIEWS = (3, 13)
# Of a dictionary: a copy of a frame's variables that nobody but this module and the frame knows of.
_OWN_REFERENCES = 3


def names_of_variables(objects: Iterable[Any]) -> dict[int, str]:
    """The names of objects by their ids, of those that have one: of the innermost function first.

    Local variables of the functions under way, attributes of their `self`, and globals of their modules.
    """
    wanted = {id(one) for one in objects}
    names: dict[int, str] = {}
    for name, value in _variables(wanted):
        # A name that an inner function has for something else does not tell.
        if name not in names.values():
            names.setdefault(id(value), name)
    return names


def _variables(wanted: set[int]) -> Iterator[tuple[str, Any]]:
    main = sys.modules.get("__main__")
    scopes: list[dict[str, Any]] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if not any(name == other or name.startswith(f"{other}.") for other in _OTHERS):
            yield from _locals_of(frame, wanted)
            if all(frame.f_globals is not scope for scope in scopes):
                scopes.append(frame.f_globals)
        frame = frame.f_back
    for scope in [*scopes, *([vars(main)] if main is not None else [])]:
        yield from _among(scope, wanted)


def _locals_of(frame: FrameType, wanted: set[int]) -> list[tuple[str, Any]]:
    if not frame.f_code.co_flags & inspect.CO_OPTIMIZED:
        return []  # its variables are globals
    variables = frame.f_locals
    found = _among(variables, wanted)
    owner = variables.get("self")
    attributes = getattr(owner, "__dict__", None)
    if isinstance(attributes, dict):
        found += _among(attributes, wanted)
        submodules = attributes.get("_modules")
        if isinstance(submodules, dict):
            found += _among(submodules, wanted)
    if sys.version_info < _VIEWS and sys.getrefcount(variables) <= _OWN_REFERENCES:
        # The copy would keep alive what the function deletes.
        variables.clear()
    return found


def _among(scope: Any, wanted: set[int]) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in list(scope.items()) if id(value) in wanted]
