"""Notice that this process has sent tensors to single ranks, or all to all, as pipelines and experts do.

What enters a model may then have been made by another rank, and is no batch.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from torch import distributed

from gradwatch.agent.probe.saves import when_imported

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

_FUNCTIONS = ("send", "isend", "recv", "irecv", "all_to_all", "all_to_all_single")
_FUNCTIONAL = "torch.distributed._functional_collectives"
_FUNCTIONAL_NAMES = ("all_to_all_single", "all_to_all_single_autograd")


def notice_exchanges(seen: Callable[[], object]) -> None:
    """Have `seen` called at each such exchange; it must not raise.

    The functions are exchanged wherever torch itself looks them up: `P2POp` compares them by identity.
    """
    if not distributed.is_available():
        return
    modules = [distributed, distributed.distributed_c10d]
    for name in _FUNCTIONS:
        original = getattr(distributed, name, None)
        if original is not None:
            wrapped = _telling(original, seen)
            for module in modules:
                if getattr(module, name, None) is original:
                    setattr(module, name, wrapped)

    def patch(module: ModuleType) -> None:
        for name in _FUNCTIONAL_NAMES:
            original = getattr(module, name, None)
            if original is not None:
                setattr(module, name, _telling(original, seen))

    when_imported({_FUNCTIONAL: patch})


def _telling(original: Any, seen: Callable[[], object]) -> Any:
    @functools.wraps(original)
    def exchange(*args: Any, **kwargs: Any) -> Any:
        seen()
        return original(*args, **kwargs)

    return exchange
