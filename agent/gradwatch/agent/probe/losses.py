"""The newest loss, by what a GradScaler multiplied it, and the backward pass that begins in it.

On a device both numbers stay there, and are read out with the round.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from gradwatch.agent.probe.autopsy.child import ChildError, in_child
from gradwatch.agent.probe.phases.loss_pass import LossPass

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from gradwatch.agent.probe.fuses import Fuses
    from gradwatch.agent.probe.passes import Pass

# A number that the host knows; on a device a float64 of shape (), which nobody waits for; None for not known.
Number: TypeAlias = "float | torch.Tensor | None"

# The part of the probe, for its fuse.
PART = "losses"
# Losses that are not finite and whose graph is looked at, of one process: each takes a forked child.
LOOKED_AT = 8
_SECONDS = 5.0


class Losses:
    """What is known of the newest loss.

    Args:
        fuses: of the process.
        examines: whether the graph of a loss that is not finite is worth a look: it is not where a model's
            output was not finite either.

    Attributes:
        loss: before it was scaled.
        scale: of the GradScaler; None without one.
        current: the backward pass under way, or the newest one.
    """

    def __init__(self, fuses: Fuses, examines: Callable[[], bool] = lambda: True) -> None:
        self._fuses = fuses
        self.loss: Number = None
        self.scale: Number = None
        self.current = LossPass()
        self._examines = examines
        self._is_scaled = False
        self._left = LOOKED_AT

    @property
    def roots(self) -> tuple[Any, ...]:
        """The nodes at which the backward pass under way began."""
        return self.current.roots

    def scaled(self, losses: Any, scaler: Any) -> None:
        """A GradScaler has scaled these."""
        self.loss = scalar(losses)
        # Private; without it the scale is not known.
        self.scale = scalar(getattr(scaler, "_scale", None))
        self._is_scaled = True

    def backward_begins(self, tensors: Any) -> None:
        """A backward pass begins at these. Never raises."""
        is_scaled, self._is_scaled = self._is_scaled, False
        # What is known of the one before is not of this one, whatever fails below.
        self.current = LossPass()
        if not is_scaled:
            self.loss = self.scale = None
        self._fuses.call(PART, self._begin, tensors, is_scaled=is_scaled)

    def _begin(self, tensors: Any, *, is_scaled: bool) -> None:
        if not is_scaled:
            self.loss = scalar(tensors)
        self.current = LossPass(_roots(tensors), self.loss)
        # Where the scale alone makes it infinite, the loss is none to be looked at.
        if isinstance(self.loss, float) and not math.isfinite(self.loss) and self._left and self._examines():
            self._left -= 1
            self.current.made = _maker(self.current.roots)

    def join(self, passes: Iterable[Pass], ordinal: int) -> None:
        """Let the backward pass under way know the passes that it goes through by other ways than the output.

        Args:
            passes: of one model.
            ordinal: of the backward pass under way, since the last reduction.
        """
        for one in passes:
            if one.loss is None and one.backward == ordinal and self.current.roots:
                one.loss = self.current
                self.current.entered(one)

    def backward_over(self) -> None:
        """It is over: nothing of its graph is kept. Never raises."""
        self._fuses.clean_up(PART, self.current.over)


def _roots(tensors: Any) -> tuple[Any, ...]:
    """The nodes at which a backward pass begins."""
    given = tensors if isinstance(tensors, (list, tuple)) else [tensors]
    nodes = (one.grad_fn for one in given if isinstance(one, torch.Tensor))
    return tuple(node for node in nodes if node is not None)


def _maker(roots: tuple[Any, ...]) -> dict[str, Any] | None:
    """The operator that made it; None where that cannot be looked for."""
    # Imported where it is needed: a healthy job never does.
    from gradwatch.agent.probe.phases.loss_maker import made_by

    try:
        return in_child(lambda: made_by(roots), seconds=_SECONDS)
    except ChildError:
        return None


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
