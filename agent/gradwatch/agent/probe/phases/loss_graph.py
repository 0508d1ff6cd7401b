"""The part of an autograd graph that lies between a loss and the outputs of watched models.

Only the nodes and their edges are walked, which outlive the backward pass as long as its root is kept; the
tensors that the nodes have saved do not. A walk of 546 nodes takes 0.6 ms, so it is made on a hit only, and
in the backward passes that are looked at closely after a fault.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

# Put on the nodes whose outputs leave a watched model: by it the loss ends where the model begins.
MARK = "gradwatch_output"
# Nodes that are walked, at most; what lies beyond is not known.
MAX_NODES = 100_000
_ACCUMULATES = "AccumulateGrad"
# The number that the code generator puts behind a name, and the C++ namespace before it.
_NAME = re.compile(r"^(?:torch::autograd::)?(.*?)(?:Backward\d*)?$")
_WORD = re.compile(r"(?<=[a-z0-9])(?=[A-Z][a-z])")


class TooLargeError(Exception):
    """The graph has more nodes than are walked."""


def walk(roots: Iterable[Any], stops: Collection[Any] = ()) -> Iterator[Any]:
    """Go through the nodes below the roots, these included, each once.

    Args:
        roots: nodes where it begins.
        stops: nodes that are given too, but not gone beyond.

    Raises:
        TooLargeError: there are more than `MAX_NODES`.
    """
    for number, node in enumerate(walk_all(roots, stops)):
        if number >= MAX_NODES:
            raise TooLargeError
        yield node


def walk_all(roots: Iterable[Any], stops: Collection[Any] = ()) -> Iterator[Any]:
    """The same, however many there are."""
    # The wrappers of nodes are kept, since the identity of a node is that of its wrapper.
    seen: set[Any] = set()
    todo = list(roots)
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        if node not in stops:
            todo += [below for below, _ in node.next_functions if below is not None]


def around(roots: Iterable[Any], entrances: Collection[Any]) -> tuple[list[Any], list[Any]]:
    """What a loss reaches without going through the outputs of watched models.

    Args:
        roots: nodes of the losses.
        entrances: nodes whose outputs have left the models.

    Returns:
        The nodes of the loss itself, below the roots and above the entrances; and those of the leaves that it
        uses by itself. Penalties on parameters, prototypes of the model used in the loss and second
        derivatives are such ways around the output: a replay of the model does not repeat them.

    Raises:
        TooLargeError: the graph is too large to be walked.
    """
    nodes = [node for node in walk(roots, entrances) if node not in entrances]
    operators = [node for node in nodes if not is_leaf(node)]
    return operators, [node for node in nodes if is_leaf(node)]


def is_leaf(node: Any) -> bool:
    """Whether gradients that come to it are accumulated in a leaf, its `variable`."""
    return bool(node.name().endswith(_ACCUMULATES))


def from_outside(roots: Sequence[Any], entrances: Sequence[Any]) -> dict[Any, bool | None]:
    """Which of the nodes that gradients entered a model by are entrances in truth.

    A model that returns its logits and the loss made of them has two nodes that are come to, and the second
    one lies within the model: the gradient that comes to the logits was made by the model's own loss.

    Args:
        roots: nodes of the losses; empty when not known.
        entrances: nodes whose outputs have left the models.

    Returns:
        By node: True when gradients come to it from outside only, False when they come by way of another
        entrance only, None when they come both ways, or when that is not known.

    Raises:
        TooLargeError: the graph is too large to be walked.
    """
    inner = {below for node in entrances for below in _reached_below(node, entrances)}
    if not roots:
        return {node: None if node in inner else True for node in entrances}
    outer = set(walk(roots, set(entrances))).intersection(entrances)
    return {node: (None if node in outer else False) if node in inner else True for node in entrances}


def _reached_below(node: Any, entrances: Sequence[Any]) -> set[Any]:
    """The other entrances that are reached from one of them."""
    others = set(entrances) - {node}
    return set(walk([node], others)).intersection(others) if others else set()


def operator_of(node: Any) -> str:
    """The name of the operator that made a node: "ctc_loss" for `CtcLossBackward0`.

    A function in Python keeps the name of its class.
    """
    name: str = _NAME.sub(r"\1", node.name())
    if is_python(node):
        return name
    return _WORD.sub("_", name).lower()


def is_python(node: Any) -> bool:
    """Whether it is a `torch.autograd.Function` of the user's, in Python."""
    return hasattr(type(node), "_forward_cls")
