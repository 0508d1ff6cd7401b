"""Put the probe into this process: once, from the environment."""

from __future__ import annotations

import contextlib
import functools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradwatch.agent.probe import single as alone
from gradwatch.agent.probe import spool
from gradwatch.agent.probe.arrival import patch_backward
from gradwatch.agent.probe.autopsy import PART as AUTOPSY
from gradwatch.agent.probe.ddp import DDPWatch
from gradwatch.agent.probe.dry_steps import leave_dry_steps_out
from gradwatch.agent.probe.fsdp import FSDPWatch
from gradwatch.agent.probe.inspection.updates import PART as UPDATES
from gradwatch.agent.probe.inspection.updates import patch_gradient_changes
from gradwatch.agent.probe.passes import PART
from gradwatch.agent.probe.resumed import PART as RESUMED
from gradwatch.agent.probe.round_log import RECORDER
from gradwatch.agent.probe.saves import patch_saves
from gradwatch.agent.probe.second_moments import PART as MOMENTS
from gradwatch.agent.probe.settings import Settings
from gradwatch.agent.probe.single import SingleWatch
from gradwatch.agent.probe.steps import patch_optimizers
from gradwatch.agent.probe.torch_hooks.exchanges import notice_exchanges
from gradwatch.agent.probe.unowned import PART as UNOWNED
from gradwatch.agent.probe.unwatched import why_unwatched
from gradwatch.agent.probe.watcher import Watcher

if TYPE_CHECKING:
    from collections.abc import Callable

    from gradwatch.agent.probe.steps import StepClock


@dataclass(frozen=True)
class Probe:
    """What is active in this process."""

    watcher: Watcher
    ddp: DDPWatch
    fsdp: FSDPWatch
    single: SingleWatch


_active: Probe | None = None

# How deep an optimizer's own step lies when a GradScaler calls it.
_INSIDE = 2


def active() -> Probe | None:
    """The process's probe, if it has been activated."""
    return _active


