"""The state of Python as at the start of a forward pass: put back where the pass is replayed.

Attributes of the user's modules, and what their code reads from outside (`reach.py`), as long as it is plain:
numbers, strings, containers of such, objects that have nothing but such. References and shallow copies, since
they are taken in every pass. What cannot be known is a doubt, in words.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import enum
import fractions
import logging
import operator
import pathlib
import random
import re
import sys
import types
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from gradwatch.agent.probe.autopsy.reach import Reach, all_hooks, is_library
from gradwatch.agent.probe.parameters import class_name, clean_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

# Of a plain container with all that it holds.
MAX_ELEMENTS = 512
MAX_ARRAY_BYTES = 4096
_MAX_TENSOR_BYTES = 1 << 16
# Of objects inside of objects.
_MAX_DEPTH = 3
_MAX_HOLDERS = 2000
_MAX_DOUBTS = 12
# How often the inventory is taken anew, because attributes have come or gone.
_MAX_INVENTORIES = 8
_IMMUTABLE = (
    *(str, bytes, int, float, complex, type(None), type(...), range, slice, enum.Enum, re.Pattern),
    *(
        pathlib.PurePath,
        datetime.date,
        datetime.time,
        datetime.timedelta,
        decimal.Decimal,
        fractions.Fraction,
    ),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, logging.Logger),
    *(types.CodeType, types.GenericAlias, types.UnionType),
)
_CONTAINERS = frozenset(
    {
        list,
        dict,
        set,
        collections.deque,
        collections.OrderedDict,
        collections.defaultdict,
        collections.Counter,
    }
)
_INTERNAL = frozenset(
    "training _parameters _buffers _modules _non_persistent_buffers_set _backward_pre_hooks _backward_hooks "
    "_is_full_backward_hook _forward_hooks _forward_hooks_with_kwargs _forward_hooks_always_called "
    "_forward_pre_hooks _forward_pre_hooks_with_kwargs _state_dict_hooks _state_dict_pre_hooks "
    "_load_state_dict_pre_hooks _load_state_dict_post_hooks _compiled_call_impl".split()
)
_NAMESPACES = (types.SimpleNamespace, argparse.Namespace)
_DROPOUT: Any = torch.nn.modules.dropout._DropoutNd
_NORMALISATION: Any = torch.nn.modules.batchnorm._NormBase
_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})
_MISSING: Any = object()


class _Held:
    """A tensor that is kept somewhere; held weakly where that would keep much memory."""

    __slots__ = ("_strong", "_version", "_weak")

    def __init__(self, tensor: torch.Tensor) -> None:
        small = tensor.grad_fn is None and tensor.numel() * tensor.element_size() <= _MAX_TENSOR_BYTES
        self._strong = tensor if small else None
        self._weak = None if small else weakref.ref(tensor)
        self._version = _version(tensor)

    def get(self) -> torch.Tensor | None:
        """The tensor; None once it is gone."""
        return self._strong if self._weak is None else self._weak()

    @property
    def is_as_it_was(self) -> bool:
        tensor = self.get()
        return tensor is not None and _version(tensor) == self._version


class _Holder:
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
            for name in [one for one in self._variables if one not in _INTERNAL and one != "forward"]:
                if name not in self.names:
                    del self._variables[name]
        for name, value in zip(self.names, values, strict=True):
            if self._variables.get(name, _MISSING) is not value:
                self._variables[name] = value

    def phrase(self, place: int, kind: str) -> str:
        """Speaks of one of the names, which holds something of this type."""
        return f"{self.where} keeps a {kind} ({self.names[place]})"


class _Attributes(_Holder):
    """Class attributes."""

    def __init__(self, key: str, cls: type, names: Sequence[str]) -> None:
        super().__init__(key, f"class {cls.__qualname__}", {}, names, whole=False)
        self._cls = cls

    def read(self) -> tuple[Any, ...]:
        own = vars(self._cls)
        return tuple(own.get(name, _MISSING) for name in self.names)

    def write(self, values: Sequence[Any]) -> None:
        for name, value, now in zip(self.names, values, self.read(), strict=True):
            if value is _MISSING:
                if now is not _MISSING:
                    type.__delattr__(self._cls, name)
            elif now is not value:
                type.__setattr__(self._cls, name, value)


class _Cell(_Holder):
    """A variable that a function closes over."""

    def __init__(self, key: str, where: str, name: str, cell: types.CellType) -> None:
        super().__init__(key, where, {}, (name,), whole=False)
        self._cell = cell

    def read(self) -> tuple[Any, ...]:
        return (self._cell.cell_contents,)

    def write(self, values: Sequence[Any]) -> None:
        if self._cell.cell_contents is not values[0]:
            self._cell.cell_contents = values[0]


class _Kept(_Holder):
    """A value that nobody can exchange, but that can change."""

    def __init__(self, key: str, where: str, value: Any) -> None:
        super().__init__(key, where, {}, ("a value",), whole=False)
        self._value = value

    def read(self) -> tuple[Any, ...]:
        return (self._value,)

    def write(self, values: Sequence[Any]) -> None:
        pass


@dataclass
class State:
    """As it was."""

    inventory: Inventory
    values: list[tuple[Any, ...]]
    contents: list[tuple[Any, Any]]
    training: list[bool]
    dropout: list[float]
    buffers: list[torch.Tensor | None]
    versions: list[int]
    generators: list[Any]
    forward: Any
    _told: list[str] | None = None

    def restore(self) -> None:
        """Put all of it back."""
        inventory = self.inventory
        for holder, values in zip(inventory.holders, self.values, strict=True):
            holder.write([_plainly(value) for value in values])
        for container, content in self.contents:
            _put_back(container, content)
        for variables, training in zip(inventory.modules, self.training, strict=True):
            variables["training"] = training
        for variables, p in zip(inventory.dropouts, self.dropout, strict=True):
            variables["p"] = p
        for (variables, name), buffer in zip(inventory.buffers, self.buffers, strict=True):
            if buffer is not None and variables.get(name) is not buffer:
                variables[name] = buffer
        for generator, state in zip(inventory.generators, self.generators, strict=True):
            _set_generator(generator, state)
        own = inventory.root
        if self.forward is not own.get("forward"):
            own.pop("forward", None)
            if self.forward is not None:
                own["forward"] = self.forward

    def doubts(self) -> list[str]:
        """What of it is not known, or cannot be put back: phrases. To be asked before `restore`."""
        if self._told is not None:
            return self._told
        inventory = self.inventory
        phrases = [*inventory.doubts]
        kept = {id(container) for container, _ in self.contents}
        for holder, values in zip(inventory.holders, self.values, strict=True):
            for place, value in enumerate(values):
                if isinstance(value, _Held) and not value.is_as_it_was:
                    phrases.append(f"{holder.where} keeps a tensor that has changed ({holder.names[place]})")
                elif not _is_known(value, kept, inventory.known):
                    phrases.append(holder.phrase(place, _kind(value)))
        for container, content in self.contents:
            for part in _parts(content):
                if isinstance(part, _Held) and not part.is_as_it_was:
                    phrases.append(f"a {_kind(container)} holds a tensor that has changed")
                elif not _is_known(part, kept, inventory.known):
                    phrases.append(f"a {_kind(container)} holds a {_kind(part)}")
        tensors = zip(inventory.buffer_names, self.buffers, self.versions, strict=True)
        for (name, harmless), buffer, version in tensors:
            if buffer is not None and not harmless() and _version(buffer) != version:
                phrases.append(f"buffer {name} was changed in place")
        phrases += [f"{name} was changed" for name, has_changed in inventory.baseline if has_changed()]
        unique = list(dict.fromkeys(phrases))
        return unique[:_MAX_DOUBTS]

    @property
    def replaced_forward(self) -> bool:
        """Whether something else ran in place of the model's own forward."""
        ran = self.forward
        if ran is None:
            return False
        own = self.inventory.forward
        return not (isinstance(ran, types.MethodType) and ran.__func__ is own)

    def plain(self) -> dict[str, Any]:
        """What of it another process of the same program can put in place of its own."""
        contents = {id(container): content for container, content in self.contents}
        inventory = self.inventory
        return {
            "names": {
                holder.key: [
                    [name, _encoded(value, contents)]
                    for name, value in zip(holder.names, values, strict=True)
                ]
                for holder, values in zip(inventory.holders, self.values, strict=True)
            },
            "training": self.training,
            "dropout": self.dropout,
            "generators": [
                state if isinstance(state, torch.Tensor) else _encoded(state, {}) for state in self.generators
            ],
        }

    def take_over(self, plain: dict[str, Any]) -> list[str]:
        """Become what another process gave by `plain`, as far as it can be; phrases of what differs."""
        self._told = self.doubts()
        inventory, names = self.inventory, plain["names"]
        if names.keys() != {holder.key for holder in inventory.holders}:
            return ["what its code reads is not the same on both ranks"]
        phrases, contents = [], []
        for number, holder in enumerate(inventory.holders):
            values = list(self.values[number])
            given = dict(map(tuple, names[holder.key]))
            if given.keys() != set(holder.names):
                phrases.append(f"{holder.where} has other attributes on the other rank")
                continue
            for place, name in enumerate(holder.names):
                tag, value = given[name]
                if tag == _SKIPPED:
                    continue
                decoded = _decoded(given[name])
                if type(values[place]) in _CONTAINERS and type(decoded) is type(values[place]):
                    # The same container, which others may hold, too.
                    contents.append((values[place], decoded))
                else:
                    values[place] = decoded
            self.values[number] = tuple(values)
        self.contents = contents
        for own, theirs in ((self.training, plain["training"]), (self.dropout, plain["dropout"])):
            if len(own) != len(theirs):
                return [*phrases, "the model has other modules on the other rank"]
            own[:] = theirs
        if len(self.generators) == len(plain["generators"]):
            self.generators = [
                state if isinstance(state, torch.Tensor) else _decoded(state) for state in plain["generators"]
            ]
        return phrases


