"""The side of Gradwatch that lives where the training runs.

Importing it imports neither torch nor grpc, and nearly nothing else: torch loads
`gradwatch.agent.probe.autoload` through it in every process.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradwatch.agent.probe.watch import Watch, watch

__all__ = ["Watch", "watch"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from gradwatch.agent.probe import watch as module

        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
