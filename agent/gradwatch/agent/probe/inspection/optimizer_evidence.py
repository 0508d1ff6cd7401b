"""Whether an optimizer's update is what has made weights non-finite, by the optimizer's state.

The gradients were finite, which the caller knows. Then either the state that the optimizer carries from step
to step is not finite, or it has divided by zero: a second moment of 0, and an `eps` that is 0 in its dtype;
or its learning rate is not finite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from gradwatch.agent.probe import scan

if TYPE_CHECKING:
    from collections.abc import Iterable

GRADIENTS, STATE, EPSILON, LEARNING_RATE, SEEN = (
    f"UPDATE_EVIDENCE_{name}" for name in ("GRADIENTS", "STATE", "EPSILON", "LEARNING_RATE", "SEEN")
)
# Second moments, under the names that torch's optimizers give them: they are divided by.
_SECOND_MOMENTS = ("exp_avg_sq", "square_avg", "sum", "acc_delta")


@dataclass(frozen=True)
class Evidence:
    """What shows that an update made weights bad.

    Attributes:
        kind: enum name of `gradwatch.v1.UpdateEvidence`.
        optimizer: its class, and what it was set to.
    """

    kind: str
    optimizer: dict[str, Any]


def evidence_in(optimizer: Any, bad: Iterable[torch.Tensor]) -> Evidence | None:
    """Look for it in an optimizer.

    Args:
        optimizer: that has updated the weights.
        bad: weights that are not finite, in host memory.
    """
    for parameter in bad:
        group = group_of(optimizer, parameter)
        state = optimizer.state.get(parameter) if group is not None else None
        if group is None or not isinstance(state, dict):
            continue
        tensors = {
            name: held
            for name, value in state.items()
            if isinstance(value, torch.Tensor)
            and (held := getattr(value, "_local_tensor", value)).device.type == "cpu"
        }
        settings = settings_of(optimizer, group)
        if not math.isfinite(settings.get("learning_rate", 0.0)):
            return Evidence(LEARNING_RATE, settings)
        if not all(scan.is_finite(value) for value in tensors.values()):
            return Evidence(STATE, settings)
        held = getattr(parameter, "_local_tensor", parameter).detach()
        eps = settings.get("eps")
        if any(
            eps is not None and _divides_by_zero(held, tensors[name], eps)
            for name in _SECOND_MOMENTS
            if name in tensors
        ):
            return Evidence(EPSILON, settings)
    return None


def has_finite_rates(optimizer: Any) -> bool:
    """Whether the learning rates that the host knows are finite: a schedule may divide 0 by 0."""
    return all(math.isfinite(_number(group.get("lr")) or 0.0) for group in optimizer.param_groups)


def settings_of(optimizer: Any, group: dict[str, Any] | None) -> dict[str, Any]:
    """The optimizer's part of a `BadWeights` message, in its JSON mapping."""
    settings: dict[str, Any] = {"optimizer": type(optimizer).__name__}
    for name, key in (("eps", "eps"), ("learning_rate", "lr")):
        value = _number(None if group is None else group.get(key))
        if value is not None:
            settings[name] = value
    return settings


def group_of(optimizer: Any, parameter: torch.Tensor) -> dict[str, Any] | None:
    """The group that the optimizer has the parameter in."""
    groups: list[dict[str, Any]] = optimizer.param_groups
    return next((group for group in groups if any(one is parameter for one in group["params"])), None)


def _divides_by_zero(weights: torch.Tensor, moment: torch.Tensor, eps: float) -> bool:
    """Whether an element is not finite whose second moment is 0, with an `eps` that is 0, too."""
    if moment.shape != weights.shape or not moment.is_floating_point():
        return False
    if torch.tensor(eps, dtype=moment.dtype).item() != 0.0:
        return False
    return bool(((moment == 0) & ~torch.isfinite(weights)).any())


def _number(value: Any) -> float | None:
    """A setting that the host knows; some are tuples of two (Adafactor)."""
    if isinstance(value, torch.Tensor):
        return float(value.item()) if value.device.type == "cpu" and value.numel() == 1 else None
    return float(value) if isinstance(value, (int, float)) else None