def activate() -> Probe | None:
    """Wrap torch's classes so that the models of this process are watched.

    Returns:
        The process's probe, the same at every call; None when GRADWATCH_SPOOL is not set.

    Raises:
        RuntimeError: this torch is not built as we know it.
        ValueError: the environment says something that is no number.
    """
    global _active  # noqa: PLW0603 - one probe per process, as torch has one DistributedDataParallel
    settings = Settings.from_environment()
    if _active is not None or settings is None:
        return _active
    watcher = Watcher(settings)
    os.register_at_fork(after_in_child=watcher.thread.forked)
    ddp = DDPWatch(watcher)
    ddp.install()
    fsdp = FSDPWatch(watcher)
    fsdp.install()
    single = watcher.single = SingleWatch(watcher)
    watcher.resumed.install()
    _patch_backward(watcher, single)
    _patch_optimizers(watcher, single)
    leave_dry_steps_out(watcher.clock)
    notice_exchanges(watcher.exchanged)
    patch_saves(_guarded(watcher, "saves", watcher.saving))
    _active = Probe(watcher, ddp, fsdp, single)
    # Without this file nobody could tell a job that never imported us from one that never
    # wrapped a model.
    with contextlib.suppress(OSError):
        os.close(os.open(settings.spool / spool.AUTOLOADED, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
    return _active


def _guarded(watcher: Watcher, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """A part of the probe under its fuse: never raises."""
    return functools.partial(watcher.fuses.call, part, call)


def _each(*calls: Callable[..., Any]) -> Callable[..., None]:
    """All of these, one after the other."""

    def run(*args: Any) -> None:
        for call in calls:
            call(*args)

    return run


def _unless_still(clock: StepClock, call: Callable[..., Any]) -> Callable[..., Any]:
    """Do nothing while what optimizers do is no update."""
    return lambda *args: None if clock.stands_still else call(*args)


def _patch_backward(watcher: Watcher, single: SingleWatch) -> None:
    arrivals = watcher.arrivals
    single_begins = _guarded(watcher, alone.PART, single.backward_begins)
    remove_gone = _guarded(watcher, "models", watcher.remove_gone)

    unowned = watcher.unowned
    unowned_begins = _guarded(watcher, UNOWNED, unowned.backward_begins)
    losses, armed, thread = watcher.losses, watcher.armed, watcher.thread

    def begins(roots: Any, gradients: Any) -> None:
        if arrivals.backward_begins():
            remove_gone()
            losses.backward_begins(roots)
            armed.begins(losses.current)
            single_begins(roots, gradients)
            if unowned.outdated or unowned.model is not None:
                unowned_begins(roots, gradients)

    def ended(failed: bool) -> None:
        if arrivals.backward_ended(failed):
            losses.backward_over()
            armed.over()

    patch_backward(thread.trains(begins), thread.belongs(ended))
    for part, over in (
        (alone.PART, single.backward_over),
        (UNOWNED, unowned.backward_over),
        (UPDATES, watcher.updates.backward_over),
    ):
        # Autograd may call it in a thread of its own.
        arrivals.when_over.append(thread.within(_guarded(watcher, part, over)))


def _patch_optimizers(watcher: Watcher, single: SingleWatch) -> None:
    clock, guarding, reload = watcher.clock, watcher.guarding, watcher.reload
    thread = watcher.thread

    guarded = functools.partial(_guarded, watcher)
    begins = _attempt_begins(watcher, single)
    single_before = guarded(alone.PART, single.attempted)
    replays = guarded(AUTOPSY, watcher.autopsies.on_device.before)
    update_over = guarded(AUTOPSY, watcher.autopsies.on_device.after)
    unguarded = guarded(MOMENTS, watcher.second_moments.before)
    before = unguarded if guarding is None else guarded("guard", guarding.before)
    before_scaled = None if guarding is None else guarded("guard", guarding.before_scaled)
    guard_after = None if guarding is None else guarded("guard", guarding.after)
    unowned_steps = guarded(UNOWNED, watcher.unowned.stepping)
    looked_at = guarded(UPDATES, watcher.updates.before)
    updated = guarded(UPDATES, watcher.updates.after)
    by_itself = True

    def enter(attempt: Any, optimizer: Any, args: Any, kwargs: Any) -> Any:
        nonlocal by_itself
        begins(optimizer)
        if clock.enter(attempt, optimizer):
            by_itself = attempt is optimizer
            unowned_steps(optimizer)
            call = single_before(attempt, optimizer, args, kwargs)
            call = replays(attempt, optimizer, *(call or (args, kwargs))) or call
            if not by_itself:
                # A GradScaler has a wheel of its own.
                return call
            call = looked_at(optimizer, *(call or (args, kwargs))) or call
            return before(optimizer, *(call or (args, kwargs))) or call
        if attempt is optimizer and not by_itself and clock.depth == _INSIDE:
            looked_at(optimizer, (), {})
            return unguarded(optimizer, (), {}) if before_scaled is None else before_scaled(optimizer)
        return None

    count = guarded("steps", clock.leave)
    stepped = guarded(RECORDER, watcher.stepped)

    def over(attempt: Any, optimizer: Any) -> None:
        update_over(attempt, optimizer)
        if clock.is_outermost(attempt):
            updated(optimizer)
        if count(attempt, optimizer):
            stepped(optimizer)
            reload.attempted(attempt, optimizer)

    over_in_thread = thread.updated(over)

    def leave(attempt: Any, optimizer: Any) -> None:
        # Not under the fuse of the steps, nor in one thread only: whatever fails there, and if another
        # thread has begun to train meanwhile, held gradients are given back.
        if attempt is optimizer and guard_after is not None:
            guard_after(optimizer)
        over_in_thread(attempt, optimizer)

    patch_optimizers(
        _unless_still(clock, thread.updates(guarded("steps", enter))),
        _unless_still(clock, leave),
        thread.belongs(
            _each(guarded("steps", clock.state_loaded), guarded(UPDATES, watcher.updates.state_loaded))
        ),
        thread.belongs(reload.scale_updated),
        thread.belongs(
            _each(
                guarded(PART, watcher.loss_scaled),
                guarded(alone.PART, lambda losses, _: single.loss_scaled(losses)),
                guarded(UNOWNED, lambda losses, _: watcher.unowned.loss_scaled(losses)),
            )
        ),
    )
    patch_gradient_changes(
        thread.belongs(guarded(UPDATES, watcher.updates.clipped)),
        thread.belongs(guarded(UPDATES, watcher.updates.unscaled)),
    )
    alone.patch_parameter_groups(
        _each(guarded(alone.PART, single.given), guarded(UNOWNED, watcher.unowned.given))
    )


def _attempt_begins(watcher: Watcher, single: SingleWatch) -> Callable[[Any], None]:
    """What is done first when an optimizer, or a GradScaler around it, attempts an update."""
    single_steps = _guarded(watcher, alone.PART, single.stepping)
    resumed = watcher.resumed
    resumes = _guarded(watcher, RESUMED, resumed.attempted)

    def begins(optimizer: Any) -> None:
        single_steps(optimizer)
        if resumed.waits:
            resumes()
        if not watcher.watching:
            watcher.unwatched(why_unwatched(optimizer))

    return begins
