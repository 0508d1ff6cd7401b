"""Which line of the user's code is running."""

from __future__ import annotations

import functools
import linecache
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import CodeType, FrameType

# File name and line number.
Line: TypeAlias = "tuple[str, int]"

_TORCH = str(Path(torch.__file__).parent) + os.sep
_OWN = str(Path(__file__).parent.parent) + os.sep
_PACKAGES = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")
_USER, _PACKAGE, _NOBODY = range(3)


def line_below(outermost: CodeType) -> Line | None:
    """The innermost line of the user's own code that is running, else of a package.

    Args:
        outermost: code beyond which nobody is to look.
    """
    walk: FrameType | None = sys._getframe(1)
    package: Line | None = None
    while walk is not None and walk.f_code is not outermost:
        whose = _whose(walk.f_code.co_filename)
        if whose == _USER:
            return walk.f_code.co_filename, walk.f_lineno
        if whose == _PACKAGE and package is None:
            package = walk.f_code.co_filename, walk.f_lineno
        walk = walk.f_back
    return package


def innermost(lines: Iterable[Line]) -> Line | None:
    """The first of the user's own lines, else the first of a package's.

    Args:
        lines: of a stack, the innermost first.
    """
    package: Line | None = None
    for line in lines:
        whose = _whose(line[0])
        if whose == _USER:
            return line
        if whose == _PACKAGE and package is None:
            package = line
    return package


def named(line: Line) -> str:
    """`train.py:42`: relative to the working directory, or to the packages."""
    name, number = line
    for packages in _PACKAGES:
        if packages in name:
            return f"{name.rpartition(packages)[2]}:{number}"
    here = str(Path.cwd()) + os.sep
    return f"{name.removeprefix(here)}:{number}"


def code_of(line: Line) -> str:
    """The line itself; "" when its file cannot be read."""
    return linecache.getline(*line).strip()


@functools.cache
def _whose(name: str) -> int:
    if name.startswith((_TORCH, _OWN, "<")):
        return _NOBODY
    return _PACKAGE if any(packages in name for packages in _PACKAGES) else _USER
