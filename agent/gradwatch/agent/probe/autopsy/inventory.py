"""What is to be kept of a model's state in each pass: looked up once, and anew when attributes come or go."""

from __future__ import annotations

import argparse
import enum
import logging
import random
import sys
import types
import weakref
from typing import TYPE_CHECKING, Any

import torch

from gradwatch.agent.probe.autopsy.holders import INTERNAL, Attributes, Cell, Holder, Kept
from gradwatch.agent.probe.autopsy.kept_values import (
    CONTAINERS,
    IMMUTABLE,
    MISSING,
    is_array,
    is_harmless,
    is_small,
    kind,
    may_change,
)
from gradwatch.agent.probe.autopsy.python_state import Inventory, State
from gradwatch.agent.probe.autopsy.reach import Reach, all_hooks, class_names, is_library
from gradwatch.agent.probe.parameters import class_name, clean_path

if TYPE_CHECKING:
    from collections.abc import Callable

# Of objects inside of objects.
_MAX_DEPTH = 3
# Of objects that are looked into.
_MAX_OBJECTS = 200
# Of names outside of modules, among which a container counts as so many: reading them takes some 10 us.
_MAX_NAMES = 256
_WEIGHT = 8
# How often the inventory is taken anew, because attributes have come or gone.
_MAX_INVENTORIES = 8
# Code with such a name may ask a layer whether it trains, or tell it.
_TRAINING = frozenset({"training", "train", "eval"})
# Code with such a name asks torch how it is set up, or sets it up.
_SETTINGS = frozenset(
    {"get_default_dtype", "set_default_dtype", "get_default_device", "set_default_device"}
    | {"set_flush_denormal", "backends", "use_deterministic_algorithms"}
)
_OF_ENUMS = frozenset({"_value_", "_name_", "__objclass__", "_sort_order_"})
_NAMESPACES = (types.SimpleNamespace, argparse.Namespace)
_DROPOUT: Any = torch.nn.modules.dropout._DropoutNd
_NORMALISATION: Any = torch.nn.modules.batchnorm._NormBase


