"""A call that may take long, on a thread that keeps nobody from ending."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

_T = TypeVar("_T")


async def in_thread(call: Callable[[], _T]) -> _T:
    """What `call` returns or raises, from a thread of its own.

    Unlike with `asyncio.to_thread` the process can end while it is stuck, as in a file system that does not
    answer. When the waiting is cancelled, the call goes on and its result is dropped.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_T] = loop.create_future()

    def finish(result: Callable[[], None]) -> None:
        # The loop may be closed by now, and nobody waits any more.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(lambda: None if future.done() else result())

    def run() -> None:
        try:
            value = call()
        except Exception as error:
            failure = error
            finish(lambda: future.set_exception(failure))
        else:
            finish(lambda: future.set_result(value))

    threading.Thread(target=run, daemon=True, name="gradwatch-files").start()
    return await future
