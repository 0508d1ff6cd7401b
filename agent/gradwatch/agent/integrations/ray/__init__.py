"""Ray Train: its workers are watched like torchrun's.

Importing it imports no Ray. `gradwatch run -- python train.py` needs nothing of this; a script that wants
to say it itself adds one callback::

    from gradwatch.agent.integrations.ray import WatchCallback

    RunConfig(..., callbacks=[WatchCallback()])
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradwatch.agent.integrations.ray.callback import WatchCallback
    from gradwatch.agent.integrations.ray.collector import ensure_collector
    from gradwatch.agent.integrations.ray.worker import good_checkpoint

__all__ = ["WatchCallback", "ensure_collector", "good_checkpoint"]

_MODULES = {"WatchCallback": "callback", "ensure_collector": "collector", "good_checkpoint": "worker"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
