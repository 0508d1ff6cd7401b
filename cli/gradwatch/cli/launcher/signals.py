"""Signals of the launcher: waited for, not handled, so that each one tells its sender."""

from __future__ import annotations

import contextlib
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

PASSED_ON = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
# Those that ask a program to end.
ENDING = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT})
# si_code of a signal the kernel made, such as a terminal's Ctrl-C, which reaches the
# command without us: it is in the terminal's foreground process group too.
_FROM_KERNEL = 0x80


class Signals:
    """The signals of this process, as a queue.

    Inside `with`, they are blocked and wait to be asked for. One that was ignored when
    we started (`nohup`) stays ignored.
    """

    def __init__(self) -> None:
        self._waited_for: set[signal.Signals] = set()
        self._before: set[signal.Signals | int] = set()

    @contextlib.contextmanager
    def blocked(self) -> Iterator[None]:
        """Block them for the duration."""
        self._waited_for = {signal.SIGCHLD} | {
            number for number in PASSED_ON if signal.getsignal(number) is not signal.SIG_IGN
        }
        self._before = signal.pthread_sigmask(signal.SIG_BLOCK, self._waited_for)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._before)

    def restore_in_child(self) -> None:
        """To be called between fork and exec: a blocked mask would be inherited."""
        signal.pthread_sigmask(signal.SIG_SETMASK, self._before)

    def wait(self, seconds: float) -> list[tuple[signal.Signals, bool]]:
        """Wait for signals.

        Returns:
            Each with whether it came from the terminal; SIGCHLD only ends the wait.
            Empty when the time is up.
        """
        arrived: list[tuple[signal.Signals, bool]] = []
        info = signal.sigtimedwait(self._waited_for, seconds)
        while info is not None:
            number = signal.Signals(info.si_signo)
            if number is not signal.SIGCHLD:
                arrived.append((number, info.si_code == _FROM_KERNEL))
            info = signal.sigtimedwait(self._waited_for, 0)
        return arrived
