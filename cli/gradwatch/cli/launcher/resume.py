"""Where in the command's arguments the path stands that it is to resume from. Pure."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


MARK = "{resume}"
_SHELLS = frozenset({"sh", "ash", "bash", "dash", "fish", "ksh", "mksh", "zsh"})
_SHELL_STRING = re.compile(r"-[A-Za-z]*c[A-Za-z]*")


def takes_path(command: Sequence[str]) -> bool:
    """Whether some argument holds the mark."""
    return any(MARK in argument for argument in command)


def why_refused(command: Sequence[str]) -> str | None:
    """Why the mark cannot stand where it does; None when it can."""
    if MARK in command[0]:
        return f"{MARK} stands in the command's own name: {command[0]}; put it into an argument"
    for at, argument in enumerate(command):
        if PurePath(argument).name not in _SHELLS:
            continue
        string = _shell_string(command[at + 1 :])
        if string is not None and MARK in string:
            return (
                f"{MARK} stands inside a shell string ({PurePath(argument).name} -c), where a path would "
                "be taken for shell code: put the command into a script and give it the path as an "
                "argument, or read GRADWATCH_RESUME_PATH there"
            )
    return None


def arguments(command: Sequence[str], path: str) -> tuple[str, ...]:
    """The command with the path in place of the mark.

    Args:
        command: as the user gave it.
        path: what to resume; "" for nothing: then an argument with the mark is left out, and the bare
            `--flag` before it.
    """
    if path:
        return tuple(argument.replace(MARK, path) for argument in command)
    made: list[str] = []
    for at, argument in enumerate(command):
        if MARK not in argument:
            made.append(argument)
        elif at > 1 and _is_bare_flag(command[at - 1]) and not argument.startswith("-"):
            made.pop()
    return tuple(made)


def _shell_string(after: Sequence[str]) -> str | None:
    """What a shell with these arguments would run as code, if it is told by -c."""
    found = False
    for argument in after:
        if argument.startswith(("-", "+")) and argument != "-":
            found |= _SHELL_STRING.fullmatch(argument) is not None
        elif found:
            return argument
        else:
            return None
    return None


def _is_bare_flag(argument: str) -> bool:
    return (
        argument.startswith("--")
        and len(argument) > len("--")
        and "=" not in argument
        and MARK not in argument
    )