@dataclass
class Inventory:
    """What is kept of a model in each pass.

    Attributes:
        holders: of names.
        modules: attributes of all modules, for whether each trains.
        dropouts: of those with a probability.
        buffers: where each is kept.
        buffer_names: each with what tells whether a change does not matter.
        generators: whose state is kept.
        known: ids of objects that are kept as holders.
        baseline: what tells whether something else has changed since the inventory.
        doubts: what cannot be known.
        root: attributes of the model.
        forward: of the model's class.
    """

    root: dict[str, Any]
    forward: Any
    holders: list[_Holder] = field(default_factory=list)
    modules: list[dict[str, Any]] = field(default_factory=list)
    dropouts: list[dict[str, Any]] = field(default_factory=list)
    buffers: list[tuple[dict[str, Any], str]] = field(default_factory=list)
    buffer_names: list[tuple[str, Callable[[], bool]]] = field(default_factory=list)
    generators: list[Any] = field(default_factory=list)
    known: set[int] = field(default_factory=set)
    baseline: list[tuple[str, Callable[[], bool]]] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)

    def take(self, *, strongly: bool = False) -> State:
        """The state as it is now.

        Args:
            strongly: large tensors are kept alive.

        Raises:
            KeyError: the inventory is out of date.
            ValueError: likewise.
        """
        values = [holder.read() for holder in self.holders]
        contents: list[tuple[Any, Any]] = []
        for holder, of_holder in zip(self.holders, values, strict=True):
            for place in holder.mutable:
                _copy_contents(of_holder[place], contents)
        if not strongly:
            values = [_without_tensors(of_holder) for of_holder in values]
            contents = [(container, _held(content)) for container, content in contents]
        buffers = [
            buffer if (buffer := variables[name]) is None or not buffer.requires_grad else None
            for variables, name in self.buffers
        ]
        return State(
            self,
            values,
            contents,
            [variables["training"] for variables in self.modules],
            [variables["p"] for variables in self.dropouts],
            buffers,
            [0 if buffer is None else _version(buffer) for buffer in buffers],
            [_generator_state(generator) for generator in self.generators],
            self.root.get("forward"),
        )


