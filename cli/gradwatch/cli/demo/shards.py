"""The demo's data: real text, one shard per rank, and one flipped bit in one of them."""

from __future__ import annotations

import dataclasses
import random
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

RANKS = 4
STEPS = 30
BATCH = 8
LENGTH = 64
# The forward pass carries the damage into the loss: so every gradient of that rank goes
# non-finite, and the first to arrive in the backward pass is that of the last layer.
FIRST_PARAMETER = "head.weight"
_EARLIEST_STEP = 5
_LATEST_STEP = 20
# The highest exponent bit: it makes +Inf of the weight 1.0.
_EXPONENT_BIT = 1 << 30
_HEADER = struct.Struct("<3I")
_SAMPLE = struct.Struct(f"<f{LENGTH + 1}s")


@dataclasses.dataclass(frozen=True)
class Planted:
    """Where the data is damaged, hence what the verdict must be.

    Attributes:
        sample: index within the batch.
    """

    rank: int
    step: int
    sample: int
    parameter: str = FIRST_PARAMETER


def plant(seed: int) -> Planted:
    """Draw a place."""
    draw = random.Random(seed)  # noqa: S311 - to be repeatable, not secret
    return Planted(draw.randrange(RANKS), draw.randint(_EARLIEST_STEP, _LATEST_STEP), draw.randrange(BATCH))


def write(folder: Path, planted: Planted, seed: int) -> None:
    """Write the shards, the damaged one among them.

    Raises:
        OSError: the folder cannot be written.
    """
    text = _text()
    draw = random.Random(seed)  # noqa: S311 - to be repeatable, not secret
    for rank in range(RANKS):
        shard = bytearray(_HEADER.pack(STEPS, BATCH, LENGTH))
        for _ in range(STEPS * BATCH):
            start = draw.randrange(len(text) - LENGTH - 1)
            shard += _SAMPLE.pack(1.0, text[start : start + LENGTH + 1])
        if rank == planted.rank:
            _flip(shard, _HEADER.size + (planted.step * BATCH + planted.sample) * _SAMPLE.size)
        (folder / f"shard-{rank}.bin").write_bytes(shard)


def _flip(shard: bytearray, offset: int) -> None:
    (weight,) = struct.unpack_from("<I", shard, offset)
    struct.pack_into("<I", shard, offset, weight ^ _EXPONENT_BIT)


def _text() -> bytes:
    """The help texts that every Python carries, as ASCII."""
    from pydoc_data import topics

    return "\n\n".join(topics.topics.values()).encode("ascii", "replace")
