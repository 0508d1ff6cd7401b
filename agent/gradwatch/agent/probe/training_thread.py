"""Follow one training thread of the process: gradients of a training in another thread are not touched.

A backward pass writes gradients without the interpreter's lock. Reading them meanwhile, in another thread,
ends the process by a segmentation fault. So before a second thread's backward pass or update begins, whatever
would read its gradients is switched off, and has ended.

Which thread trains is told by who calls `backward()` and `step()`. Autograd's own threads for devices run
hooks, and backward passes inside of backward passes, but train nothing by themselves.
"""

from __future__ import annotations

import sys
import threading
import time
import weakref
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

# A look that is under way in one thread is waited for by another one; it never waits for that one itself.
_PATIENCE_SECONDS = 60.0
_PAUSE_SECONDS = 0.0005


class TrainingThread:
    """The thread of this process that is followed: the first one that trains something that is watched.

    One that has ended makes room for another one.

    Args:
        watches: whether anything is there to be watched.
        switch_off: called when a second thread trains, before any look that is under way is waited for; it
            gives whether nothing is watched from then on. Must not raise.
        clean_up: called once after that. Must not raise.
        begun: called when another thread is followed from now on.

    Attributes:
        off: several threads have trained, and nothing is watched any more.
    """

    def __init__(
        self,
        watches: Callable[[], bool],
        switch_off: Callable[[], bool],
        clean_up: Callable[[], object],
        begun: Callable[[], object],
    ) -> None:
        self.off = False
        self._watches, self._switch_off, self._clean_up, self._begun = watches, switch_off, clean_up, begun
        self._ident: int | None = None
        self._thread: weakref.ref[threading.Thread] | None = None
        self._leads = False
        self._overlaps = False
        self._drained = True
        # One for each call under way: appending and popping are atomic, adding is not.
        self._under_way: list[None] = []
        self._lock = threading.Lock()

    def forked(self) -> None:
        """This is a forked child: other threads, and what they were about, are not here."""
        if self._ident != get_ident():
            self._ident, self._thread, self._leads = None, None, False
        self._drained = True
        self._under_way, self._lock = [], threading.Lock()

    # ------------------------------------------------------------------ calls

    def trains(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """What a thread does that trains: `call` in the thread that is followed, or will be; else nothing."""
        return self._counted(call, self._joins)

    def updates(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """What an update does: `call`, in another thread too, as long as one only runs backward passes."""
        return self._counted(call, self._may_update)

    def updated(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """What is done when an update is over: `call`, in those threads that `updates` tells of."""
        return self._counted(call, lambda: not self._overlaps or self._is_nobodys())

    def belongs(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """What goes with a training: `call`, but not in another thread than the one that is followed."""
        return self._counted(call, self._is_nobodys)

    def within(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, in whatever thread, unless nothing is watched any more."""
        return self._counted(call, lambda: True)

    def _counted(self, call: Callable[..., Any], may: Callable[[], bool]) -> Callable[..., Any]:
        """`call`, unless it is another thread's and that one may not, or nothing is watched any more."""

        def run(*args: Any) -> Any:
            if self._ident != get_ident() and not may():
                return None
            under_way = self._under_way
            under_way.append(None)
            try:
                # Whoever switches it off waits for what is under way; so it is asked only now.
                return None if self.off else call(*args)
            finally:
                under_way.pop()

        return run

    def leads(self) -> None:
        """This thread runs the forward pass of a wrapped model: it is the one to be followed."""
        if self._ident == get_ident():
            self._leads = True
        elif not in_backward():
            with self._lock:
                if not (self._leads and self._is_alive()):
                    self._follow()
                    self._leads = True

    # ------------------------------------------------------------------ which thread

    def _joins(self) -> bool:
        """Whether this thread, which is about to train and is not followed, is to be told of."""
        if in_backward():
            return True
        with self._lock:
            if not self.off and not self._is_alive():
                if self._watches():
                    self._follow()
                return True
            first, self._overlaps = not self._overlaps, True
            if first:
                self._drained = False
                self.off = self._switch_off()
        self._drain()
        if first:
            self._clean_up()
        return False

    def _may_update(self) -> bool:
        """Whether this thread, which is about to update and is not followed, is to be told of."""
        return (not self._overlaps and self._is_alive()) or self._joins()

    def _is_nobodys(self) -> bool:
        """Whether what this thread does is not that of another training."""
        return in_backward() or not self._is_alive()

    def _follow(self) -> None:
        self._ident, self._thread = get_ident(), weakref.ref(threading.current_thread())
        self._leads = False
        self._begun()

    def _is_alive(self) -> bool:
        """Whether the thread that is followed is there; its ident may be another one's once it is not."""
        thread = None if self._thread is None else self._thread()
        if thread is None:
            return False
        if isinstance(thread, threading._DummyThread):
            # Not made by `threading`, which does not know when it ends.
            return self._ident in sys._current_frames()
        return thread.is_alive()

    def _drain(self) -> None:
        """Wait until no call is under way that began before it was switched off."""
        end = time.monotonic() + _PATIENCE_SECONDS
        while not self._drained and self._under_way and time.monotonic() < end:
            time.sleep(_PAUSE_SECONDS)
        self._drained = True


def in_backward() -> bool:
    """Whether a backward pass is under way in this thread."""
    return bool(torch._C._current_graph_task_id() >= 0)