class StateKeeper:
    """Takes the state of one model in each pass.

    Args:
        module: gives the model.
    """

    def __init__(self, module: Callable[[], torch.nn.Module | None]) -> None:
        self._module = module
        self._inventory: Inventory | None = None
        self._taken = 0

    def take(self) -> State | None:
        """The state as it is now; None where it cannot be taken."""
        if self._inventory is not None:
            try:
                return self._inventory.take()
            except (KeyError, ValueError, IndexError):
                self._inventory = None
        module = self._module()
        if module is None or self._taken >= _MAX_INVENTORIES:
            return None
        self._taken += 1
        self._inventory = take_inventory(module)
        return self._inventory.take()


def take_inventory(module: torch.nn.Module) -> Inventory:
    """What is to be kept of a model in each pass."""
    inventory = Inventory(vars(module), getattr(type(module), "forward", None))
    _Builder(inventory).build(module)
    return inventory


class _Builder:
    """Fills an inventory."""

    def __init__(self, inventory: Inventory) -> None:
        self._inventory = inventory
        self._reach = Reach(self)
        self._globals: dict[int, tuple[str, dict[str, Any], set[str]]] = {}
        self._attributes: dict[type, set[str]] = {}
        self._values: list[tuple[str, str, Any, int]] = []
        # By id, and kept alive as long as the ids are used.
        self._seen: dict[int, Any] = {}
        self._looked_at: set[int] = set()
        self._modules: set[int] = set()

    def build(self, module: torch.nn.Module) -> None:
        """Look at a model, and at all that its code reads."""
        self._add_modules("", module)
        before = -1
        while before != len(self._inventory.holders) + len(self._seen):
            before = len(self._inventory.holders) + len(self._seen)
            self._reach.run()
            for key, where, value, depth in self._drained():
                self._value(key, where, value, depth)
        for name, variables, names in self._globals.values():
            self._hold(_Holder(f"global:{name}", f"module {name}", variables, sorted(names), whole=False))
        for cls, names in self._attributes.items():
            self._hold(_Attributes(f"class:{cls.__module__}.{cls.__qualname__}", cls, sorted(names)))
        if self._reach.full:
            self.doubt("there is too much code to be looked through")
        if len(self._inventory.holders) > _MAX_HOLDERS:
            self._inventory.holders = []
            self.doubt("there are too many objects to be kept")
        self._find_mutable()
        # Keeps nothing alive, though it and its `Reach` know one another.
        self._seen.clear()

    # ------------------------------------------------------------------ as `Found`

    def name(self, owner: str, variables: dict[str, Any], name: str) -> None:
        self._globals.setdefault(id(variables), (owner, variables, set()))[2].add(name)
        self._values.append((f"global:{owner}.{name}", f"{name} of module {owner}", variables[name], 0))

    def cell(self, owner: str, name: str, cell: types.CellType) -> None:
        if id(cell) in self._seen:
            return
        self._seen[id(cell)] = cell
        where = f"function {owner}"
        self._hold(_Cell(self._unique(f"cell:{owner}.{name}"), where, name, cell))
        self._values.append((f"cell:{owner}.{name}", f"{name} of {where}", cell.cell_contents, 0))

    def attribute(self, owner: type, name: str) -> None:
        self._attributes.setdefault(owner, set()).add(name)
        where = f"{name} of class {owner.__qualname__}"
        self._values.append((f"class:{owner.__qualname__}.{name}", where, vars(owner)[name], 0))

    def kept(self, owner: str, value: Any) -> None:
        if isinstance(value, _IMMUTABLE) or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        key, where = self._unique(f"kept:{owner}"), f"function {owner}"
        if type(value) in _CONTAINERS:
            self._hold(_Kept(key, where, value))
        self._values.append((key, where, value, 0))

    def doubt(self, phrase: str) -> None:
        if phrase not in self._inventory.doubts:
            self._inventory.doubts.append(phrase)

    # ------------------------------------------------------------------ what is found

    def _drained(self) -> list[tuple[str, str, Any, int]]:
        values, self._values = self._values, []
        return values

    def _hold(self, holder: _Holder) -> None:
        self._inventory.holders.append(holder)

    def _unique(self, key: str) -> str:
        known = sum(holder.key.startswith(key) for holder in self._inventory.holders)
        return f"{key}#{known}"

    def _add_modules(self, prefix: str, root: torch.nn.Module) -> None:
        inventory = self._inventory
        for path, module in root.named_modules():
            if id(module) in self._modules:
                continue
            self._modules.add(id(module))
            name = clean_path(f"{prefix}{path}")
            where = f"module {name} ({class_name(module)})" if name else f"the model ({class_name(module)})"
            own = vars(module)
            if "training" in own:
                inventory.modules.append(own)
            inventory.known.add(id(module))
            if isinstance(module, _DROPOUT):
                inventory.dropouts.append(own)
            scripted = isinstance(module, torch.jit.ScriptModule)
            for buffer in () if scripted else own["_buffers"]:
                inventory.buffers.append((own["_buffers"], buffer))
                inventory.buffer_names.append(
                    (f"{name}.{buffer}" if name else buffer, _is_running(module, own))
                )
            for hook in all_hooks(module):
                self._reach.add(hook)
            if scripted:
                self.doubt(f"{where} is scripted, and its attributes are not seen")
            elif is_library(type(module).__module__):
                self._of_torch(where, module)
            else:
                self._of_user(name, where, module)
            if "forward" in own:
                self._reach.add(own["forward"])

    def _of_torch(self, where: str, module: torch.nn.Module) -> None:
        own = vars(module)
        then = {
            name: value
            for name, value in own.items()
            if name not in _INTERNAL and isinstance(value, _IMMUTABLE) and name != "p"
        }

        def has_changed() -> bool:
            return any(
                own.get(name, _MISSING) != value for name, value in then.items() if own.get(name) is not value
            )

        if then:
            self._inventory.baseline.append((f"an attribute of {where}", has_changed))

    def _of_user(self, path: str, where: str, module: torch.nn.Module) -> None:
        own = vars(module)
        self._reach.add_class(type(module))
        names = [name for name in own if name not in _INTERNAL and name != "forward"]
        self._hold(_Holder(f"module:{path}", where, own, names, whole=True))
        for name in names:
            self._values.append((f"module:{path}.{name}", where, own[name], 0))

    def _value(self, key: str, where: str, value: Any, depth: int) -> None:
        """Look at something that is kept somewhere."""
        if isinstance(value, _IMMUTABLE) or id(value) in self._looked_at:
            return
        self._looked_at.add(id(value))
        self._seen[id(value)] = value
        inventory = self._inventory
        if isinstance(value, torch.nn.Module):
            self._add_modules(f"{key}.", value)
        elif isinstance(value, torch.Tensor):
            pass  # each pass sees to it
        elif type(value) in _CONTAINERS or isinstance(value, (tuple, frozenset)):
            if not _is_small(value):
                self.doubt(f"{where} keeps a large {type(value).__name__}")
                return
            parts = list(value.values()) if isinstance(value, dict) else list(value)
            for number, part in enumerate(parts):
                self._value(f"{key}[{number}]", where, part, depth)
        elif isinstance(value, (torch.Generator, random.Random)) and type(value) is not random.SystemRandom:
            inventory.generators.append(value)
            inventory.known.add(id(value))
        elif isinstance(value, weakref.ref):
            self._value(key, where, value(), depth)
        elif self._reach.add(value) or _is_array(value) or _is_harmless(value):
            inventory.known.add(id(value))
        else:
            self._object(key, where, value, depth)

    def _object(self, key: str, where: str, value: Any, depth: int) -> None:
        kind = type(value)
        own = None if _is_foreign(kind) else _attributes_of(value)
        self._inventory.known.add(id(value))
        if own is None or depth >= _MAX_DEPTH:
            self.doubt(f"{where} keeps a {_kind(value)}")
            return
        self._reach.add_class(kind)
        self._hold(_Holder(key, f"{where}, by its {_kind(value)},", own, list(own), whole=True))
        for name, part in list(own.items()):
            self._value(f"{key}.{name}", where, part, depth + 1)

    def _find_mutable(self) -> None:
        for holder in self._inventory.holders:
            for place, value in enumerate(holder.read()):
                if _may_change(value):
                    holder.mutable.append(place)


