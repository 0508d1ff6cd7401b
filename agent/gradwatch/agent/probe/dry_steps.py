"""Optimizer steps that are no updates.

`torch.distributed.checkpoint` asks optimizers for their state, and has one that has none yet make it by a
step with zero gradients and a learning rate of 0: before a checkpoint is loaded, so before the model has run
at all, and at every save for an optimizer that keeps no state.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from gradwatch.agent.probe.saves import when_imported

if TYPE_CHECKING:
    from types import ModuleType

    from gradwatch.agent.probe.steps import StepClock

_MODULE = "torch.distributed.checkpoint.state_dict"
_FUNCTION = "_init_optim_state"


def leave_dry_steps_out(clock: StepClock) -> None:
    """Have the clock stand still during such steps; a torch that makes none is left as it is."""

    def patch(module: ModuleType) -> None:
        original = getattr(module, _FUNCTION, None)
        if original is None:
            return

        @functools.wraps(original)
        def _init_optim_state(*args: Any, **kwargs: Any) -> Any:
            with clock.standing_still():
                return original(*args, **kwargs)

        setattr(module, _FUNCTION, _init_optim_state)

    when_imported({_MODULE: patch})
