"""Have each file that Python opens told, for as long as that is of use: `open` and `os.open` are wrapped.

An audit hook (PEP 578) would be told of each as well, but can never be removed: the job would call it for
all that Python audits until its end.
"""

from __future__ import annotations

import functools
import importlib
import io
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

# Where they are called from; the last two have names of their own for the first.
_PLACES = (
    ("builtins", "open"),
    ("io", "open"),
    ("os", "open"),
    ("tarfile", "bltn_open"),
    ("bz2", "_builtin_open"),
)


class OpenedFiles:
    """Tells what is opened.

    Args:
        told: called with what is given as the path, before it is opened; must not raise.
    """

    def __init__(self, told: Callable[[Any], object]) -> None:
        self._told = told
        self._open = _Wrapped(io.open, "io", "open", self._tell)
        self._os_open = _Wrapped(os.open, "os", "open", self._tell)
        self._is_over = False

    def begin(self) -> None:
        """Tell from now on."""
        own = {id(io.open): self._open, id(os.open): self._os_open}
        for module, name in _PLACES:
            variables = vars(sys.modules[module]) if module in sys.modules else {}
            if name in variables and id(variables[name]) in own:
                variables[name] = own[id(variables[name])]

    def end(self) -> None:
        """Tell no more, and leave everything as it was; but for what others have put around ours."""
        self._is_over = True
        for module, name in _PLACES:
            variables = vars(sys.modules[module]) if module in sys.modules else {}
            if isinstance(ours := variables.get(name), _Wrapped) and ours in (self._open, self._os_open):
                variables[name] = ours.original

    def _tell(self, path: Any) -> None:
        if not self._is_over:
            self._told(path)


class _Wrapped:
    """A built-in function: unlike one that is written in Python it becomes no method where a class has it."""

    def __init__(self, original: Any, module: str, name: str, tell: Callable[[Any], object]) -> None:
        functools.update_wrapper(self, original)
        self.original, self._place, self._tell = original, (module, name), tell

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._tell(args[0] if args else kwargs.get("file", kwargs.get("path")))
        return self.original(*args, **kwargs)

    def __deepcopy__(self, memo: Any) -> _Wrapped:
        return self

    def __reduce__(self) -> Any:
        return _found, self._place


def _found(module: str, name: str) -> Any:
    """The function in another process."""
    return getattr(importlib.import_module(module), name)