def _is_running(module: torch.nn.Module, own: dict[str, Any]) -> Callable[[], bool]:
    """Whether a change of a buffer has no part in what its module gives: running statistics in training."""
    return lambda: isinstance(module, _NORMALISATION) and own["training"]


def _is_foreign(kind: type) -> bool:
    """Whether objects of a class have state that is not in their attributes."""
    if kind in _NAMESPACES:
        return False
    tops = {base.__module__.partition(".")[0] for base in kind.__mro__ if base is not object}
    foreign = tops & sys.stdlib_module_names - {"abc", "typing", "__main__"}
    return bool(foreign) or is_library(kind.__module__)


def _attributes_of(value: Any) -> dict[str, Any] | None:
    """Where all of an object's attributes are; None where they are not all in one place."""
    if any(vars(base).get("__slots__") for base in type(value).__mro__):
        return None
    try:
        own = object.__getattribute__(value, "__dict__")
    except (AttributeError, TypeError):
        return None
    return own if type(own) is dict else None


def _is_array(value: Any) -> bool:
    """A small array of NumPy's, or one of its numbers; without importing it."""
    kind = type(value)
    if kind.__module__ != "numpy":
        return False
    if kind.__name__ == "ndarray":
        return bool(value.nbytes <= MAX_ARRAY_BYTES and value.dtype.kind != "O")
    return hasattr(value, "dtype")


