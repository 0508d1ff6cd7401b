"""What the code of a forward pass reads beside its arguments: pure, but for the objects that it looks at.

By the names in its byte code: globals, variables that a function closes over, class attributes, the functions
and classes of Python that it calls, and what these read. Nothing is run and no attribute is fetched by
`getattr`: a property may do anything. What is found may be more than what is read, never much less: a
name that is made up at run time is not seen.
"""

from __future__ import annotations

import dis
import functools
import random
import sys
import types
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

# Of functions that are looked through.
MAX_FUNCTIONS = 300
_LIBRARIES = frozenset({"torch", "gradwatch", "numpy"})
# Modules of the standard library that give the same for the same; the numbers of `random` are kept.
_SAME = frozenset(
    {"__future__", "_abc", "_collections", "_collections_abc", "_functools", "_operator", "_weakref", "abc"}
    | {"ast", "base64", "bisect", "builtins", "cmath", "collections", "contextlib", "copy", "copyreg"}
    | {"dataclasses", "decimal", "enum", "fractions", "functools", "hashlib", "heapq", "inspect", "itertools"}
    | {"keyword", "logging", "math", "numbers", "operator", "pprint", "random", "re", "reprlib", "statistics"}
    | {"string", "struct", "textwrap", "traceback", "types", "typing", "unicodedata", "warnings", "weakref"}
)
# Of these, what can be set for all of a process, or for a thread.
_SETTABLE = frozenset({"decimal", "inspect", "logging", "traceback", "warnings", "weakref"})
_OUTSIDE = frozenset({"open", "input", "eval", "exec", "globals", "__import__"})
_READS = frozenset(
    {"read", "readline", "readlines", "read_text", "read_bytes", "fromfile", "memmap", "loadtxt", "load"}
    | {"genfromtxt", "urlopen"}
)
# Where the code of all modules is.
_MODULE = "torch.nn.modules.module"
_IMPORT = dis.opmap["IMPORT_NAME"]
_ALWAYS = frozenset({"forward", "__call__", "__getattr__", "__getattribute__", "__torch_function__"})


class Found(Protocol):
    """What is told of what is found."""

    def name(self, owner: str, variables: dict[str, Any], name: str) -> None:
        """A global of the module `owner` is read."""

    def cell(self, owner: str, name: str, cell: types.CellType) -> None:
        """A variable that the function `owner` closes over is read."""

    def attribute(self, owner: type, name: str) -> None:
        """A class has an attribute of this name, which is read of something."""

    def kept(self, owner: str, value: Any) -> None:
        """A function keeps a value that it may change: a default, or an attribute of its own."""

    def doubt(self, phrase: str) -> None:
        """The code does something whose result is not known to be the same again."""

    def hide(self, phrase: str) -> None:
        """The code may read something that changes with no sign that is kept."""