class StateKeeper:
    """Takes the state of one model in each pass.

    Args:
        module: gives the model.
    """

    def __init__(self, module: Callable[[], torch.nn.Module | None]) -> None:
        self._module = module
        self._inventory: Inventory | None = None
        self._taken = 0

    def forget(self) -> None:
        """Keep nothing of the model: an inventory holds what its code reads, and so may keep it alive."""
        self._inventory, self._taken = None, 0

    @property
    def draws(self) -> bool:
        """Whether the model may draw from Python's random numbers, for all that is known of its code."""
        return self._inventory is None or self._inventory.draws

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
        # Attributes of those of torch that do the same whether they train or not.
        self._indifferent: list[dict[str, Any]] = []
        self._of_classes: dict[type, bool] = {}
        self._of_modules: set[str] = set()
        self._objects = 0

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
            self._hold(Holder(f"global:{name}", f"module {name}", variables, sorted(names), whole=False))
        for cls, names in self._attributes.items():
            self._hold(Attributes(f"class:{cls.__module__}.{cls.__qualname__}", cls, sorted(names)))
        if self._reach.full:
            self.doubt("there is too much code to be looked through")
        self._find_mutable()
        outside = [one for one in self._inventory.holders if one.key not in self._of_modules]
        if sum(len(one.names) + _WEIGHT * len(one.mutable) for one in outside) > _MAX_NAMES:
            self._inventory.holders = [one for one in self._inventory.holders if one.key in self._of_modules]
            self.doubt("its code reads more than is kept in each pass")
        if self._inventory.doubts or self._reach.names_any(_TRAINING):
            self._inventory.modules += self._indifferent
        self._find_hidden(module)
        # What is not known may draw, too.
        self._inventory.draws = self._reach.draws or bool(self._inventory.doubts)
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
        self._hold(Cell(self._unique(f"cell:{owner}.{name}"), where, name, cell))
        self._values.append((f"cell:{owner}.{name}", f"{name} of {where}", cell.cell_contents, 0))

    def attribute(self, owner: type, name: str) -> None:
        self._attributes.setdefault(owner, set()).add(name)
        where = f"{name} of class {owner.__qualname__}"
        self._values.append((f"class:{owner.__qualname__}.{name}", where, vars(owner)[name], 0))

    def kept(self, owner: str, value: Any) -> None:
        if isinstance(value, IMMUTABLE) or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        key, where = self._unique(f"kept:{owner}"), f"function {owner}"
        if type(value) in CONTAINERS:
            self._hold(Kept(key, where, value))
        self._values.append((key, where, value, 0))

    def doubt(self, phrase: str) -> None:
        if phrase not in self._inventory.doubts:
            self._inventory.doubts.append(phrase)

    def hide(self, phrase: str) -> None:
        if phrase not in self._inventory.hidden:
            self._inventory.hidden.append(phrase)

    # ------------------------------------------------------------------ what is found

    def _drained(self) -> list[tuple[str, str, Any, int]]:
        values, self._values = self._values, []
        return values

    def _hold(self, holder: Holder) -> None:
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
                (inventory.modules if self._may_train(module) else self._indifferent).append(own)
            inventory.known.add(id(module))
            if isinstance(module, _DROPOUT):
                inventory.dropouts.append(own)
            scripted = isinstance(module, torch.jit.ScriptModule)
            for buffer in () if scripted else own["_buffers"]:
                inventory.buffers.append((own["_buffers"], buffer))
                inventory.sampled.append(not isinstance(module, _NORMALISATION))
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

    def _may_train(self, module: torch.nn.Module) -> bool:
        """Whether a module may do something else when it trains."""
        cls = type(module)
        if not is_library(cls.__module__) or all_hooks(module) or "forward" in vars(module):
            return True
        if cls not in self._of_classes:
            self._of_classes[cls] = class_names(cls, "training")
        return self._of_classes[cls]

    def _of_torch(self, where: str, module: torch.nn.Module) -> None:
        own = vars(module)
        then = {
            name: value
            for name, value in own.items()
            if name not in INTERNAL and isinstance(value, IMMUTABLE) and name != "p"
        }

        def has_changed() -> bool:
            return any(
                own.get(name, MISSING) != value for name, value in then.items() if own.get(name) is not value
            )

        if then:
            self._inventory.baseline.append((f"an attribute of {where}", has_changed))

    def _of_user(self, path: str, where: str, module: torch.nn.Module) -> None:
        own = vars(module)
        self._reach.add_class(type(module))
        names = [name for name in own if name not in INTERNAL and name != "forward"]
        self._hold(Holder(f"module:{path}", where, own, names, whole=True))
        self._of_modules.add(f"module:{path}")
        for name in names:
            self._values.append((f"module:{path}.{name}", where, own[name], 0))

    def _value(self, key: str, where: str, value: Any, depth: int) -> None:
        """Look at something that is kept somewhere."""
        self._hide_what_changes(where, value)
        if isinstance(value, IMMUTABLE) or id(value) in self._looked_at:
            return
        self._looked_at.add(id(value))
        self._seen[id(value)] = value
        inventory = self._inventory
        if isinstance(value, torch.nn.Module):
            self._add_modules(f"{key}.", value)
        elif isinstance(value, torch.Tensor):
            pass  # each pass sees to it
        elif type(value) in CONTAINERS or isinstance(value, (tuple, frozenset)):
            if not is_small(value):
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
        elif self._reach.add(value) or is_array(value) or is_harmless(value):
            inventory.known.add(id(value))
        else:
            self._object(key, where, value, depth)

    def _object(self, key: str, where: str, value: Any, depth: int) -> None:
        cls = type(value)
        own = None if _is_foreign(cls) else _attributes_of(value)
        self._inventory.known.add(id(value))
        self._objects += 1
        if own is None or depth >= _MAX_DEPTH or self._objects > _MAX_OBJECTS:
            self.doubt(f"{where} keeps a {kind(value)}")
            return
        self._reach.add_class(cls)
        self._hold(Holder(key, f"{where}, by its {kind(value)},", own, list(own), whole=True))
        for name, part in list(own.items()):
            self._value(f"{key}.{name}", where, part, depth + 1)

    def _hide_what_changes(self, where: str, value: Any) -> None:
        if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
            self.hide(f"{where} keeps a tensor, which can be written to unseen")
        elif isinstance(value, logging.Logger):
            self.hide("its code uses logging, which can be set up for the whole process")
        elif isinstance(value, enum.Enum) and not vars(value).keys() <= _OF_ENUMS:
            self.hide(f"{where} keeps a {kind(value)} with attributes")

    def _find_hidden(self, module: torch.nn.Module) -> None:
        for parameter in module.parameters():
            if self._reach.names_any(vars(parameter)):
                self.hide("its code reads attributes of its parameters")
                break
        if self._reach.names_any(_SETTINGS):
            self.hide("its code asks for settings of torch's")

    def _find_mutable(self) -> None:
        for holder in self._inventory.holders:
            for place, value in enumerate(holder.read()):
                if may_change(value):
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