def _is_harmless(value: Any) -> bool:
    """Nothing that a computation depends on."""
    module = type(value).__module__
    return module in {"typing", "torch._C._distributed_c10d", "torch.distributed.device_mesh"}


def _is_known(value: Any, kept: set[int], known: set[int]) -> bool:
    """Whether all of a value that was read is kept."""
    if isinstance(value, (*_IMMUTABLE, torch.Tensor, _Held)) or value is _MISSING or id(value) in known:
        return True
    if type(value) in _CONTAINERS:
        return id(value) in kept
    if isinstance(value, (tuple, frozenset)):
        return all(_is_known(part, kept, known) for part in value)
    # What is looked through is told of by itself.
    return isinstance(value, (types.FunctionType, types.MethodType, types.BuiltinFunctionType, type)) or (
        isinstance(value, (weakref.ref, types.ModuleType)) or _is_array(value) or _is_harmless(value)
    )


def _may_change(value: Any) -> bool:
    if type(value) in _CONTAINERS:
        return _is_small(value)
    if isinstance(value, tuple):
        return any(_may_change(part) for part in value)
    return _is_array(value) and hasattr(value, "__setitem__")


def _is_small(value: Any) -> bool:
    todo, elements, seen = [value], 0, set()
    while todo:
        one = todo.pop()
        if type(one) in _CONTAINERS or isinstance(one, (tuple, frozenset)):
            if id(one) in seen:
                continue
            seen.add(id(one))
            elements += len(one)
            if elements > MAX_ELEMENTS:
                return False
            todo += one.values() if isinstance(one, dict) else one
    return True


