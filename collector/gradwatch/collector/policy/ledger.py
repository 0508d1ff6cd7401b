"""How each checkpoint of the ledger stands. Pure."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from gradwatch.collector.policy.checkpoints import ANY_STEP, unfitness
from gradwatch.collector.policy.decision import Unfit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradwatch.collector.policy.dossier import Checkpoint


class Standing(str, enum.Enum):
    """Whether a checkpoint could be gone back to."""

    GOOD = "good"
    BAD = "bad"  # it holds non-finite values
    UNKNOWN = "unknown"  # not known to be good: not complete, not scanned, or of an unknown step
    QUARANTINED = "quarantined"


_STANDINGS = {
    Unfit.QUARANTINED: Standing.QUARANTINED,
    Unfit.NONFINITE: Standing.BAD,
    Unfit.NONFINITE_BUFFER: Standing.BAD,
}


def standing_of(ledger: Sequence[Checkpoint]) -> dict[str, Standing]:
    """How those that are there stand, by path, whatever the first bad step is."""
    standings = {}
    for checkpoint, unfit in unfitness(ledger, ANY_STEP):
        if unfit is None:
            standings[checkpoint.path] = Standing.GOOD
        elif unfit is not Unfit.GONE:
            standings[checkpoint.path] = _STANDINGS.get(unfit, Standing.UNKNOWN)
    return standings