@dataclass
class Reach:
    """Looks through code.

    Args:
        found: is told what is found.

    Attributes:
        full: there is more code than is looked through.
        draws: some of it has the random numbers of Python's own module at hand.
    """

    found: Found
    full: bool = False
    draws: bool = False
    _names: set[str] = field(default_factory=lambda: set(_ALWAYS))
    _codes: set[tuple[types.CodeType, int]] = field(default_factory=set)
    _owners: dict[int, tuple[Any, set[str]]] = field(default_factory=dict)
    _todo: list[types.FunctionType] = field(default_factory=list)

    def add(self, value: Any) -> bool:
        """Have something looked through that can be called, or has what is called; whether it is such."""
        value = _inside(value)
        if isinstance(value, types.FunctionType):
            self._todo.append(value)
        elif isinstance(value, types.MethodType):
            self.draws = self.draws or isinstance(value.__self__, random.Random)
            self.add(value.__func__)
            self.found.kept(_full_name(value.__func__), value.__self__)
        elif isinstance(value, functools.partial):
            self.add(value.func)
            for kept in (*value.args, *value.keywords.values()):
                self.found.kept(_full_name(value.func), kept)
        elif isinstance(value, type):
            self.add_class(value)
        elif isinstance(value, types.ModuleType):
            self._add_module(value)
        elif isinstance(value, (types.BuiltinFunctionType, types.MethodWrapperType)):
            self._outside(value.__name__, getattr(value, "__module__", None))
            # `random.random` is a method of a generator that has no other name.
            if isinstance(value.__self__, random.Random):
                self.draws = True
                self.found.kept(value.__name__, value.__self__)
        else:
            return isinstance(value, (types.MethodDescriptorType, types.WrapperDescriptorType))
        return True

    def names_any(self, names: Collection[str]) -> bool:
        """Whether one of these names is in the code that was looked through."""
        return not self._names.isdisjoint(names)

    def add_class(self, cls: type) -> None:
        """Something of this class is at hand: its methods may be called."""
        for base in cls.__mro__:
            if is_library(base.__module__) or id(base) in self._owners:
                continue
            top = base.__module__.partition(".")[0]
            if top in sys.stdlib_module_names and top != "__main__":
                self._outside(base.__qualname__, top)
            else:
                self._owners[id(base)] = base, set()

    def run(self) -> None:
        """Look through all that was added, and all that it leads to."""
        before = -1
        while self._todo or before != len(self._names) + len(self._owners):
            before = len(self._names) + len(self._owners)
            while self._todo:
                self._look(self._todo.pop())
            for owner, known in list(self._owners.values()):
                self._resolve(owner, known)

    def _add_module(self, module: types.ModuleType) -> None:
        name = module.__name__
        if is_library(name) or id(module) in self._owners:
            return
        if name.partition(".")[0] in sys.stdlib_module_names and name != "__main__":
            self._outside(name, name)
        else:
            self._owners[id(module)] = module, set()

    def _outside(self, what: str, module: str | None) -> None:
        """Something of the standard library, or made of no Python code."""
        top = (module or "").partition(".")[0]
        self.draws = self.draws or top == "random"
        if top in sys.stdlib_module_names and top not in _SAME:
            self.found.doubt(f"its code uses {top if what == module else f'{top}.{what}'}")
        elif top in _SETTABLE:
            self.found.hide(f"its code uses {top}, which can be set up for the whole process")
        elif top == "builtins" and what in _OUTSIDE:
            self.found.doubt(f"its code calls {what}")

    def _resolve(self, owner: Any, known: set[str]) -> None:
        own = vars(owner)
        new = [name for name in self._names if name in own and name not in known]
        known.update(new)
        for name in new:
            value = own[name]
            if self.add(value):
                continue
            if isinstance(owner, type):
                if not name.startswith("__"):
                    self.found.attribute(owner, name)
            else:
                self.found.name(owner.__name__, own, name)

    def _look(self, function: types.FunctionType) -> None:
        code, module = function.__code__, str(function.__globals__.get("__name__", "?"))
        key = code, id(function.__closure__ and function.__closure__[0])
        if key in self._codes or is_library(module):
            return
        if len(self._codes) >= MAX_FUNCTIONS:
            self.full = True
            return
        self._codes.add(key)
        for name in _names_in(code):
            self._read(name, module, function.__globals__)
        for imported in _imports_in(code):
            if imported in sys.modules:
                self._add_module(sys.modules[imported])
            else:
                self._outside(imported, imported)
        owner = _full_name(function)
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=False):
            # One that is not assigned yet raises.
            with suppress(ValueError):
                if not self.add(cell.cell_contents):
                    self.found.cell(owner, name, cell)
        kept = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        for value in [*kept, *([vars(function)] if vars(function) else [])]:
            if not self.add(value):
                self.found.kept(owner, value)

    def _read(self, name: str, module: str, variables: dict[str, Any]) -> None:
        self._names.add(name)
        if name in variables and not self.add(variables[name]):
            self.found.name(module, variables, name)
        if name in _READS or (name in _OUTSIDE and name not in variables):
            self.found.doubt(f"its code calls {name}")


def _inside(value: Any) -> Any:
    """The function that a descriptor or a cache calls."""
    if isinstance(value, (staticmethod, classmethod)):
        return value.__func__
    if isinstance(value, property):
        return value.fget
    if isinstance(value, functools.cached_property):
        return value.func
    return value.__wrapped__ if isinstance(value, functools._lru_cache_wrapper) else value


def is_library(module: str | None) -> bool:
    """Whether a module's code gives the same for the same, for all that is known."""
    return (module or "").partition(".")[0] in _LIBRARIES


def class_names(cls: type, name: str) -> bool:
    """Whether this name is in the code of a class of modules, beside that of all modules."""
    return any(
        name in _names_in(function.__code__)
        for base in cls.__mro__
        if base.__module__ != _MODULE
        for value in vars(base).values()
        if isinstance(function := _inside(value), types.FunctionType)
    )


def _full_name(function: Any) -> str:
    return str(getattr(function, "__qualname__", type(function).__name__))


def _codes_in(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes_in(constant)


def _names_in(code: types.CodeType) -> list[str]:
    return sorted({name for one in _codes_in(code) for name in one.co_names})


def _imports_in(code: types.CodeType) -> list[str]:
    return [
        one.co_names[argument]
        for one in _codes_in(code)
        for operation, argument in zip(one.co_code[::2], one.co_code[1::2], strict=False)
        if operation == _IMPORT and argument < len(one.co_names)
    ]


def all_hooks(module: Any) -> list[Callable[..., Any]]:
    """Those of the user's that run with a module."""
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return [hook for kind in kinds for hook in (vars(module).get(kind) or {}).values()]
