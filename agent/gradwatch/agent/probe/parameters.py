"""Names for parameters, as the model's author knows them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

# What torch.compile and activation checkpointing put between a module and its child.
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_checkpoint_wrapped_module)(?=\.|$)")


@dataclass(frozen=True)
class ParameterInfo:
    """A parameter's names and kind."""

    name: str
    module: str
    module_class: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """Its number of elements."""
        return math.prod(self.shape)

    def as_message(self) -> dict[str, Any]:
        """The `Parameter` message in its JSON mapping."""
        return {
            "name": self.name,
            "module": self.module,
            "module_class": self.module_class,
            "shape": list(self.shape),
            "dtype": self.dtype,
        }


@dataclass(frozen=True)
class Names:
    """What the parameters of a model are called.

    Attributes:
        module_class: of the model; of several all of them, and without any the optimizers' classes.
        parameters: each with its names.
    """

    module_class: str
    parameters: list[tuple[torch.Tensor, ParameterInfo]]


def name_parameters(
    root: torch.nn.Module, parameters: Iterable[torch.Tensor]
) -> list[tuple[torch.Tensor, ParameterInfo]]:
    """Pair each of `parameters` with its names; a shared one gets those of its first owner.

    Args:
        root: the user's model, inside any wrapper.
        parameters: those of interest, in the order of the result; one that is not in
            `root` is named `<unknown>`.
    """
    found: dict[int, ParameterInfo] = {}
    for path, module in root.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in found:
                found[id(parameter)] = _info(path, module, name, parameter)
    return [(parameter, found.get(id(parameter)) or _unknown(parameter)) for parameter in parameters]


def name_places(
    root: torch.nn.Module, places: Iterable[tuple[torch.Tensor, torch.nn.Module, str]]
) -> list[tuple[torch.Tensor, ParameterInfo]]:
    """Pair parameters with their names by the places where they belong, whatever is there now.

    Args:
        root: the user's model, inside any wrapper.
        places: each parameter with its module and its name in that; one whose module is not in `root` is
            named `<unknown>`.
    """
    paths = {id(module): path for path, module in root.named_modules()}
    return [
        (
            parameter,
            _info(paths[id(module)], module, name, parameter) if id(module) in paths else _unknown(parameter),
        )
        for parameter, module, name in places
    ]


def _info(path: str, module: torch.nn.Module, name: str, parameter: torch.Tensor) -> ParameterInfo:
    owner = clean_path(path)
    return ParameterInfo(
        name=f"{owner}.{name}" if owner else name,
        module=owner,
        module_class=class_name(module),
        shape=tuple(parameter.shape),
        dtype=dtype_name(parameter.dtype),
    )


def _unknown(parameter: torch.Tensor) -> ParameterInfo:
    return ParameterInfo("<unknown>", "", "", tuple(parameter.shape), dtype_name(parameter.dtype))


def parameters_of(optimizer: Any) -> list[torch.Tensor]:
    """Those that an optimizer updates, in its order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of it: any computation with a DTensor may be a collective."""
    held: torch.Tensor = getattr(tensor, "_local_tensor", tensor)
    return held


def class_name(module: torch.nn.Module) -> str:
    """The class that the author wrote: `fully_shard` gives a module a subclass of it and of `FSDPModule`."""
    kind = type(module)
    if len(kind.__bases__) > 1 and kind.__bases__[0].__name__ == "FSDPModule":
        kind = kind.__bases__[1]
    return kind.__name__


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def clean_path(path: str) -> str:
    """A module's path without what torch.compile and checkpointing put into it."""
    return _WRAPPERS.sub("", path).removeprefix(".")
