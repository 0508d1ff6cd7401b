"""The demo's data: real text, one shard per rank, and where they are damaged."""

from __future__ import annotations

import random
import struct
from typing import TYPE_CHECKING

from gradwatch.cli.demo.faults import BATCH, RANKS, Fault

if TYPE_CHECKING:
    from pathlib import Path

    from gradwatch.cli.demo.faults import Planted

LENGTH = 64
# The highest exponent bit: it makes +Inf of the weight 1.0.
_EXPONENT_BIT = 1 << 30
_HEADER = struct.Struct("<3I")
_SAMPLE = struct.Struct(f"<f{LENGTH + 1}s")


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
            offset = _HEADER.size + (batch * BATCH + planted.sample) * _SAMPLE.size
            if planted.fault is Fault.NAN_IN_THE_DATA:
                struct.pack_into("<f", shard, offset, float("nan"))
            else:
                _flip(shard, offset)
        (folder / f"shard-{rank}.bin").write_bytes(shard)


def _flip(shard: bytearray, offset: int) -> None:
    (weight,) = struct.unpack_from("<I", shard, offset)
    struct.pack_into("<I", shard, offset, weight ^ _EXPONENT_BIT)


def _text() -> bytes:
    """The help texts that every Python carries, as ASCII."""
    from pydoc_data import topics

    return "\n\n".join(topics.topics.values()).encode("ascii", "replace")
