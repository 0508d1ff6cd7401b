"""When the guard acts: around the outermost `step()` of an optimizer of watched models."""

from __future__ import annotations

import sys
import weakref
from typing import TYPE_CHECKING, Any

import torch

from gradwatch.agent.probe.agreement import Agreement
from gradwatch.agent.probe.guard import HeldGradients, SkipCount, after_closure, all_finite, all_fused
from gradwatch.agent.probe.parameters import parameters_of
from gradwatch.agent.probe.rank import world_size
from gradwatch.agent.probe.unanimous import all_see

if TYPE_CHECKING:
    from gradwatch.agent.probe.guard import GuardPolicy, Tally
    from gradwatch.agent.probe.model import WatchedModel
    from gradwatch.agent.probe.rounds import Moment
    from gradwatch.agent.probe.watcher import Watcher


class Guarding:
    """Applies the guard's policy to one process.

    Args:
        policy: what the policy file asks for.
        watcher: the process's.
    """

    def __init__(self, policy: GuardPolicy, watcher: Watcher) -> None:
        self._watcher = watcher
        self._policy = policy
        self._count = SkipCount(policy)
        self._models: list[WatchedModel] = []
        self._optimizer: Any = None
        self._held: HeldGradients | None = None
        self._agreement: Agreement | None = None
        self._on_device = False
        self._skipping_themselves: weakref.WeakSet[WatchedModel] = weakref.WeakSet()
        self._said_off: set[str] = set()

    def start_over(self) -> None:
        """A checkpoint has been loaded: count from 0, and say again where the guard is off."""
        self._count = SkipCount(self._policy)
        self._said_off.clear()

    def before(
        self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """An update is about to be attempted: hold it if the reduced gradients are non-finite.

        Returns:
            Other arguments for `step`, or None.
        """
        self._optimizer = optimizer
        self._put_back()  # if an exception left the last attempt
        self._on_device = False
        self._models = [model for model in self._watcher.models_of(optimizer) if self._can_guard(model)]
        if not self._models:
            return self._watcher.second_moments.before(optimizer, args, kwargs)
        wrapped: tuple[tuple[Any, ...], dict[str, Any]] | None = after_closure(
            args, kwargs, self._watcher.thread.within(lambda: self._hold_if_bad(optimizer))
        )
        if wrapped is not None:
            return wrapped
        flags = [flag for model in self._models if (flag := model.look.reduced_flag) is not None]
        host_must_know = any(model.has_error_feedback or model.differs_by_rank for model in self._models)
        if flags and all_fused(optimizer) and not host_must_know:
            # The kernel reads it on the device; nobody waits. What a compression carries on has to
            # be cleared in the same round on every rank, so with one the host must know; and where
            # ranks see different shards they have to agree.
            optimizer.grad_scale = None
            optimizer.found_inf = torch.stack(flags).amax()
            self._on_device = True
            self._skipping_themselves.update(self._models)
            self._watcher.autopsies.on_device.may_be_left_out(optimizer, self._models)
            return None
        self._hold_if_bad(optimizer)
        return None

    def before_scaled(self, optimizer: Any) -> None:
        """A GradScaler has found no fault with the gradients, and has the optimizer take them."""
        self._put_back()
        self._on_device = False
        self._optimizer = optimizer
        self._models = [model for model in self._watcher.models_of(optimizer) if self._can_guard(model)]
        if not self._models:
            self._watcher.second_moments.before(optimizer, (), {})
            return
        for model in self._models:
            model.catch_up()
            # Rounds that were bad are the scaler's, and are over.
            model.bad_round = None
        if any(model.differs_by_rank for model in self._models):
            # Whether all ranks have come here is not known, so they cannot agree to skip.
            self._models = []
            self._watcher.second_moments.before(optimizer, (), {})
            return
        overflows = self._watcher.second_moments.overflows(optimizer, self._models, skipped=True)
        if overflows or self._changed_to_bad(optimizer):
            self._held = HeldGradients(optimizer)

    def after(self, optimizer: Any) -> None:
        """The attempt is over: put everything back, and say what was skipped."""
        if optimizer is not self._optimizer:
            return  # one inside the other
        self._optimizer = None
        models, self._models = self._models, []
        if not models:
            return
        # The second of two optimizers of one model attempts the same update.
        is_new = not all(model.attempted for model in models)
        for model in models:
            model.attempted = True
        if self._on_device:
            # A leftover would make GradScaler.step raise.
            del optimizer.grad_scale, optimizer.found_inf
            self._on_device = False
            return
        skipped = self._put_back()
        if not is_new:
            return
        tally = self._count.attempt(skipped=skipped)
        if tally is None:
            return
        for model in models:
            model.forget_error_feedback()
        # As of their rounds: with two models, the first one's optimizer may have ended the step by now.
        bad = [(model.bad_round, model.bad_step) for model in models if model.bad_round is not None]
        round_, step = min(bad or [(model.last_round, model.last_step) for model in models])
        self._say(tally, step, round_)

    def landed(self, model: WatchedModel, moment: Moment, *, bad: bool) -> None:
        """A read-out tells what a fused optimizer did on its own."""
        if model not in self._skipping_themselves:
            return
        tally = self._count.attempt(skipped=bad)
        if tally is not None:
            self._say(tally, moment.step, moment.round)

    def _put_back(self) -> bool:
        """Give the gradients back; whether any were held."""
        held, self._held = self._held, None
        if held is not None:
            held.restore()
        return held is not None

    def _hold_if_bad(self, optimizer: Any) -> None:
        for model in self._models:
            model.catch_up()
        overflows = self._watcher.second_moments.overflows
        bad = any(_is_bad(model) for model in self._models) or overflows(
            optimizer, self._models, skipped=True
        )
        bad = bad or self._changed_to_bad(optimizer)
        if bad:
            # The weights are held: what a device has seen can be replayed, once it is known.
            late = [model for model in self._models if not model.on_host]
            for model in late:
                model.catch_up(wait=True)
            self._watcher.autopsies.on_device.replay_pending(late)
        if any(model.differs_by_rank for model in self._models):
            bad = self._agreed(bad=bad)
        if bad:
            self._held = HeldGradients(optimizer)

    def _changed_to_bad(self, optimizer: Any) -> bool:
        """Whether the script has made gradients bad that were finite after their reduction.

        Nobody knows whether it has done so on all ranks. A rank that skips by itself would drift apart from
        the others, unseen; one that goes on has bad weights, which all see in the next round. So they skip
        only if all see it.
        """
        changed = [model for model in self._models if model.taken_bad]
        return bool(changed) and all(self._is_so_on_all_ranks(model, optimizer) for model in changed)

    def _is_so_on_all_ranks(self, model: WatchedModel, optimizer: Any) -> bool:
        if model.differs_by_rank or model.group_size == 1:
            return True  # they agree on it afterwards, or there is but one
        if model.group_size != world_size():
            return False
        # Optimizers of one round after the second have the same count: the parameter tells them apart.
        place = _first_place(model, optimizer)
        attempt = f"{model.root}/{model.last_round}/{model.attempts.count}/{place}"
        what = f"{self._watcher.settings.generation}/{attempt}"
        # Also when it has failed before: others may wait for this rank.
        return bool(self._watcher.fuses.clean_up("guard of changed gradients", all_see, what))

    def _agreed(self, *, bad: bool) -> bool:
        """Whether any rank sees a bad gradient. A collective, in a process group of its own."""
        if self._agreement is None:
            self._agreement = Agreement()
        return self._agreement.at_once(0 if bad else 1) == 0

    def _can_guard(self, model: WatchedModel) -> bool:
        reason = model.why_ranks_may_disagree()
        if reason is None:
            return True
        if reason not in self._said_off:
            self._said_off.add(reason)
            sys.stderr.write(f"gradwatch: the guard is off for a model: {reason}.\n")
            self._watcher.append("guard_off", {"reason": reason})
        return False

    def _say(self, tally: Tally, step: int, round_: int) -> None:
        self._watcher.append(
            "skipped",
            {
                "step": step,
                "round": round_,
                "consecutive": tally.consecutive,
                "in_last_1000": tally.in_window,
                "exhausted": tally.exhausted,
            },
        )


def _is_bad(model: WatchedModel) -> bool:
    """Whether an update with the model's gradients would be a bad one. All ranks get the same answer."""
    flag = model.look.reduced_flag
    if flag is not None:
        # For a device and an optimizer that is not fused this is the one place that waits for it.
        return bool(flag)
    if not model.attempted and model.bad_round is not None and all_finite(model.gradients()):
        # The script threw them away by itself, and never attempted that update.
        model.bad_round = None
    return model.bad_round is not None


def _first_place(model: WatchedModel, optimizer: Any) -> int:
    """The place in the model of the first parameter that the optimizer updates: the same on every rank."""
    updated = set(map(id, parameters_of(optimizer)))
    places = (place for place, one in enumerate(model.parameters()) if id(one) in updated)
    return next(places, -1)
