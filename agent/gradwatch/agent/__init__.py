"""The side of Gradwatch that lives where the training runs.

Importing it imports neither torch nor grpc.
"""

from gradwatch.agent.probe.watch import Watch, watch

__all__ = ["Watch", "watch"]
