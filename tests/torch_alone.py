"""A training image's packages: torch and what it needs, and none of ours."""

from __future__ import annotations

import sys
from pathlib import Path

_PACKAGES = (
    "torch",
    "torchgen",
    "functorch",
    "numpy",
    "numpy.libs",
    "typing_extensions.py",
    "sympy",
    "mpmath",
    "filelock",
    "networkx",
    "jinja2",
    "markupsafe",
    "fsspec",
    "setuptools",
)


def link_torch(folder: Path) -> None:
    """Link those of this Python into a folder.

    Args:
        folder: that exists.
    """
    for package in _PACKAGES:
        found = [Path(path) / package for path in sys.path if (Path(path) / package).exists()]
        if found:
            (folder / package).symlink_to(found[0])
