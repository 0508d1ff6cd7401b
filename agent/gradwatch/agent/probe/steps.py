"""The step: update attempts, for people.

One attempt is the outermost `step()` of the first watched model's optimizers, or the
`GradScaler.step` around it, whether or not it then changes the weights. Those of one round are one. Where no
optimizer of torch's has ever stepped, an update is a change of the weights from one round to the next. The
count starts at GRADWATCH_RESUME_STEP, else at the `step` in the optimizer's loaded state, else at 0.
"""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from gradwatch.agent.probe.parameters import parameters_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


class Attempts:
    """Counts the update attempts of one model: those of several optimizers in one round are one.

    Attributes:
        count: so far.
    """

    def __init__(self) -> None:
        self.count = 0
        # By id, those that have attempted an update since the newest round.
        self._optimizers: set[int] = set()

    def new_round(self) -> None:
        """Gradients come that no optimizer has taken yet."""
        self._optimizers.clear()

    def add(self, optimizer: Any) -> bool:
        """An attempt of this optimizer is over; whether it is one more update."""
        again = id(optimizer) in self._optimizers
        is_new = again or not self._optimizers
        if again:
            # It steps more often than rounds come, and so may the others.
            self._optimizers.clear()
        self._optimizers.add(id(optimizer))
        self.count += is_new
        return is_new


class StepClock:
    """Counts update attempts.

    Args:
        resume_step: the step this process resumes at, when it was told.

    Attributes:
        step: attempts finished so far, which is the ordinal of the one under way.
        attempts: begun in this process, of any optimizer.
        stands_still: what optimizers do now is no update.
    """

    def __init__(self, resume_step: int | None = None) -> None:
        self.step = self._first = resume_step or 0
        self.attempts = 0
        self.stands_still = False
        self._told = resume_step is not None
        self._resume_step = resume_step
        self._parameters: frozenset[int] | None = None
        self._ours: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
        self._chosen: weakref.WeakSet[Any] = weakref.WeakSet()
        self._loaded: weakref.WeakSet[Any] = weakref.WeakSet()
        self._open: list[int] = []
        self._updates = Attempts()

    def new_round(self) -> None:
        """A round of the model begins whose optimizers count."""
        self._updates.new_round()

    def updated_unseen(self) -> None:
        """The weights of the model whose optimizers count have been updated, by none of torch's."""
        self.step += 1

    def follow(self, parameters: Iterable[torch.Tensor]) -> None:
        """Count the optimizer of these parameters: those of the first watched model there is."""
        self._parameters = frozenset(id(parameter) for parameter in parameters)
        self._ours = weakref.WeakKeyDictionary()
        self._updates = Attempts()
        for optimizer in list(self._loaded):
            self.state_loaded(optimizer)

    def follow_optimizer(self, optimizer: Any) -> None:
        """Count this optimizer, whatever its parameters."""
        self._chosen.add(optimizer)

    def start_over(self) -> None:
        """What has been counted is forgotten, unless the user has said where it stands."""
        self.step = self._first

    def set_step(self, step: int) -> None:
        """The user's own count, which stands over ours from now on."""
        self.step = self._first = int(step)
        self._told = True
        self._resume_step = None

    def resumes(self, resumed: bool) -> None:
        """Whether the job has opened the checkpoint that it was told to resume from; before any update."""
        if self._resume_step is None:
            return
        self._told = resumed
        self.step = self._first = self._resume_step if resumed else 0
        if not resumed:
            for optimizer in list(self._loaded):
                self.state_loaded(optimizer)

    @contextmanager
    def unmoved(self) -> Iterator[None]:
        """What is loaded meanwhile does not move the clock."""
        step, told = self.step, self._told
        try:
            yield
        finally:
            self.step, self._told = step, told

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        """What optimizers do meanwhile is no update."""
        before, self.stands_still = self.stands_still, True
        try:
            yield
        finally:
            self.stands_still = before

    def state_loaded(self, optimizer: Any) -> None:
        """An optimizer has loaded a state: go on from its step, unless told otherwise."""
        self._loaded.add(optimizer)
        if self._told or not self._counts(optimizer):
            return
        step = _state_step(optimizer)
        if step is not None:
            self.step = step

    def enter(self, attempt: Any, optimizer: Any) -> bool:
        """An update attempt begins.

        Args:
            attempt: what is being called, the optimizer or the GradScaler around it.
            optimizer: the optimizer.

        Returns:
            Whether it is the outermost one.
        """
        self.attempts += 1
        key = id(attempt)
        if key in self._open:
            # It did not end: an exception left it.
            del self._open[self._open.index(key) :]
        self._open.append(key)
        self._counts(optimizer)
        return len(self._open) == 1

    def thread_begins(self) -> None:
        """Another thread is followed from now on: none of its attempts is under way."""
        self._open.clear()

    @property
    def depth(self) -> int:
        """Attempts under way, one inside the other."""
        return len(self._open)

    def is_outermost(self, attempt: Any) -> bool:
        """Whether an attempt under way is inside of no other one."""
        return bool(self._open) and self._open[0] == id(attempt)

    def leave(self, attempt: Any, optimizer: Any) -> bool:
        """The attempt is over; the outermost one of our optimizers is a step, once a round.

        Returns:
            Whether it was one.
        """
        key = id(attempt)
        if key not in self._open:
            return False
        del self._open[self._open.index(key) :]
        if self._open or not self._counts(optimizer):
            return False
        # Of rounds of another model, whose optimizer the user has chosen, nothing is known here.
        is_new = not self._updates_the_model(optimizer) or self._updates.add(optimizer)
        self.step += is_new
        return is_new

    def _counts(self, optimizer: Any) -> bool:
        return optimizer in self._chosen or self._updates_the_model(optimizer)

    def _updates_the_model(self, optimizer: Any) -> bool:
        known = self._ours.get(optimizer)
        if known is None:
            if self._parameters is None:
                return False
            known = self._ours[optimizer] = any(
                id(parameter) in self._parameters for parameter in parameters_of(optimizer)
            )
        return known


