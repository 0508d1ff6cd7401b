"""What this host is called, in everything that is reported. Standard library only."""

from __future__ import annotations

import os
import platform

VARIABLE = "GRADWATCH_NODE"


def node_name() -> str:
    """GRADWATCH_NODE, else the host's own name, which in a Kubernetes Pod is the Pod's."""
    return os.environ.get(VARIABLE) or platform.node() or "unknown"
