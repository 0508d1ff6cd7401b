"""Have a module compute in its own process, and leave no trace of that.

It computes with copies of its buffers and with parameters that share the memory of its own, but none of their
hooks; afterwards all that it has as attributes is as it was. What would write into any other tensor that was
there before is refused by the `Dissection`.
"""

from __future__ import annotations

import collections
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from gradwatch.agent.probe.autopsy.kept_values import CONTAINERS, put_back

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class NotLendableError(Exception):
    """A module that cannot be put back as it was, for this reason."""


@dataclass
class Borrowed:
    """A module while it computes for somebody else.

    Attributes:
        buffers: the copies that it computes with.
        stand_ins: of its parameters, by the `id` of each.
    """

    buffers: list[torch.Tensor] = field(default_factory=list)
    stand_ins: dict[int, torch.Tensor] = field(default_factory=dict)

    def instead_of(self, parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """What the module computes with in place of these parameters."""
        return [self.stand_ins.get(id(parameter), parameter) for parameter in parameters]


@contextmanager
def borrowed(module: torch.nn.Module) -> Iterator[Borrowed]:
    """Lend a module to a replay.

    Args:
        module: with its parameters and buffers on any device.

    Raises:
        NotLendableError: what it has cannot be exchanged, as that of a scripted module.
    """
    modules = list(module.modules())
    scripted = next((one for one in modules if isinstance(one, torch.jit.ScriptModule)), None)
    if scripted is not None:
        raise NotLendableError("it holds a scripted module, which cannot be put back as it was")
    lent, copies = Borrowed(), {}
    kept = [(one, dict(vars(one)), _contents(vars(one))) for one in modules]
    try:
        for parameter in module.parameters():
            lent.stand_ins[id(parameter)] = torch.nn.Parameter(
                parameter.detach(), requires_grad=parameter.requires_grad
            )
        for buffer in module.buffers():
            copies[id(buffer)] = buffer.detach().clone()
        lent.buffers += copies.values()
        exchanged = lent.stand_ins | copies
        for one in modules:
            attributes = vars(one)
            for name, value in list(attributes.items()):
                attributes[name] = _exchange(value, exchanged)
        yield lent
    finally:
        for one, attributes, contents in kept:
            vars(one).clear()
            vars(one).update(attributes)
            for container, content in contents:
                put_back(container, content)


def _exchange(value: Any, exchanged: dict[int, torch.Tensor]) -> Any:
    """The same value with other tensors: also in the plain containers in which modules keep them."""
    if isinstance(value, torch.Tensor):
        return exchanged.get(id(value), value)
    if type(value) in {list, tuple} and any(id(one) in exchanged for one in value):
        return type(value)(exchanged.get(id(one), one) for one in value)
    if type(value) in {dict, collections.OrderedDict} and any(id(one) in exchanged for one in value.values()):
        return type(value)((key, exchanged.get(id(one), one)) for key, one in value.items())
    return value


def _contents(attributes: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Its containers with copies: a forward pass may count or collect in them."""
    return [(value, value.copy()) for value in attributes.values() if type(value) in CONTAINERS]
