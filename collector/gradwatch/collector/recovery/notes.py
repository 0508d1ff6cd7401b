"""What sidecars and ranks say about a rollback that is under way. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from gradwatch.collector.observations import CanLoad, Loaded, TaskDone, TaskKind
from gradwatch.collector.recovery.model import Loaders, Phase

if TYPE_CHECKING:
    from gradwatch.collector.model import Event
    from gradwatch.collector.policy.dossier import Dossier


def note(dossier: Dossier, event: Event) -> Dossier:
    """The dossier with what one record says."""
    if isinstance(event.body, CanLoad):
        return _can_load(dossier, event)
    if isinstance(event.body, Loaded):
        return _loaded(dossier, event.body, event.rank)
    if isinstance(event.body, TaskDone):
        return _done(dossier, event.body)
    return dossier


def _can_load(dossier: Dossier, event: Event) -> Dossier:
    if event.attempt is None or event.rank is None:
        return dossier
    known = dossier.loaders
    ranks = known.ranks if known is not None and known.attempt == event.attempt else ()
    return replace(dossier, loaders=Loaders(event.attempt, tuple(sorted({*ranks, event.rank}))))


def _loaded(dossier: Dossier, body: Loaded, rank: int | None) -> Dossier:
    recovery = dossier.recovery
    if recovery is None or recovery.phase is not Phase.LOADING or body.order != recovery.decision:
        return dossier
    if body.error or rank is None:
        return replace(dossier, recovery=replace(recovery, error=recovery.error or body.error))
    loaded = tuple(sorted({*recovery.loaded, rank}))
    return replace(dossier, recovery=replace(recovery, loaded=loaded))


def _done(dossier: Dossier, body: TaskDone) -> Dossier:
    recovery = dossier.recovery
    if recovery is None or body.id != recovery.decision:
        return dossier
    error = body.error or None
    if body.kind is TaskKind.SCAN and recovery.phase is Phase.SCANNING:
        return replace(dossier, recovery=replace(recovery, scanned=True, error=error))
    if body.kind is TaskKind.QUARANTINE and recovery.phase is Phase.QUARANTINING:
        return replace(dossier, recovery=replace(recovery, set_aside=True, error=error))
    return dossier
