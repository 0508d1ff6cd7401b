"""Which step a checkpoint is of: the probe's, else a number in its name that is known to mean the same. Pure.

A number alone proves nothing: an epoch rises with the step too. What is not known is not good.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from gradwatch.collector.observations import StepSource

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gradwatch.collector.observations import CheckpointStep
    from gradwatch.collector.policy.dossier import Checkpoint
    from gradwatch.collector.recovery.model import Save

_DIGITS = re.compile(r"\d+")


def step_of(
    path: str, told: Iterable[CheckpointStep], saves: Sequence[Save], ledger: Sequence[Checkpoint]
) -> int | None:
    """The step of a checkpoint; None when it is not known.

    Args:
        path: its absolute path.
        told: the numbers in it and in its name.
        saves: that ranks told of, oldest first.
        ledger: the other checkpoints.
    """
    saved = next((save.step for save in reversed(saves) if is_of(save.path, path)), None)
    if saved is not None:
        return saved
    inner = [one.step for one in told if one.source is not StepSource.NAME]
    named = [one.step for one in told if one.source is StepSource.NAME]
    # Saved into a buffer, or under another name first: then no checkpoint has the name.
    begun = {save.step for save in saves if not any(is_of(save.path, one.path) for one in ledger)}
    for step in (*inner, *named):
        if step in begun:
            return step
    agreed = next((step for step in named if step in inner), None)
    if agreed is not None:
        return agreed
    return named[0] if named and _is_trusted(path, ledger) else None


def is_of(saved: str, checkpoint: str) -> bool:
    """Whether a path that was saved to is that checkpoint, or a file in it."""
    return bool(saved) and (saved == checkpoint or saved.startswith(checkpoint.rstrip("/") + "/"))


def _is_trusted(path: str, ledger: Iterable[Checkpoint]) -> bool:
    """Whether one that differs from it in the digits of its name only has its step for a number there."""
    pattern = _DIGITS.sub("#", path)
    return any(
        one.path != path
        and one.step is not None
        and str(one.step) in _DIGITS.findall(one.path)
        and _DIGITS.sub("#", one.path) == pattern
        for one in ledger
    )
