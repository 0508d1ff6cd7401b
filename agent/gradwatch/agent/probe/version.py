"""The installed version of Gradwatch."""

from __future__ import annotations

import importlib.metadata


def probe_version() -> str:
    """Such as "0.1.0"; "unknown" when it runs from a folder without metadata."""
    try:
        return importlib.metadata.version("gradwatch")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
