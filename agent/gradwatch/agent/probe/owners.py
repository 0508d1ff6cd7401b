"""Which modules the parameters of optimizers belong to, in a script that has not said so.

An optimizer knows its parameters and not their names. The modules are found on the heap, once; nothing is
attached to them, and no method of theirs is called.
"""

from __future__ import annotations

import gc
import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from gradwatch.agent.probe.parameters import Names, ParameterInfo, dtype_name, name_parameters
from gradwatch.agent.probe.variables import names_of_variables

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def names_of(
    optimizers: Sequence[Any],
    parameters: Sequence[torch.Tensor],
    said: Iterable[torch.nn.Module],
    *,
    beside: bool = False,
) -> Names:
    """Name parameters.

    Args:
        optimizers: that are given them.
        parameters: theirs.
        said: modules that the script has named; others are looked for only if these are not all.
        beside: other models have names of their own, so that of a single module is said, too.
    """
    missing = {id(parameter) for parameter in parameters}
    roots = [module for module in said if _take(module, missing)]
    if missing:
        found = sorted(_outermost_modules(), key=lambda module: _rank(module, missing))
        roots += [module for module in found if _take(module, missing)]
    classes = _classes(roots)
    labels = _labels(roots, classes) if beside or len(roots) > 1 else ()
    infos: dict[int, ParameterInfo] = {}
    for root, label in itertools.zip_longest(roots, labels):
        owned = _parameters_of(root)
        for parameter, info in name_parameters(root, [one for one in parameters if id(one) in owned]):
            infos.setdefault(id(parameter), info if label is None else _below(label, info))
    for parameter, info in _by_place(optimizers):
        infos.setdefault(id(parameter), info)
    unnamed = ParameterInfo("<unknown>", "", "", (), "")
    named = [(parameter, infos.get(id(parameter), unnamed)) for parameter in parameters]
    classes = classes or sorted({type(optimizer).__name__ for optimizer in optimizers})
    return Names(", ".join(classes), named)


def _by_place(optimizers: Sequence[Any]) -> Iterable[tuple[torch.Tensor, ParameterInfo]]:
    for optimizer in optimizers:
        of = f" of {type(optimizer).__name__}" if len(optimizers) > 1 else ""
        for group, entry in enumerate(optimizer.param_groups):
            for place, parameter in enumerate(entry["params"]):
                name = f"parameter {place} of group {group}{of}"
                yield (
                    parameter,
                    ParameterInfo(name, "", "", tuple(parameter.shape), dtype_name(parameter.dtype)),
                )


def _outermost_modules() -> list[torch.nn.Module]:
    """All modules of the process that no other one holds. Walks the heap: for use once."""
    heap = gc.get_objects()
    # By their types: `isinstance` would run properties of whatever lies there.
    kinds = {kind for kind in set(map(type, heap)) if issubclass(kind, torch.nn.Module)}
    modules = [item for item in heap if type(item) in kinds]
    inner = {id(child) for module in modules for child in _children(module)}
    return [module for module in modules if id(module) not in inner]


def _children(module: torch.nn.Module) -> list[torch.nn.Module]:
    # One whose __init__ is under way may not have any such attribute yet.
    held = vars(module).get("_modules") or {}
    return [child for child in held.values() if child is not None]


def _parameters_of(module: torch.nn.Module) -> set[int]:
    owned: set[int] = set()
    seen: set[int] = set()
    waiting = [module]
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        owned |= {id(value) for value in (vars(one).get("_parameters") or {}).values() if value is not None}
        waiting += _children(one)
    return owned


def _rank(module: torch.nn.Module, wanted: set[int]) -> tuple[int, int]:
    """The one that owns most of them first, and little else."""
    owned = _parameters_of(module)
    return -len(owned & wanted), len(owned)


def _take(module: torch.nn.Module, missing: set[int]) -> bool:
    """Whether the module owns any of these, which then are not missing any more."""
    owned = _parameters_of(module) & missing
    missing -= owned
    return bool(owned)


def _classes(modules: Sequence[torch.nn.Module]) -> list[str]:
    """The classes of several modules, the second of one class with its number."""
    labels: list[str] = []
    for module in modules:
        name = type(module).__name__
        same = sum(label.split(" ")[0] == name for label in labels)
        labels.append(f"{name} {same + 1}" if same else name)
    return labels


def _labels(modules: Sequence[torch.nn.Module], classes: Sequence[str]) -> list[str]:
    """What stands before the names of modules' parameters: the script's variable, else the class."""
    names = names_of_variables(modules)
    return [names.get(id(module), label) for module, label in zip(modules, classes, strict=True)]


def _below(label: str, info: ParameterInfo) -> ParameterInfo:
    module = f"{label}.{info.module}" if info.module else label
    return replace(info, name=f"{label}.{info.name}", module=module)
