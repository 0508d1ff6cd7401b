"""What replays of bad micro-batches say: the operator that was first, and where the fault is. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from gradwatch.collector.model import Judgement, Operator
from gradwatch.collector.observations import Replay

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gradwatch.collector.model import Rehearsed, Replayed, Sighting
    from gradwatch.collector.observations import Autopsy, Rehearsal


def own(replayed: Iterable[Replayed], sighting: Sighting) -> Autopsy | None:
    """What the sighting's rank found when it replayed its micro-batch itself."""
    return next(
        (one.autopsy for one in replayed if one.by_rank == sighting.rank and _is_of(one, sighting)), None
    )


def recurrence(replayed: Iterable[Replayed], sighting: Sighting) -> Autopsy | None:
    """What was found, with its line, when the sighting's rank went bad again in a later round."""
    return next(
        (
            one.autopsy
            for one in replayed
            if one.by_rank == one.autopsy.of_rank == sighting.rank
            and one.autopsy.root == sighting.root
            and one.autopsy.round > sighting.round
            and one.autopsy.operator is not None
            and one.autopsy.source is not None
        ),
        None,
    )


def operator_of(autopsy: Autopsy | None, again: Autopsy | None = None) -> Operator | None:
    """The operator in which it originates, or why it is not known.

    Args:
        autopsy: of the round that went bad.
        again: of a later one, where the operator was seen with its line: it stands for the first only if that
            names no other operator.
    """
    if autopsy is None:
        return None
    seen = autopsy.replay is Replay.REPRODUCED
    if again is not None and not seen and autopsy.operator in {None, again.operator}:
        when = f"it was seen when it came again, at step {again.step}"
        return operator_of(replace(again, missing=(*again.missing, when)))
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


class Judged(NamedTuple):
    """What follows from where a micro-batch went bad again.

    Attributes:
        judgement: None when it was not replayed at all.
        doubts: why its rank's replay is not shown to have repeated the pass.
        finite_on: other ranks that have repeated the pass, and to whom it gave finite gradients.
        by_clean_pass: nothing of the bad pass could be compared; a clean pass of the model came out equal.
    """

    judgement: Judgement | None
    doubts: tuple[str, ...] = ()
    finite_on: tuple[int, ...] = ()
    by_clean_pass: bool = False


def judge(replayed: Iterable[Replayed], rehearsed: Iterable[Rehearsed], sighting: Sighting) -> Judged:
    """What follows from where the micro-batch went bad again.

    That it went bad in the same places is proof by itself. That it did not says something only if the replay
    is shown to have repeated the pass.
    """
    known = [one for one in replayed if _is_of(one, sighting)]
    here = [one.autopsy for one in known if one.by_rank == sighting.rank]
    elsewhere = [one for one in known if one.by_rank != sighting.rank]
    if any(one.autopsy.replay is Replay.REPRODUCED for one in elsewhere):
        return Judged(Judgement.DETERMINISTIC)
    finite_on = {
        one.by_rank for one in elsewhere if one.autopsy.replay is Replay.FINITE and one.autopsy.faithful
    }
    if any(one.replay is Replay.REPRODUCED for one in here):
        judgement = Judgement.ONLY_THERE if finite_on else Judgement.REPEATED_THERE
        return Judged(judgement, finite_on=tuple(sorted(finite_on)))
    finite = [one for one in here if one.replay is Replay.FINITE]
    if not finite:
        return Judged(None)
    rehearsals = [
        one.rehearsal
        for one in rehearsed
        if (one.rank, one.rehearsal.of_round) == (sighting.rank, sighting.round)
        and sighting.root in {None, one.rehearsal.root}
    ]
    doubts = [doubt for one in finite for doubt in _doubts(one, rehearsals)]
    if not doubts:
        return Judged(
            Judgement.TRANSIENT,
            finite_on=tuple(sorted(finite_on)),
            by_clean_pass=not all(one.faithful for one in finite),
        )
    return Judged(Judgement.NOT_REPRODUCED, tuple(dict.fromkeys(doubts)))


def _doubts(autopsy: Autopsy, rehearsals: list[Rehearsal]) -> list[str]:
    """Why a replay is not shown to have repeated the pass; empty when it is."""
    if autopsy.faithful:
        return []
    if autopsy.faithful is not None:
        return [*autopsy.doubts] or ["what was finite in that pass did not come out equal"]
    if not rehearsals:
        return [*autopsy.doubts, "nothing was finite to compare, and no clean pass has been replayed"]
    unequal = [one for one in rehearsals if not one.equal]
    if not unequal:
        return []
    return [doubt for one in unequal for doubt in one.doubts] or [
        "a clean pass of the same model did not come out equal either"
    ]


def _is_of(one: Replayed, sighting: Sighting) -> bool:
    return one.autopsy.of_rank == sighting.rank and one.autopsy.round == sighting.round
