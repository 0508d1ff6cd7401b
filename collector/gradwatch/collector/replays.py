"""What replays of bad micro-batches say: the operator that was first, and whether it is the device. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradwatch.collector.model import Judgement, Operator
from gradwatch.collector.observations import Replay

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gradwatch.collector.model import Replayed, Sighting
    from gradwatch.collector.observations import Autopsy


def own(replayed: Iterable[Replayed], sighting: Sighting) -> Autopsy | None:
    """What the sighting's rank found when it replayed its micro-batch itself."""
    return next(
        (one.autopsy for one in replayed if one.by_rank == sighting.rank and _is_of(one, sighting)), None
    )


def operator_of(autopsy: Autopsy | None) -> Operator | None:
    """The operator in which it originates, or why it is not known."""
    if autopsy is None:
        return None
    missing = [autopsy.reason] if autopsy.reason else []
    if autopsy.replay is Replay.FINITE:
        missing.append("the micro-batch gave finite gradients when it was replayed")
    return Operator(
        name=autopsy.operator,
        phase=autopsy.phase,
        module=autopsy.module,
        module_class=autopsy.module_class,
        source=autopsy.source,
        code=autopsy.code,
        inputs=autopsy.inputs,
        value=autopsy.value,
        missing=(*missing, *autopsy.missing),
    )


def judge(replayed: Iterable[Replayed], sighting: Sighting) -> Judgement | None:
    """What follows from where the micro-batch went bad again; None when it was not replayed at all."""
    known = [one for one in replayed if _is_of(one, sighting)]
    here = {one.autopsy.replay for one in known if one.by_rank == sighting.rank}
    elsewhere = {one.autopsy.replay for one in known if one.by_rank != sighting.rank}
    if Replay.REPRODUCED in elsewhere:
        return Judgement.DETERMINISTIC
    if Replay.REPRODUCED in here:
        return Judgement.ONLY_THERE if Replay.FINITE in elsewhere else Judgement.REPEATED_THERE
    return Judgement.TRANSIENT if Replay.FINITE in here else None


def _is_of(one: Replayed, sighting: Sighting) -> bool:
    return one.autopsy.of_rank == sighting.rank and one.autopsy.round == sighting.round
