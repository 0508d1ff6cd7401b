"""What performing a decision does, or in a dry run would do: a sentence. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradwatch.collector.policy.model import Action, Quarantine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradwatch.collector.policy.decision import Target

_SHOWN = 3


def effect_of(
    action: Action, target: Target | None, quarantine: Sequence[str], how: Quarantine, *, dry: bool
) -> str:
    """What is done: "resume /ckpts/400, move /ckpts/500"; in a dry run each verb after "would".

    Args:
        action: the decision's.
        target: where a rollback goes back to.
        quarantine: paths that must not be resumed from.
        how: what becomes of these.
        dry: whether nothing is to be done.
    """
    done: list[tuple[str, str]] = []
    if action is Action.HALT:
        done.append(("stop", "the job with exit code 93"))
    if action is Action.ROLLBACK and target is None:
        done.append(("stop", "the job, and resume the newest checkpoint that is then found good"))
    if action is Action.ROLLBACK and target is not None:
        done.append(("resume", target.path))
        if quarantine:
            verb = "move" if how is Quarantine.MOVE else "mark as bad"
            shown = " and ".join(quarantine[:_SHOWN])
            more = len(quarantine) - _SHOWN
            done.append((verb, f"{shown} and {more} more" if more > 0 else shown))
    would = "would " if dry else ""
    return ", ".join(f"{would}{verb} {what}" for verb, what in done) or "nothing is done"
