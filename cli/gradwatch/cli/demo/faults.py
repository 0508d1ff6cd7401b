"""What the demo can break, and what must be said of it."""

from __future__ import annotations

import dataclasses
import enum
import random
from typing import Any

RANKS = 4
BATCH = 8
# What goes bad in the forward pass, or before, makes every gradient of that rank non-finite, and the first
# to arrive in the backward pass is that of the last layer.
FIRST_PARAMETER = "head.weight"
REPLICA_CHECK_EVERY = 5
# Of four.
BAD_MICRO_BATCH = 2


class Fault(str, enum.Enum):
    """What the demo can break."""

    FLIPPED_BIT = "flipped-bit"
    RECURRING_NAN = "recurring-nan"
    NAN_IN_THE_DATA = "nan-in-the-data"
    MICRO_BATCH = "micro-batch"
    POISONED_WEIGHT = "poisoned-weight"
    LOG_OF_ZERO = "log-of-zero"
    SQRT_OF_ZERO = "sqrt-of-zero"
    MASKED_SOFTMAX = "masked-softmax"
    SHARED_STATISTICS = "shared-statistics"
    GRADIENT = "gradient"
    TWO_RANKS = "two-ranks"
    LEARNING_RATE = "learning-rate"
    OVERFLOW_IN_THE_SUM = "overflow-in-the-sum"
    LOSS_SCALE = "loss-scale"
    FROZEN_PARAMETER = "frozen-parameter"
    DIVERGED_REPLICA = "diverged-replica"

    @property
    def says(self) -> str:
        """A sentence, without its full stop."""
        return _FAULTS[self].says


@dataclasses.dataclass(frozen=True)
class _About:
    """What is known of a fault.

    Attributes:
        cause: that must be named; None when there must be no incident.
        parameter: likewise; None when none is.
        operator: likewise.
    """

    says: str
    cause: str | None
    parameter: str | None = FIRST_PARAMETER
    operator: str | None = None


_FAULTS = {
    Fault.FLIPPED_BIT: _About("one bit of one rank's data is flipped", "input"),
    Fault.RECURRING_NAN: _About("one bit of one rank's data is flipped, later many of another's", "input"),
    Fault.NAN_IN_THE_DATA: _About("one number of one rank's data is NaN", "input"),
    Fault.MICRO_BATCH: _About("the third of four micro-batches of one rank is NaN", "input"),
    Fault.POISONED_WEIGHT: _About("one weight of one rank turns NaN", "parameter"),
    Fault.LOG_OF_ZERO: _About(
        "one rank takes the logarithm of 0 in its forward pass", "forward", operator="aten.log.default"
    ),
    Fault.SQRT_OF_ZERO: _About(
        "one rank takes the square root of 0, which is finite and has no derivative there",
        "backward",
        "blocks.1.down.bias",
        "aten.div.Tensor",
    ),
    Fault.MASKED_SOFTMAX: _About(
        "one rank takes a softmax of which everything is masked", "forward", operator="aten._softmax.default"
    ),
    Fault.SHARED_STATISTICS: _About(
        "one rank's data are NaN, and a layer that shares its statistics, as SyncBatchNorm does, takes that "
        "to every rank before there are gradients",
        "input",
    ),
    Fault.GRADIENT: _About("one element of one gradient of one rank turns NaN", "backward"),
    Fault.TWO_RANKS: _About("the same gradient turns NaN on two ranks at once", "backward"),
    Fault.LEARNING_RATE: _About("the learning rate is 1e30 from one step on", "forward"),
    Fault.OVERFLOW_IN_THE_SUM: _About(
        "gradients are finite on every rank, and their sum is not", "reduction", None
    ),
    Fault.LOSS_SCALE: _About("a GradScaler's loss overflows now and again, which is no fault", None, None),
    Fault.FROZEN_PARAMETER: _About(
        "one gradient of one rank is finite, and its square is not: AdamW would never move it again",
        "optimizer_state",
    ),
    Fault.DIVERGED_REPLICA: _About(
        "one weight of one rank is not that of the others any more",
        "replica_divergence",
        "blocks.1.up.weight",
    ),
}
IN_THE_DATA = (Fault.FLIPPED_BIT, Fault.RECURRING_NAN, Fault.NAN_IN_THE_DATA)
_ON_EVERY_RANK = {Fault.LEARNING_RATE, Fault.OVERFLOW_IN_THE_SUM, Fault.LOSS_SCALE}


