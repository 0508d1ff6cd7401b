"""Which replica's parameters differ, and in which parameter: from the checksums of all ranks. Pure."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gradwatch.collector.observations import Checksum

_MODULO = 1 << 64


def odd_ones(checksums: Mapping[int, Checksum]) -> tuple[int, ...]:
    """The ranks whose parameters are not those of most; all when it cannot be told whose are right.

    Args:
        checksums: by rank, of one model in one round.
    """
    groups = Counter(checksum.sums for checksum in checksums.values())
    if len(groups) <= 1:
        return ()
    (sums, most), (_, second) = groups.most_common(2)
    if most == second:
        return tuple(sorted(checksums))
    return tuple(sorted(rank for rank, checksum in checksums.items() if checksum.sums != sums))


def differing(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The ordinal of the only parameter in which two replicas differ; None if there are several.

    The first sum is that of all parameters; each further one stands for a bit of the ordinal, and is of those
    parameters that have the bit set. With one parameter that differs, each differs as much as the total, or
    not at all.
    """
    differences = [(a - b) % _MODULO for a, b in zip(one, other, strict=False)]
    if len(one) != len(other) or not differences or differences[0] == 0:
        return None
    total, *bits = differences
    if any(bit not in {0, total} for bit in bits):
        return None
    return sum(1 << place for place, bit in enumerate(bits) if bit)
