"""Keep the ledger of a job's checkpoints from what sidecars and ranks report. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from gradwatch.collector import observations as obs
from gradwatch.collector.observations import Completeness
from gradwatch.collector.policy.dossier import Checkpoint, Dossier, with_checkpoint
from gradwatch.collector.recovery.model import Root, Save
from gradwatch.collector.recovery.steps import is_of, step_of

if TYPE_CHECKING:
    from gradwatch.collector.model import Event

# Older saves and lines are forgotten: what is still on disk is reported again.
_SAVES = 1024
_LINES = 1024


def see(dossier: Dossier, event: Event) -> Dossier:
    """The dossier with what one record tells of checkpoints."""
    body = event.body
    if isinstance(body, obs.CheckpointSeen):
        return _saved(dossier, body, event.received_at if event.at is None else event.at)
    if isinstance(body, obs.CheckpointScanned):
        return _scanned(dossier, body, event.received_at)
    if isinstance(body, obs.CheckpointGone):
        lines = (replace(one, gone=True) if one.path == body.path else one for one in dossier.checkpoints)
        return replace(dossier, checkpoints=tuple(lines))
    if isinstance(body, obs.CheckpointRoot):
        root = Root(body.launch, body.node, body.root, body.error)
        others = tuple(known for known in dossier.roots if known.launch != root.launch)
        return replace(dossier, roots=(*others, root)[-64:])
    return dossier


def set_aside(dossier: Dossier, paths: tuple[str, ...], *, moved: bool) -> Dossier:
    """The dossier with these checkpoints quarantined.

    Args:
        dossier: the job's.
        paths: absolute.
        moved: they are no longer where they were.
    """
    lines = (
        replace(one, quarantined=True, gone=one.gone or moved) if one.path in paths else one
        for one in dossier.checkpoints
    )
    return replace(dossier, checkpoints=tuple(lines))


def _saved(dossier: Dossier, body: obs.CheckpointSeen, at: float) -> Dossier:
    if body.step is None:
        return dossier
    save = Save(body.path, body.step)
    others = tuple(known for known in dossier.saves if known != save)
    dossier = replace(dossier, saves=(*others, save)[-_SAVES:])
    known = next((one for one in dossier.checkpoints if is_of(body.path, one.path)), None)
    if known is None:
        return dossier
    if body.declared or known.modified_at > at:
        return _replaced(dossier, replace(known, step=body.step))
    # It is being written again: what was known of it is no more.
    return _replaced(dossier, replace(known, step=body.step, complete=False, finite=None))


def _scanned(dossier: Dossier, body: obs.CheckpointScanned, now: float) -> Dossier:
    complete = body.completeness is Completeness.COMPLETE
    known = next((one for one in dossier.checkpoints if one.path == body.path), None)
    same = known is not None and known.modified_at == body.modified_at
    line = Checkpoint(
        path=body.path,
        step=step_of(body.path, body.steps, dossier.saves, dossier.checkpoints),
        complete=complete,
        finite=body.finite if complete else None,
        bad_buffers=body.bad_buffers,
        seen_at=known.seen_at if known is not None and same else now,
        # Moved away, and now there again: it is another one.
        quarantined=known is not None and same and known.quarantined and not known.gone,
        modified_at=body.modified_at,
        found=body.found or body.error or body.reason,
    )
    dossier = with_checkpoint(dossier, line)
    return replace(dossier, checkpoints=dossier.checkpoints[-_LINES:])


def _replaced(dossier: Dossier, line: Checkpoint) -> Dossier:
    """The dossier with a line changed, in its place."""
    return replace(
        dossier,
        checkpoints=tuple(line if known.path == line.path else known for known in dossier.checkpoints),
    )