def _state_step(optimizer: Any) -> int | None:
    """The largest `step` in an optimizer's state, if it keeps one."""
    steps = [
        state["step"] for state in optimizer.state.values() if isinstance(state, dict) and "step" in state
    ]
    if not steps:
        return None
    # All parameters that ever had a gradient share it, so the first few tell.
    return max(int(step.item() if isinstance(step, torch.Tensor) else step) for step in steps[:8])


def learning_rate(optimizer: Any) -> float | None:
    """The largest of an optimizer's groups; None when there is none that the host knows."""
    rates = [group.get("lr") for group in optimizer.param_groups]
    known = [
        float(rate)
        for rate in rates
        if not isinstance(rate, torch.Tensor) or rate.device.type == "cpu"
        if rate is not None
    ]
    return max(known) if known and len(known) == len(rates) else None


def patch_optimizers(
    enter: Callable[[Any, Any, Any, Any], Any],
    leave: Callable[[Any, Any], Any],
    loaded: Callable[[Any], None],
    scale_updated: Callable[[], None],
    scaled: Callable[[Any, Any], Any],
) -> None:
    """Have every optimizer and GradScaler of this process report its update attempts.

    Args:
        enter: called with (attempt, optimizer, args, kwargs) before; for an optimizer it may return
            other (args, kwargs) for its step. Must not raise.
        leave: called with (attempt, optimizer) after; must not raise.
        loaded: called with an optimizer that has loaded a state; must not raise.
        scale_updated: called after each `update` of a GradScaler; must not raise.
        scaled: called with (losses, GradScaler) when it has scaled them; must not raise.
    """
    import functools

    from torch.optim.optimizer import (
        Optimizer,
        register_optimizer_step_post_hook,
        register_optimizer_step_pre_hook,
    )

    # When a GradScaler skips, an optimizer's step hooks fire only if it is fused: so the
    # scaler's own step is the attempt.
    scaler = torch.amp.GradScaler
    scaler_step = scaler.step

    @functools.wraps(scaler_step)
    def step(self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.is_enabled():
            return scaler_step(self, optimizer, *args, **kwargs)
        enter(self, optimizer, None, None)
        result = scaler_step(self, optimizer, *args, **kwargs)
        leave(self, optimizer)
        return result

    scaler_scale = scaler.scale

    @functools.wraps(scaler_scale)
    def scale(self: Any, outputs: Any) -> Any:
        result = scaler_scale(self, outputs)
        if self.is_enabled():
            scaled(outputs, self)
        return result

    scaler_update = scaler.update

    @functools.wraps(scaler_update)
    def update(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = scaler_update(self, *args, **kwargs)
        scale_updated()
        return result

    load_state_dict = Optimizer.load_state_dict

    @functools.wraps(load_state_dict)
    def load(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = load_state_dict(self, *args, **kwargs)
        loaded(self)
        return result

    scaler.step = step  # type: ignore[method-assign]
    scaler.scale = scale  # type: ignore[method-assign]
    scaler.update = update  # type: ignore[method-assign]
    Optimizer.load_state_dict = load  # type: ignore[method-assign]

    def before(optimizer: Any, args: Any, kwargs: Any) -> Any:
        return enter(optimizer, optimizer, args, kwargs)

    def after(optimizer: Any, _args: Any, _kwargs: Any) -> None:
        leave(optimizer, optimizer)

    register_optimizer_step_pre_hook(before)
    register_optimizer_step_post_hook(after)
