"""The guard: keep an update with non-finite gradients from changing the weights.

It decides on the *reduced* gradients, which are the same on every rank, so that all ranks skip the
same update without a word between them. A skipped update leaves weights and optimizer state, to the
bit, as if `optimizer.step()` had not been called.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from gradwatch.agent.probe import scan
from gradwatch.agent.probe.parameters import parameters_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

WINDOW = 1000


@dataclass(frozen=True)
class GuardPolicy:
    """The guard's part of the policy file.

    Attributes:
        max_consecutive: skips in a row at which it reports `exhausted`; None for no limit.
        max_per_1000_steps: skips in 1,000 attempts, likewise.
    """

    max_consecutive: int | None
    max_per_1000_steps: int | None

    @classmethod
    def asked(cls, asked: Mapping[str, Any]) -> GuardPolicy | None:
        """What GRADWATCH_GUARD asks for; None when the guard is off, as it is without a policy.

        Raises:
            ValueError: it asks for something unknown.
        """
        mode = asked.get("on_nonfinite", "off")
        if mode == "off":
            return None
        if mode != "skip_step":
            raise ValueError(f"GRADWATCH_GUARD: on_nonfinite is {mode!r}; known are 'off' and 'skip_step'")
        return cls(asked.get("max_consecutive"), asked.get("max_per_1000_steps"))


def reads_out_every_step(asked: Mapping[str, Any]) -> bool:
    """Whether GRADWATCH_GUARD asks each update attempt on a device to wait for the look at its gradients.

    Raises:
        ValueError: it asks for something unknown.
    """
    when = asked.get("read_out", "when_ready")
    if when not in {"when_ready", "every_step"}:
        raise ValueError(f"GRADWATCH_GUARD: read_out is {when!r}; known are 'when_ready' and 'every_step'")
    return bool(when == "every_step")


@dataclass(frozen=True)
class Tally:
    """Where the count of skips stands after one."""

    consecutive: int
    in_window: int
    exhausted: bool


class SkipCount:
    """Counts skips in a row and among the last 1,000 attempts."""

    def __init__(self, policy: GuardPolicy) -> None:
        self._policy = policy
        self._attempts = 0
        self._consecutive = 0
        self._skipped_at: deque[int] = deque()

    def attempt(self, *, skipped: bool) -> Tally | None:
        """Count an update attempt; where things stand, if it was skipped."""
        self._attempts += 1
        while self._skipped_at and self._skipped_at[0] <= self._attempts - WINDOW:
            self._skipped_at.popleft()
        if not skipped:
            self._consecutive = 0
            return None
        self._consecutive += 1
        self._skipped_at.append(self._attempts)
        limits = (
            (self._consecutive, self._policy.max_consecutive),
            (len(self._skipped_at), self._policy.max_per_1000_steps),
        )
        exhausted = any(limit is not None and count >= limit for count, limit in limits)
        return Tally(self._consecutive, len(self._skipped_at), exhausted)


class HeldGradients:
    """An optimizer's gradients, taken away for one `step()`.

    Without gradients a step changes nothing: neither weights, nor moments, nor step counts. They are
    put back afterwards, since the script may go on with them (`zero_grad(set_to_none=False)`).
    """

    def __init__(self, optimizer: Any) -> None:
        self._held = [
            (parameter, parameter.grad)
            for parameter in parameters_of(optimizer)
            if parameter.grad is not None
        ]
        for parameter, _ in self._held:
            parameter.grad = None

    def restore(self) -> None:
        """Put them back."""
        for parameter, gradient in self._held:
            parameter.grad = gradient


def all_finite(gradients: Iterable[torch.Tensor]) -> bool:
    """Whether all gradients, in host memory, are finite."""
    return all(scan.is_finite(gradient) for gradient in gradients)


def after_closure(args: tuple[Any, ...], kwargs: dict[str, Any], then: Callable[[], None]) -> Any:
    """Arguments of a `step` whose closure is followed by `then`; None when it has none.

    Lightning runs forward and backward inside the closure: before it there is nothing to decide on.
    """
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if not callable(closure):
        return None

    def wrapped(*inner_args: Any, **inner_kwargs: Any) -> Any:
        result = closure(*inner_args, **inner_kwargs)
        then()
        return result

    if "closure" in kwargs:
        return args, {**kwargs, "closure": wrapped}
    return (args[0], wrapped, *args[2:]), kwargs


def forget_error_feedback(state: Any) -> None:
    """Clear what PowerSGD carries from round to round: after a NaN it would never be finite again.

    The random matrices are drawn anew from the state's own generator, which is alike on all ranks.
    """
    for error in getattr(state, "error_dict", {}).values():
        if isinstance(error, torch.Tensor):
            error.zero_()
    for name in ("p_memory_dict", "q_memory_dict"):
        getattr(state, name, {}).clear()


def all_fused(optimizer: Any) -> bool:
    """Whether every group of the optimizer runs a fused kernel, which skips by `found_inf` on the device.

    Others ignore that attribute, or assert on it.
    """
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False)) and all(
        group.get("fused") for group in optimizer.param_groups
    )
