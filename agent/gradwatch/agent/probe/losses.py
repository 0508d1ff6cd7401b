"""The newest loss, and by what a GradScaler multiplied it: for people, never for a verdict.

On a device both stay there, and are read out with the round.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch

# A number that the host knows; on a device a float64 of shape (), which nobody waits for; None for not known.
Number: TypeAlias = "float | torch.Tensor | None"


class Losses:
    """What is known of the newest loss.

    Attributes:
        loss: before it was scaled.
        scale: of the GradScaler; None without one.
        roots: nodes of the graph at which the newest backward pass began, as long as it is under way.
    """

    def __init__(self) -> None:
        self.loss: Number = None
        self.scale: Number = None
        self.roots: list[Any] = []
        self._is_scaled = False

    def backward_ended(self) -> None:
        """It is over."""
        self.roots = []

    def scaled(self, losses: Any, scaler: Any) -> None:
        """A GradScaler has scaled these."""
        self.loss = scalar(losses)
        # Private; without it the scale is not known.
        self.scale = scalar(getattr(scaler, "_scale", None))
        self._is_scaled = True

    def backward_begins(self, tensors: Any) -> None:
        """A backward pass begins at these."""
        self.roots = [one.grad_fn for one in _tensors(tensors) if one.grad_fn is not None]
        if not self._is_scaled:
            self.loss, self.scale = scalar(tensors), None
        self._is_scaled = False


def _tensors(nested: Any) -> list[torch.Tensor]:
    several = nested if isinstance(nested, (list, tuple)) else [nested]
    return [one for one in several if isinstance(one, torch.Tensor)]


def scalar(nested: Any) -> Number:
    """The one number in a tensor, or in a sequence of one; None if it is not that."""
    if isinstance(nested, (list, tuple)) and len(nested) == 1:
        nested = nested[0]
    # The value of a subclass, such as a sharded tensor's, may take a collective.
    if type(nested) is not torch.Tensor or nested.numel() != 1 or not nested.is_floating_point():
        return None
    value = nested.detach()
    if value.device.type == "cpu":
        return float(value.item())
    if value.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    # A copy: the script may go on with the tensor.
    return value.reshape(()).to(torch.float64, copy=True)
