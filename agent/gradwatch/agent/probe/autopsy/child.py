"""Run something in a forked child, which has the weights as they are now."""

from __future__ import annotations

import functools
import gc
import json
import os
import select
import signal
import sys
import threading
import time
import warnings
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch.overrides import _get_current_function_mode_stack, _push_mode
from torch.utils import _python_dispatch

if TYPE_CHECKING:
    from collections.abc import Callable

_PIECE = 1 << 16
# That a child has to come to life, at first.
_PATIENCE_SECONDS = 0.5


class ChildError(Exception):
    """There was no result; says why in words."""


def in_child(call: Callable[[], dict[str, Any]], *, seconds: float, threads: int = 1) -> dict[str, Any]:
    """Have a forked child call it, and wait.

    Args:
        call: gives what JSON can hold.
        seconds: how long to wait; the child is killed then.
        threads: with which torch computes there: many sums come out otherwise with another number.

    Returns:
        What it gave.

    Raises:
        ChildError: the child could not be made, took too long or died.
    """
    if not hasattr(os, "fork") or sys.platform == "darwin":
        raise ChildError(f"a process cannot be forked safely on {sys.platform}")
    until = time.monotonic() + seconds
    pid, reading = _born(functools.partial(_with_threads, threads, call), seconds, until)
    try:
        data = _read(reading, until)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    finally:
        os.close(reading)
        status = _reap(pid)
    try:
        result: dict[str, Any] = json.loads(data)
    except ValueError:
        raise ChildError(f"the child that replayed it {_ended(status)}") from None
    return result


def _born(call: Callable[[], dict[str, Any]], seconds: float, until: float) -> tuple[int, int]:
    """Fork until a child comes to life.

    Before Python 3.11.10 a child waits for ever for a lock of the interpreter's if another thread was
    just beginning or ending to run Python code, as gloo's do at the end of each reduction
    (https://github.com/python/cpython/issues/112275). A child that lives sends a line's end at once.

    Returns:
        The child, and what it writes to.
    """
    patience = _PATIENCE_SECONDS
    while True:
        pid, reading = _fork(call, seconds)
        left = min(patience, until - time.monotonic())
        if left > 0 and select.select([reading], [], [], left)[0]:
            return pid, reading
        os.kill(pid, signal.SIGKILL)
        os.close(reading)
        _reap(pid)
        if time.monotonic() >= until:
            raise ChildError("no child process came to life")
        patience *= 2


def _fork(call: Callable[[], dict[str, Any]], seconds: float) -> tuple[int, int]:
    reading, writing = os.pipe()
    try:
        with warnings.catch_warnings():
            # Python 3.12 warns that threads are not forked with it: the child starts none and waits for none.
            warnings.simplefilter("ignore")
            pid = os.fork()
    except OSError as error:
        os.close(reading)
        os.close(writing)
        raise ChildError(f"no process could be forked: {error}") from error
    if pid == 0:
        _be_child(call, writing, seconds)
    os.close(writing)
    return pid, reading


def _read(fd: int, until: float) -> bytes:
    """All that comes, up to the end.

    Raises:
        ChildError: that took too long.
    """
    data = b""
    while True:
        left = until - time.monotonic()
        if left <= 0 or not select.select([fd], [], [], left)[0]:
            raise ChildError("it took too long")
        piece = os.read(fd, _PIECE)
        if not piece:
            return data
        data += piece


def _reap(pid: int) -> int | None:
    try:
        return os.waitpid(pid, 0)[1]
    except ChildProcessError:
        # A handler of the user's was faster, or SIGCHLD is ignored.
        return None


def _ended(status: int | None) -> str:
    if status is None:
        return "ended without a word"
    code = os.waitstatus_to_exitcode(status)
    return f"was ended by signal {-code}" if code < 0 else f"ended with {code} and without a word"


def _be_child(call: Callable[[], dict[str, Any]], writing: int, seconds: float) -> NoReturn:
    """Never returns: nothing of the training's may run twice, such as its handlers at exit."""
    try:
        os.write(writing, b"\n")
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGCHLD, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        # Should the training be killed meanwhile.
        signal.alarm(int(seconds) + 1)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        # Nobody's finalizers.
        gc.disable()
        warnings.simplefilter("ignore")
        data = json.dumps(call()).encode()
        while data:
            data = data[os.write(writing, data) :]
    except BaseException:
        os._exit(1)
    os._exit(0)


def _with_threads(threads: int, call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Call it where torch computes with so many threads.

    The threads of the parent's pool were not forked with it, and OpenMP waits for them for ever. A thread
    that is new, and asks for a number first, gets a pool of its own.
    """
    if threads == 1:
        torch.set_num_threads(1)
        return call()
    # They belong to a thread: what the pass ran under, the replay runs under.
    dispatch = _python_dispatch._get_current_dispatch_mode_stack()
    functions: Any = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    results: list[dict[str, Any]] = []

    def run() -> None:
        torch.set_num_threads(threads)
        for mode in dispatch:
            _python_dispatch._push_mode(mode)
        for mode in functions:
            _push_mode(mode)  # type: ignore[no-untyped-call]
        results.append(call())

    thread = threading.Thread(target=run, daemon=True)
    threading.excepthook = lambda _: None
    thread.start()
    thread.join()
    return results[0]
