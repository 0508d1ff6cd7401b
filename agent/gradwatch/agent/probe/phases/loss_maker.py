"""Which operator made a loss that is not finite: by what its graph has saved, before its backward pass.

Runs in a forked child: what was saved under checkpointing or offloading is computed or fetched by that.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from gradwatch.agent.probe.autopsy.values import described, kinds_of
from gradwatch.agent.probe.phases.loss_graph import MARK, MAX_NODES, is_leaf, is_python, operator_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from gradwatch.agent.probe.autopsy.values import Kinds

_SAVED = "_saved_"
_MAX_DEPTH = 32
_GIVEN = (
    "no operator is named: a tensor that came into the loss from outside of the model, by {name}, was {what} "
    "already: a target, a weight, or something computed from these"
)
_RESULTS = ("result", "output", "neg_log_likelihood")
# What they are given may hold infinities on purpose, and so may what they give.
_MASKING = frozenset({"masked_fill", "where", "masked_scatter", "index_fill", "fill", "copy_slices"})
# By the name of what they have saved, the place of that among the differentiable inputs.
_PLACES = {"self": 0, "input": 0, "other": 1, "target": 1, "tensor1": 1, "tensor2": 2}
# Of finite numbers these give finite ones (a sum that overflows aside), and keep nothing that shows it.
_HARMLESS = frozenset(
    {
        "neg",
        "add",
        "sub",
        "rsub",
        "mean",
        "abs",
        "relu",
        "clamp",
        "clamp_min",
        "clamp_max",
        "leaky_relu",
        "gelu",
    }
    | {"view", "unsafe_view", "reshape_alias", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze"}
    | {"slice", "select", "index", "gather", "clone", "alias", "cat", "stack", "split", "unbind", "repeat"}
    | {
        "diagonal",
        "flip",
        "roll",
        "chunk",
        "minimum",
        "maximum",
        "max",
        "min",
        "softplus",
        "log_sigmoid_forward",
    }
)
# So do these, unless they overflow; then what comes of it is infinite, and seldom NaN.
_SUMS = frozenset({"sum", "mm", "bmm", "addmm", "matmul", "dot", "mv", "linear", "logsumexp", "mul"})
# Of one tensor, as torch names them.
_OF_ONE = frozenset(
    {"log", "log2", "log10", "log1p", "acos", "asin", "acosh", "atanh", "tan", "sinh", "cosh", "square"}
)


def made_by(roots: Sequence[Any]) -> dict[str, Any]:
    """Find the operator that made a loss not finite.

    Args:
        roots: nodes of the losses, none of which has been gone through.

    Returns:
        Fields of the `Autopsy` message in its JSON mapping: those of the operator, and what is missing.
    """
    for node in _in_order(roots):
        found = _judged(node)
        if found is not None:
            return found
    return {"missing": ["no operator is named: nothing that those of the loss have kept shows which made it"]}


def _in_order(roots: Sequence[Any]) -> Iterator[Any]:
    """The nodes of the loss, each after all that it was computed from."""
    seen: set[Any] = set()
    todo: list[tuple[Any, bool]] = [(root, False) for root in roots]
    while todo and len(seen) < MAX_NODES:
        node, is_open = todo.pop()
        if is_open:
            yield node
            continue
        if node in seen or MARK in node.metadata:
            continue
        seen.add(node)
        todo.append((node, True))
        todo += [(below, False) for below, _ in node.next_functions if below is not None]


def _judged(node: Any) -> dict[str, Any] | None:
    """What is said of a node that made something not finite, or was given such a thing from outside."""
    name = operator_of(node)
    saved = dict(_tensors_of(node))
    inputs = {key: value for key, value in saved.items() if not key.startswith(_RESULTS)}
    given = _given_from_outside(node, name, inputs)
    if given is not None:
        return given
    if name in _MASKING or any(_is_bad(kinds_of(value)) for value in inputs.values()):
        return None
    results = [value for key, value in saved.items() if key.startswith(_RESULTS)]
    kinds = [kinds_of(value) for value in results] or _recomputed(node, name, inputs)
    bad = next((one for one in kinds if one.any), None)
    if bad is None:
        return None
    harmless = _HARMLESS | _SUMS if bad.nan else _HARMLESS
    below = [one for one, _ in node.next_functions if one is not None]
    if not inputs and name != "mean" and not all(_is_finite(one, harmless) for one in below):
        missing = f"no operator is named: {name} gave it, and whether its input was finite is not known"
        return {"phase": "PHASE_LOSS", "value": bad.value, "missing": [missing]}
    if name == "div" and "self" not in inputs:
        # Whose range is not known: only what it is divided by was kept.
        inputs = {"self": inputs["other"].new_empty(0), **inputs}
    by_place = sorted(inputs, key=lambda key: (_PLACES.get(key, len(_PLACES)), key))
    shown = [inputs[key] for key in by_place if key != "total_weight"]
    return {
        "phase": "PHASE_LOSS",
        "operator": name if is_python(node) else f"aten.{name}",
        "value": bad.value,
        "inputs": [described(value) for value in shown],
        "missing": ["the line is not known: it is of the loss, before whose backward pass no stack is kept"],
    }


def _is_finite(node: Any, harmless: frozenset[str], depth: int = 0) -> bool:
    """Whether what a node gave is known to be finite. Outputs of models are, or this would not be asked."""
    if MARK in node.metadata or is_leaf(node):
        return True
    name, saved = operator_of(node), dict(_tensors_of(node))
    results = [value for key, value in saved.items() if key.startswith(_RESULTS)]
    inputs = {key: value for key, value in saved.items() if not key.startswith(_RESULTS)}
    kinds = [kinds_of(value) for value in results] or _recomputed(node, name, inputs)
    if kinds:
        return not any(one.any for one in kinds)
    below = [one for one, _ in node.next_functions if one is not None]
    known = name in harmless and depth < _MAX_DEPTH
    return known and all(_is_finite(one, harmless, depth + 1) for one in below)


def _given_from_outside(node: Any, name: str, inputs: dict[str, torch.Tensor]) -> dict[str, Any] | None:
    """A tensor that no node made, and that is not finite."""
    for key, value in inputs.items():
        place = _PLACES.get(key)
        below = (
            node.next_functions[place][0] if place is not None and place < len(node.next_functions) else ...
        )
        kinds = kinds_of(value)
        if below is None and (kinds.nan or kinds.positive or (kinds.negative and name not in _MASKING)):
            what = "NaN" if kinds.nan else "infinite"
            return {
                "phase": "PHASE_LOSS",
                "value": kinds.value,
                "missing": [_GIVEN.format(name=name, what=what)],
            }
    return None


def _tensors_of(node: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """What a node has saved, by name."""
    if is_python(node):
        for place, value in enumerate(_or_none(lambda: node.saved_tensors) or ()):
            if isinstance(value, torch.Tensor):
                yield f"saved{place}", value
        return
    for attribute in dir(node):
        if attribute.startswith(_SAVED):
            value = _or_none(lambda name=attribute: getattr(node, name))  # type: ignore[misc]
            if isinstance(value, torch.Tensor):
                yield attribute.removeprefix(_SAVED), value.detach()


def _or_none(get: Callable[[], Any]) -> Any:
    """What it gives; None for what has been freed."""
    try:
        return get()
    except RuntimeError:
        return None


def _recomputed(node: Any, name: str, inputs: dict[str, torch.Tensor]) -> list[Kinds]:
    """The kinds of what an operator gave, computed once more from what it has saved."""
    one, other = inputs.get("self"), inputs.get("other", inputs.get("target"))
    given: Iterable[torch.Tensor] = ()
    try:
        if name in _OF_ONE and one is not None:
            given = [getattr(torch, name)(one)]
        elif name == "div" and other is not None:
            # Whatever is divided by 0 gives no number.
            given = [(torch.ones_like(other) if one is None else one) / other]
        elif name in {"mul", "xlogy", "atan2", "hypot"} and one is not None and other is not None:
            given = [getattr(torch, name)(one, other)]
        elif name == "pow" and one is not None:
            given = [torch.pow(one, node._saved_exponent)]
        elif name in {"mse_loss", "smooth_l1_loss", "huber_loss"} and one is not None and other is not None:
            given = [getattr(torch.nn.functional, name)(one, other, reduction=_reduction(node))]
        elif name == "var" and one is not None:
            given = [torch.var(one, node._saved_dim, correction=node._saved_correction)]
        elif name == "nll_loss" and "total_weight" in inputs:
            given = [inputs["total_weight"] / inputs["total_weight"]] if _reduction(node) == "mean" else []
        elif name == "mean" and _numel(node) == 0:
            given = [torch.tensor(math.nan)]
    except (RuntimeError, TypeError, AttributeError):
        return []
    return [kinds_of(value) for value in given]


def _reduction(node: Any) -> str:
    # As `torch.nn._reduction.get_enum` numbers them.
    return ("none", "mean", "sum")[node._saved_reduction]


def _numel(node: Any) -> int | None:
    number = getattr(node, "_saved_self_sym_numel", None)
    return int(number) if number is not None else None


def _is_bad(kinds: Kinds) -> bool:
    """Infinities below zero may be there on purpose."""
    return kinds.nan or kinds.positive
