"""An incident in one line, that leads with what happened. Pure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from gradwatch.collector.evidence import first_step
from gradwatch.collector.model import Cause
from gradwatch.collector.observations import Phase, UpdateEvidence
from gradwatch.collector.operators import (
    DIVIDES,
    EDGES,
    EXPONENTIAL,
    OF_POSITIVE,
    bare_name,
    holds,
)
from gradwatch.collector.words import VALUES, is_part, number, value_word

if TYPE_CHECKING:
    from gradwatch.collector.model import Incident, Operator, Sighting, Update, Verdict

_LONGEST = 200
# Beyond it the rest of a name tells no more.
_NAME = 80


def title_of(incident: Incident) -> str:
    """What happened, where and when; of at most 200 characters, all of them printable."""
    verdict = incident.verdict
    step = f"step {first_step(incident.evidence)}"
    if verdict.first is None:
        text = f"{_of_nobody(incident)}, {step}"
    else:
        text = f"{_what(verdict, verdict.first)}{_who(verdict, verdict.first)}, {step}"
    return _printable(text)


def _of_nobody(incident: Incident) -> str:
    reduced = incident.evidence.reduced
    of = "" if reduced is None or reduced.parameter is None else f" of {_short(reduced.parameter)}"
    if incident.verdict.cause is not Cause.REDUCTION:
        return f"the reduced gradient{of} is not finite, whose it was is not known"
    return "the sum is not finite, every rank was"


def _what(verdict: Verdict, first: Sighting) -> str:
    """What happened; whose it was and when comes after it."""
    name = _short(first.parameter or "a parameter")
    if verdict.cause is Cause.OPTIMIZER_STATE:
        return f"gradient of {name} overflows the optimizer's state"
    if verdict.cause is Cause.REPLICA_DIVERGENCE:
        return f"{name if first.parameter else 'weights'} differ between ranks"
    if verdict.cause is Cause.UPDATE and first.update is not None:
        return _of_update(first.update, first, name)
    return _of_phase(first, name)


def _of_update(update: Update, first: Sighting, name: str) -> str:
    by = f" by {_short(update.optimizer)}" if update.optimizer else ""
    if first.bad_weights:
        return f"update{by} made {name} {value_word(first.value)}"
    edited = update.evidence is UpdateEvidence.GRADIENTS
    return (
        f"update{by} was given a gradient of {name} that is {value_word(first.value)}"
        if edited
        else f"update{by} is bad"
    )


def _of_phase(first: Sighting, name: str) -> str:
    operator = first.operator
    what = f"gradient of {name} is {value_word(first.value)}"
    if first.phase is Phase.PARAMETER:
        what = (
            f"weight {name} is {value_word(first.value)}" if first.bad_weights else "weights are not finite"
        )
    elif first.phase is Phase.INPUT:
        entered = "what entered the model" if is_part(first) else "the batch"
        what = f"{_entered(first)} in {entered}"
    elif operator is not None and operator.name is not None:
        what = _of_the_loss(first, operator) if first.phase is Phase.LOSS else _of_operator(operator)
    elif _is_of_loss(first) and first.loss is not None:
        what = f"loss is {number(first.loss)}"
    return what


def _of_the_loss(first: Sighting, operator: Operator) -> str:
    """Such as `loss is inf: ctc_loss at loss.py:9`, or `gradient of sqrt in the loss is NaN at loss.py:9`."""
    name, where = _short(bare_name(operator)), _where(operator)
    if first.loss is not None and not math.isfinite(first.loss):
        return f"loss is {number(first.loss)}: {_of_operator(operator)}"
    return f"gradient of {name} in the loss is {value_word(first.value)}{where}"


def _of_operator(operator: Operator) -> str:
    """Such as `log of 0 at model.py:33`."""
    name = bare_name(operator)
    return f"{_short(name)}{_given(operator, name)}{_where(operator)}"


def _where(operator: Operator) -> str:
    if operator.source is not None:
        return f" at {_short(_from_folder(operator.source))}"
    return f" in {_short(operator.module)}" if operator.module else ""


def _given(operator: Operator, name: str) -> str:
    """What it was given, when a number says what is wrong with it."""
    if name in DIVIDES:
        return " by 0" if any(holds(one, 0.0) for one in operator.inputs[1:2]) else ""
    given = next((one for one in operator.inputs if not one.is_number), None)
    if given is None or given.min is None or given.max is None:
        return ""
    if name in EDGES:
        edge = min(given.min, 0.0) if name in OF_POSITIVE else 0.0
        return f" of {edge:.3g}" if holds(given, edge) else ""
    return f" of {given.max:.3g}" if name in EXPONENTIAL else ""


def _who(verdict: Verdict, first: Sighting) -> str:
    """Which ranks, and on which node."""
    if len(verdict.origins) > 1 and verdict.tie:
        if not (verdict.clean_ranks or verdict.unknown_ranks):
            return ", all ranks"
        return f", {len(verdict.origins)} ranks"
    on = f" on {_short(first.node)}" if first.node else ""
    if first.phase is Phase.INPUT and not is_part(first):
        return f" of rank {first.rank}{on}"
    if _is_of_loss(first):
        return f" on rank {first.rank}{on}"
    # Weights are the job's, wherever they are.
    of_weights = first.phase in {Phase.PARAMETER, Phase.UPDATE}
    return f", rank {first.rank}" if of_weights else f", rank {first.rank}{on}"


def _is_of_loss(first: Sighting) -> bool:
    """Whether the loss tells most: it is not finite, and no operator is known."""
    operator, loss = first.operator, first.loss
    named = operator is not None and operator.name is not None
    late = first.phase in {None, Phase.LOSS, Phase.BACKWARD}
    return late and not named and loss is not None and not math.isfinite(loss)


def _entered(first: Sighting) -> str:
    return "non-finite numbers" if first.batch_value is None else VALUES[first.batch_value]


def _from_folder(source: str) -> str:
    return source.rpartition("/")[2]


def _short(name: str) -> str:
    return name if len(name) <= _NAME else f"{name[: _NAME - 1]}…"


def _printable(text: str) -> str:
    safe = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)
    return safe if len(safe) <= _LONGEST else f"{safe[: _LONGEST - 1]}…"
