"""What the first rank saw, in words: its phase, the operator and the loss. Pure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from gradwatch.collector.observations import Phase
from gradwatch.collector.words import VALUES, is_part, listed, number, since_when

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gradwatch.collector.model import Operator, Sighting
    from gradwatch.collector.observations import OperatorInput

_PHASES = {
    Phase.PARAMETER: "Its weights were not finite before that step.",
    Phase.FORWARD: "Its batch and its weights were finite, and what its forward pass gave was not.",
    Phase.LOSS: "What its forward pass gave was finite, and the gradient of the loss was not.",
    Phase.BACKWARD: "The gradient of the loss was finite, and went bad on its way back through the model.",
}
_BACKWARD_WITH_LOSS = "It went bad in the backward pass, which here includes the loss function."
_ENTERED_FINITE = "What entered its part of the model and its weights were finite, "
# It was bad before any operator ran: one that is named made something worse of it.
_BAD_BEFORE = {Phase.INPUT, Phase.PARAMETER}
# Before the operator that made it is named.
_FINITE_BEFORE = {
    Phase.FORWARD: "Its batch and its weights were finite; ",
    Phase.LOSS: "What its forward pass gave was finite; ",
    Phase.BACKWARD: "The gradient of the loss was finite; ",
}
# Where an operator ran.
_PASSES: Mapping[Phase | None, str] = {
    Phase.BACKWARD: "the backward pass",
    Phase.LOSS: "the loss function",
}
# Phases of which the loss's value tells something.
_BEFORE_LOSS = (None, Phase.FORWARD, Phase.BACKWARD)
# The look of a process in which nothing is wrapped: where the model ends is not known.
_UNWRAPPED = "gradient"
# How the probe begins what it knows instead of an operator.
_UNNAMED = "no operator is named"


def what_it_was(first: Sighting) -> tuple[str, ...]:
    """What kind of fault it was, and which operator made it."""
    operator = first.operator
    if operator is None or operator.name is None:
        return (*_of_phase(first), *_of_loss(first), *_why_unnamed(first))
    made = _made_by(first, operator)
    if first.phase in _BAD_BEFORE:
        return (made, *(since_when(first) if first.phase is Phase.PARAMETER else ()))
    ranges = [_range_of(one) for one in operator.inputs if not one.is_number]
    ranges = [one for one in ranges if one]
    inputs = f" It was given {listed(ranges)}." if ranges else ""
    return (f"{made}{inputs}", *_of_loss(first))


def _made_by(first: Sighting, operator: Operator) -> str:
    """In which operator it began, or which one spread it."""
    where = f" in {operator.module}" if operator.module else ""
    line = "" if operator.source is None else f", called from {operator.source}"
    code = "" if operator.code is None else f" ({operator.code:.80})"
    which = _PASSES.get(operator.phase, "the forward pass")
    if operator.phase is Phase.BACKWARD and _is_unwrapped(first):
        which = "the backward pass, which here includes the loss function"
    spread = f", and spread by {operator.name}{where} in {which}{line}{code}."
    if first.phase is Phase.INPUT:
        return f"{_entered(first, 'which is')}{spread}"
    if first.phase is Phase.PARAMETER:
        return f"{_PHASES[first.phase].rstrip('.')}{spread}"
    before = "" if first.phase is None or _is_unwrapped(first) else _FINITE_BEFORE[first.phase]
    if first.phase is Phase.FORWARD and is_part(first):
        before = f"{_ENTERED_FINITE[:-2]}; "
    return f"{before}{operator.name}{where} made it in {which}{line}{code}."


def own_cause(origin: Sighting) -> str | None:
    """What kind of fault it was, as the rest of a sentence on its rank; None when that is not known."""
    operator = origin.operator
    if origin.phase is None or (origin.phase is Phase.INPUT and is_part(origin)):
        return None
    if operator is None or operator.name is None:
        entered = f"{_entered(origin)}." if origin.phase is Phase.INPUT else _PHASES[origin.phase]
        told = _BACKWARD_WITH_LOSS if _is_unwrapped(origin) else entered
    else:
        told = _made_by(origin, operator)
    # An operator's name stays as it is.
    starts = told.startswith(("The ", "It", "What "))
    return f"{told[:1].lower()}{told[1:]}" if starts else told


def _range_of(one: OperatorInput) -> str:
    """Of a tensor's elements; "" when nothing is known of them."""
    others = f"{one.nonfinite} infinite or NaN" if one.nonfinite else ""
    if one.min is None or one.max is None:
        return others
    finite = f"{one.min:.3g}" if one.min == one.max else f"{one.min:.3g} to {one.max:.3g}"
    return f"{finite} (and {others})" if others else finite


def _why_unnamed(first: Sighting) -> tuple[str, ...]:
    """What is known instead of the operator, such as that a buffer was bad already."""
    missing = () if first.operator is None or first.phase in _BAD_BEFORE else first.operator.missing
    prefix = f"{_UNNAMED}: "
    found = [one.removeprefix(prefix) for one in missing if one.startswith(prefix)]
    return tuple(f"{one[:1].upper()}{one[1:].rstrip('.')}." for one in found[:1])


def _of_phase(first: Sighting) -> tuple[str, ...]:
    """What kind of fault it was."""
    if first.phase is None:
        return ()
    if first.phase is Phase.BACKWARD and _is_unwrapped(first):
        return (_BACKWARD_WITH_LOSS,)
    if first.phase is Phase.INPUT:
        return (f"{_entered(first)}.",)
    if first.phase is Phase.LOSS and first.loss is not None:
        # What is said of the loss says it.
        return ()
    if first.phase is Phase.FORWARD and is_part(first):
        return (f"{_ENTERED_FINITE}and what its forward pass gave was not.",)
    return (_PHASES[first.phase], *(since_when(first) if first.phase is Phase.PARAMETER else ()))


def _entered(first: Sighting, which_is: str = "") -> str:
    """What was bad of what entered the model."""
    held = "was not finite" if first.batch_value is None else f"held {VALUES[first.batch_value]}"
    if is_part(first):
        return f"What entered its part of the model {held}: it may have come from another rank"
    return f"The batch that it was given {held}{f', {which_is}' if which_is else ':'} bad data"


def _of_loss(first: Sighting) -> tuple[str, ...]:
    """What is known of the loss, where it tells something."""
    told = []
    loss = "" if first.loss is None else number(first.loss)
    if first.loss is not None and first.phase is Phase.LOSS:
        told.append(
            f"The loss was finite and its gradient was not: the loss was {loss}."
            if math.isfinite(first.loss)
            else f"The loss was {loss} on rank {first.rank} while the model's output was finite."
        )
    elif first.loss is not None and first.phase in _BEFORE_LOSS and not math.isfinite(first.loss):
        told.append(f"The loss was {loss} on rank {first.rank}.")
    if first.loss_note and first.phase not in _BAD_BEFORE:
        told.append(f"{first.loss_note.rstrip('.')}.")
    return tuple(told)


def _is_unwrapped(first: Sighting) -> bool:
    return first.look == _UNWRAPPED and first.phase is Phase.BACKWARD
