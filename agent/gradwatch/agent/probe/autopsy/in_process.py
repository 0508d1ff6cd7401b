"""Replay a pass in the training process itself: a device's memory is not forked with a process.

Unlike a child, it has to leave everything as it found it, down to the random numbers, so that the training
goes on bit for bit as if nothing had been replayed.
"""

from __future__ import annotations

import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from gradwatch.agent.probe.autopsy.borrowed import NotLendableError, borrowed
from gradwatch.agent.probe.autopsy.capsule import RandomState
from gradwatch.agent.probe.autopsy.dissection import Care
from gradwatch.agent.probe.autopsy.replay import not_done, put_in_place, replay

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gradwatch.agent.probe.autopsy.capsule import Capsule
    from gradwatch.agent.probe.autopsy.replay import Case


def in_process(case: Case, device: torch.device, *, seconds: float) -> dict[str, Any]:
    """Replay it here and now, outside of any forward or backward pass. Waits for the device.

    Args:
        case: what is to be replayed.
        device: where the model is.
        seconds: after which no further operator is begun.

    Returns:
        Fields of the `Autopsy` message in its JSON mapping.
    """
    until = time.monotonic() + seconds
    state = case.capsule.state
    if state is not None and state.replaced_forward:
        return not_done("something else ran in place of its forward, and may do more than compute")
    try:
        with _random_numbers_kept(device), _may_wait(device), _state_kept(case.capsule):
            doubts = put_in_place(case.capsule)
            with borrowed(case.module) as lent:
                parameters = lent.instead_of(case.parameters())
                care = Care(lent.buffers, until)
                told = replay(replace(case, parameters=lambda: parameters), care, doubts)
    except NotLendableError as why:
        return not_done(str(why))
    hooked = any(getattr(one, "_backward_hooks", None) for one in case.module.parameters())
    if told["replay"] == "REPLAY_FINITE" and hooked:
        return not_done("hooks on its parameters change their gradients, and are not run again")
    return told


@contextmanager
def _random_numbers_kept(device: torch.device) -> Iterator[None]:
    """Whoever draws next draws what would have come without us: from Python, NumPy or torch."""
    numpy: Any = sys.modules.get("numpy.random")
    before = RandomState.now(device, python=True)
    numpy_state = None if numpy is None else numpy.get_state()
    try:
        yield
    finally:
        before.restore(device)
        if numpy is not None:
            numpy.set_state(numpy_state)


@contextmanager
def _state_kept(capsule: Capsule) -> Iterator[None]:
    """Python's state is afterwards what it is now."""
    state = capsule.state
    try:
        now = None if state is None else state.inventory.take(strongly=True)
    except (KeyError, ValueError):
        # Attributes have come or gone: what cannot be undone is not done.
        now, capsule.state = None, None
        capsule.doubts.append("attributes of its modules have come or gone since")
    try:
        yield
    finally:
        if now is not None:
            now.restore()


@contextmanager
def _may_wait(device: torch.device) -> Iterator[None]:
    """Waiting for the device is no error meanwhile; the model has given its warnings the first time."""
    mode = torch.cuda.get_sync_debug_mode() if device.type == "cuda" else 0
    if mode:
        torch.cuda.set_sync_debug_mode(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if mode:
            torch.cuda.set_sync_debug_mode(mode)