def _copy_contents(value: Any, contents: list[tuple[Any, Any]], depth: int = 0) -> None:
    """Shallow copies of a container and of those in it; a large one is left out, which is seen afterwards."""
    kind = type(value)
    if kind in _CONTAINERS:
        if len(value) > MAX_ELEMENTS or depth > _MAX_DEPTH + 1:
            return
        parts = value.values() if isinstance(value, dict) else value
        contents.append((value, value.copy()))
    elif kind is tuple:
        parts = value
    else:
        if _is_array(value) and hasattr(value, "__setitem__"):
            contents.append((value, value.copy()))
        return
    for part in parts:
        if not isinstance(part, (int, float, str)):
            _copy_contents(part, contents, depth + 1)


def _held(copy: Any) -> Any:
    """A copy of a container that does not keep tensors alive."""
    if type(copy) not in _CONTAINERS or _TENSORS.isdisjoint(map(type, _parts(copy))):
        return copy
    if isinstance(copy, dict):
        copy.update({key: _Held(part) for key, part in copy.items() if type(part) in _TENSORS})
        return copy
    parts = [_Held(part) if type(part) in _TENSORS else part for part in copy]
    copy.clear()
    (copy.update if isinstance(copy, set) else copy.extend)(parts)
    return copy


def _without_tensors(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if _TENSORS.isdisjoint(map(type, values)):
        return values
    return tuple(_Held(value) if type(value) in _TENSORS else value for value in values)


def _plainly(value: Any) -> Any:
    return value.get() if isinstance(value, _Held) else value


def _parts(content: Any) -> Iterable[Any]:
    if isinstance(content, dict):
        return content.values()
    return content if type(content) in _CONTAINERS else ()


def _put_back(container: Any, content: Any) -> None:
    if type(container) not in _CONTAINERS:
        container[...] = content
        return
    if isinstance(container, dict):
        parts: Any = {key: _plainly(value) for key, value in content.items()}
    else:
        parts = [_plainly(value) for value in content]
    ordered = isinstance(container, (list, collections.deque))
    container.clear()
    (container.extend if ordered else container.update)(parts)


def _kind(value: Any) -> str:
    return type(value).__name__


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _generator_state(generator: Any) -> Any:
    return generator.get_state() if isinstance(generator, torch.Generator) else generator.getstate()


def _set_generator(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    else:
        generator.setstate(state)


_SKIPPED = "skipped"
_BUILD: dict[str, Callable[[Any], Any]] = {
    "list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "dict": dict, "deque": collections.deque,
    "OrderedDict": collections.OrderedDict,
}  # fmt: skip


def _encoded(value: Any, contents: dict[int, Any]) -> list[Any]:
    """As nested lists of plain values with the names of their types."""
    value = contents.get(id(value), value)
    kind = type(value)
    if kind in {str, int, float, bool, type(None)}:
        return ["", value]
    if kind.__name__ not in _BUILD or _BUILD[kind.__name__] is not kind:
        return [_SKIPPED, None]
    parts = [list(item) for item in value.items()] if isinstance(value, dict) else [[one] for one in value]
    encoded = [[_encoded(one, contents) for one in part] for part in parts]
    if any(tag == _SKIPPED for part in encoded for tag, _ in part):
        return [_SKIPPED, None]
    return [kind.__name__, encoded]


def _decoded(encoded: list[Any]) -> Any:
    tag, value = encoded
    if not tag:
        return value
    parts = [tuple(_decoded(one) for one in part) for part in value]
    return _BUILD[tag](parts if tag in {"dict", "OrderedDict"} else [part[0] for part in parts])
