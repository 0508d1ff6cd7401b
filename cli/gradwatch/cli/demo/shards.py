"""The demo's data: real text, one shard per rank, and one flipped bit in one of them."""

from __future__ import annotations

import dataclasses
import enum
import random
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

RANKS = 4
BATCH = 8
LENGTH = 64
# The forward pass carries the damage into the loss: so every gradient of that rank goes
# non-finite, and the first to arrive in the backward pass is that of the last layer.
FIRST_PARAMETER = "head.weight"
# The highest exponent bit: it makes +Inf of the weight 1.0.
_EXPONENT_BIT = 1 << 30
_HEADER = struct.Struct("<3I")
_SAMPLE = struct.Struct(f"<f{LENGTH + 1}s")


class Fault(str, enum.Enum):
    """What the demo can break."""

    FLIPPED_BIT = "flipped-bit"
    RECURRING_NAN = "recurring-nan"

    @property
    def says(self) -> str:
        """A sentence."""
        return {
            Fault.FLIPPED_BIT: "one bit of one rank's data is flipped",
            Fault.RECURRING_NAN: "one bit of one rank's data is flipped, later many of another's",
        }[self]


@dataclasses.dataclass(frozen=True)
class Planted:
    """Where the data is damaged, hence what the first verdict must be.

    Attributes:
        sample: index within the batch.
        steps: of the whole training.
        again_rank: whose data is damaged again, in the batches `again_from` to `again_to`, the latter left
            out; None when nobody's is.
    """

    rank: int
    step: int
    sample: int
    parameter: str = FIRST_PARAMETER
    steps: int = 30
    again_rank: int | None = None
    again_from: int = 0
    again_to: int = 0

    @property
    def damaged(self) -> dict[int, list[int]]:
        """By rank, its damaged batches."""
        damaged = {self.rank: [self.step]}
        if self.again_rank is not None:
            damaged.setdefault(self.again_rank, []).extend(range(self.again_from, self.again_to))
        return damaged


def plant(seed: int, fault: Fault = Fault.FLIPPED_BIT) -> Planted:
    """Draw a place."""
    draw = random.Random(seed)  # noqa: S311 - to be repeatable, not secret
    planted = Planted(draw.randrange(RANKS), draw.randint(5, 20), draw.randrange(BATCH))
    if fault is Fault.FLIPPED_BIT:
        return planted
    again = (planted.rank + 1) % RANKS
    # So long that nobody gets past it before a rollback can be decided on.
    return dataclasses.replace(planted, steps=230, again_rank=again, again_from=45, again_to=165)


def write(folder: Path, planted: Planted, seed: int) -> None:
    """Write the shards, the damaged ones among them.

    Raises:
        OSError: the folder cannot be written.
    """
    text = _text()
    draw = random.Random(seed)  # noqa: S311 - to be repeatable, not secret
    for rank in range(RANKS):
        shard = bytearray(_HEADER.pack(planted.steps, BATCH, LENGTH))
        for _ in range(planted.steps * BATCH):
            start = draw.randrange(len(text) - LENGTH - 1)
            shard += _SAMPLE.pack(1.0, text[start : start + LENGTH + 1])
        for batch in planted.damaged.get(rank, ()):
            _flip(shard, _HEADER.size + (batch * BATCH + planted.sample) * _SAMPLE.size)
        (folder / f"shard-{rank}.bin").write_bytes(shard)


def _flip(shard: bytearray, offset: int) -> None:
    (weight,) = struct.unpack_from("<I", shard, offset)
    struct.pack_into("<I", shard, offset, weight ^ _EXPONENT_BIT)


def _text() -> bytes:
    """The help texts that every Python carries, as ASCII."""
    from pydoc_data import topics

    return "\n\n".join(topics.topics.values()).encode("ascii", "replace")
