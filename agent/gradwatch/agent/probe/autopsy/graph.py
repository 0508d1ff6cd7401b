"""The autograd graph of a pass: its operators, which of its entrances are the last, and ways around them.

Only walked where a pass went bad, or in its replay.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from gradwatch.agent.probe.phases.loss_graph import is_leaf, walk_all

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch

    from gradwatch.agent.probe.passes import Entrance

# What wrappers put around a model's outputs or inputs: a gradient goes through it as it is.
_WRAPPERS = frozenset({"_DDPSinkBackward", "RegisterPostBackwardFunctionBackward"})
# While a dispatch mode is on, as in a replay, torch records some operators under another name: `reshape` and
# all that calls it, such as a product of matrices, is a view then and no alias.
_SAME = {"ReshapeAliasBackward0": "ViewBackward0", "CtcLossBackward1": "CtcLossBackward0"}
_COMPILED = "CompiledFunctionBackward"


def unwrapped(node: Any, number: int) -> tuple[Any, int]:
    """The node and the output below those that only hand a gradient on."""
    while node is not None and node.name() in _WRAPPERS and number < len(node.next_functions):
        node, number = node.next_functions[number]
    return node, number


def digest_of(edges: Sequence[tuple[Any, int]], inputs: Iterable[torch.Tensor]) -> str:
    """What stands for all operators below some outputs, and how they hang together.

    Args:
        edges: node and number of each output.
        inputs: where the model's part of the graph ends.

    Returns:
        The same for the same graph; "" where nothing was recorded.
    """
    ends = _ends(inputs)
    numbers: dict[int, int] = {}
    todo: list[Any] = []

    def named(edge: tuple[Any, int]) -> str:
        node, number = unwrapped(*edge)
        if node is None:
            return "-"
        leaf = getattr(node, "variable", None)
        end = ends.get((id(node), number) if leaf is None else (id(leaf), 0))
        if end is not None:
            return f"input {end}"
        if leaf is not None:
            return f"leaf {tuple(leaf.shape)}"
        if id(node) not in numbers:
            numbers[id(node)] = len(numbers)
            todo.append(node)
        return f"{numbers[id(node)]}.{number}"

    digest = hashlib.sha256(" ".join(map(named, edges)).encode())
    for node in todo:  # it grows meanwhile
        name = _SAME.get(node.name(), node.name())
        digest.update(f"\n{name} {' '.join(map(named, node.next_functions))}".encode())
    return digest.hexdigest() if todo else ""


def _ends(inputs: Iterable[torch.Tensor]) -> dict[tuple[int, int], int]:
    ends: dict[tuple[int, int], int] = {}
    for place, tensor in enumerate(inputs):
        if tensor.grad_fn is not None:
            ends[id(tensor.grad_fn), tensor.output_nr] = place
        elif tensor.requires_grad:
            ends[id(tensor), 0] = place
    return ends


def is_compiled(nodes: Iterable[Any]) -> bool:
    """Whether a part of what lies below was compiled: its operators are not in the graph."""
    return any(node.name() == _COMPILED for node in walk_all(nodes))


def inner(nodes: Iterable[Any]) -> set[int]:
    """Ids of those that gradients reach from another one of them: they made no last result of the model."""
    known = {node for node in nodes if node is not None}
    others = {node: known - {node} for node in known}
    return {id(found) for node in known for found in walk_all([node], others[node]) if found in others[node]}


def last_entrances(entrances: Sequence[Entrance]) -> list[Entrance]:
    """Those by which gradients came from outside of the model, and not by another one of them."""
    made_of = inner(one.node for one in entrances)
    return [one for one in entrances if id(one.node) not in made_of]


def parameters_outside(roots: Iterable[Any], entrances: Iterable[Any]) -> set[int]:
    """Ids of the leaves that gradients reach from the roots by a way round the entrances."""
    stops = set(entrances)
    return {id(node.variable) for node in walk_all(roots, stops) if is_leaf(node) and node not in stops}
