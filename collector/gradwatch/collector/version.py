"""The version of this package."""

from __future__ import annotations

import importlib.metadata


def collector_version() -> str:
    """The installed version; "unknown" when it runs from unpacked files."""
    try:
        return importlib.metadata.version("gradwatch")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
