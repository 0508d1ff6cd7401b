"""What a rank's record says that it saw, as a sighting. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from gradwatch.collector.model import Kind, Sighting
from gradwatch.collector.observations import Phase

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gradwatch.collector.observations import BadGradient, BadWeight, Hello, NonFinite


def sighting_of(hello: Hello, body: NonFinite) -> Sighting:
    """What a bucket's record says about its rank: its earliest gradient in backward order."""
    known = [gradient for gradient in body.gradients if gradient.backward_position is not None]
    earliest = min(
        known or body.gradients,
        key=lambda gradient: gradient.backward_position or 0,
        default=None,
    )
    sighting = replace(
        of_gradient(begun(hello, Kind.GRADIENT, body.step, body.round), earliest),
        microbatch=body.microbatch,
        phase=body.phase,
        backward_position=None if earliest is None else earliest.backward_position,
        gradients_total=body.gradients_total,
        batch=body.batch,
        look=body.source,
        root=body.root,
        model_step=body.model_step,
        weights_finite=body.weights_finite,
        bad_weights=body.bad_weights,
        bad_weights_total=max(body.bad_weights_total, len(body.bad_weights)),
        finite_step=body.weights_finite_step,
        loss=body.loss,
        loss_note=body.loss_note,
        exchanged=body.exchanged,
        batch_hash=body.batch_hash,
        batch_value=body.batch_value,
        gradient=None if earliest is None else earliest.parameter,
    )
    if body.phase is not Phase.PARAMETER or not body.bad_weights:
        return sighting
    return of_weight(sighting, body.bad_weights[0], body.gradients)


def begun(hello: Hello, kind: Kind, step: int, round_: int) -> Sighting:
    """A sighting of which no more is known than who saw it, and when."""
    return Sighting(
        rank=hello.rank,
        node=hello.node,
        device=hello.device,
        device_id=hello.device_id,
        step=step,
        round=round_,
        microbatch=None,
        phase=None,
        parameter=None,
        module=None,
        module_class=None,
        value=None,
        count=None,
        numel=None,
        dtype=None,
        backward_position=None,
        gradients_total=0,
        batch=None,
        look=kind.value,
        kind=kind,
    )


def of_gradient(sighting: Sighting, gradient: BadGradient | None) -> Sighting:
    """The sighting, told of a gradient; as it is when there is none."""
    if gradient is None:
        return sighting
    return replace(
        sighting,
        parameter=gradient.parameter,
        module=gradient.module,
        module_class=gradient.module_class,
        value=gradient.value,
        count=gradient.count,
        numel=gradient.numel,
        dtype=gradient.dtype,
    )


def of_weight(sighting: Sighting, weight: BadWeight, gradients: Iterable[BadGradient]) -> Sighting:
    """The sighting, told of a weight and no gradient.

    Args:
        sighting: of the rank.
        weight: the first bad one.
        gradients: that were reported with it, and may know its module.
    """
    known = next((one for one in gradients if one.parameter == weight.parameter), None)
    return replace(
        sighting,
        parameter=weight.parameter,
        module=weight.parameter.rpartition(".")[0] if known is None else known.module,
        module_class=None if known is None else known.module_class,
        value=weight.value,
        count=weight.count,
        numel=weight.numel,
        dtype=None if known is None else known.dtype,
    )