@dataclasses.dataclass(frozen=True)
class Planted:
    """What is broken, and where.

    Attributes:
        rank: the lowest, if it is broken on several.
        step: in which it is.
        sample: index within the batch of the one that is damaged, if it is the data.
        steps: of the whole training.
        again_rank: whose data is damaged again, in the batches `again_from` to `again_to`, the latter left
            out; None when nobody's is.
    """

    rank: int
    step: int
    sample: int
    fault: Fault = Fault.FLIPPED_BIT
    steps: int = 30
    again_rank: int | None = None
    again_from: int = 0
    again_to: int = 0

    @property
    def in_the_data(self) -> bool:
        """Whether the data are damaged; else the script breaks it."""
        return self.fault in IN_THE_DATA

    @property
    def damaged(self) -> dict[int, list[int]]:
        """By rank, its damaged batches."""
        if not self.in_the_data:
            return {}
        damaged = {self.rank: [self.step]}
        if self.again_rank is not None:
            damaged.setdefault(self.again_rank, []).extend(range(self.again_from, self.again_to))
        return damaged

    @property
    def ranks(self) -> tuple[int, ...]:
        """All ranks that it is broken on."""
        if self.fault in _ON_EVERY_RANK:
            return tuple(range(RANKS))
        return (self.rank, self.rank + 1) if self.fault is Fault.TWO_RANKS else (self.rank,)

    @property
    def seen_at(self) -> int:
        """The step in which it shows."""
        if self.fault is Fault.LEARNING_RATE:
            return self.step + 1
        late = -self.step % REPLICA_CHECK_EVERY
        return self.step + late if self.fault is Fault.DIVERGED_REPLICA else self.step

    @property
    def parameter(self) -> str | None:
        """That must be named."""
        return _FAULTS[self.fault].parameter

    @property
    def cause(self) -> str | None:
        """That must be named; None when there must be no incident."""
        return _FAULTS[self.fault].cause

    def is_told_by(self, incident: dict[str, Any] | None) -> bool:
        """Whether an incident says what was planted, and nothing else."""
        if incident is None or self.cause is None:
            return incident is None and self.cause is None
        if (incident["cause"], incident["step"]) != (self.cause, self.seen_at):
            return False
        if self.cause == "reduction":
            return incident["first"] is None
        first = incident["first"] or {}
        operator = _FAULTS[self.fault].operator
        spreads = self.fault is Fault.SHARED_STATISTICS
        clean = [] if spreads else [rank for rank in range(RANKS) if rank not in self.ranks]
        return (
            (first.get("rank"), first.get("parameter")) == (self.ranks[0], self.parameter)
            and operator in {None, first.get("operator")}
            and (self.fault is not Fault.MICRO_BATCH or first.get("microbatch") == BAD_MICRO_BATCH)
            and incident["clean_ranks"] == clean
            and incident["tie"] == (len(self.ranks) > 1)
        )

    @property
    def sentence(self) -> str:
        """What was planted, as the end of `Planted: `."""
        if self.cause is None:
            return f"{self.fault.says}. Nothing is to be reported."
        on = " and ".join(map(str, self.ranks))
        where = {1: f"rank {on}", RANKS: "all ranks"}.get(len(self.ranks), f"ranks {on}")
        named = "" if self.parameter is None else f", parameter {self.parameter}"
        return f"{where}, step {self.seen_at}{named}, cause {self.cause}."


def plant(seed: int, fault: Fault = Fault.FLIPPED_BIT) -> Planted:
    """Draw a place."""
    draw = random.Random(seed)  # noqa: S311 - to be repeatable, not secret
    planted = Planted(draw.randrange(RANKS), draw.randint(5, 20), draw.randrange(BATCH), fault)
    if fault is Fault.TWO_RANKS:
        return dataclasses.replace(planted, rank=planted.rank % (RANKS - 1))
    if fault is not Fault.RECURRING_NAN:
        return planted
    again = (planted.rank + 1) % RANKS
    # So long that nobody gets past it before a rollback can be decided on.
    return dataclasses.replace(planted, steps=230, again_rank=again, again_from=45, again_to=165)
