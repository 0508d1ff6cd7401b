"""Whether a checkpoint is all there: what its files must be, and whether they hold still. Pure.

A save in flight and a torn one look the same at one moment. A checkpoint is in flight while it changes
between two looks, and while something is missing but its last change is recent; then it is torn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradwatch.agent.checkpoints import find
from gradwatch.agent.checkpoints.result import Completeness

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from gradwatch.agent.checkpoints.dcp import Metadata
    from gradwatch.agent.checkpoints.listing import File

# Longer than a stall of a network file system, shorter than the interval between checkpoints.
SETTLE_SECONDS = 60.0
# The Trainer writes these after the model. All that a sibling has, the next one has in the end.
_EXPECTED = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "scheduler.bin", find.TRAINER_STATE)
_NS = 1e9


def verdict(
    problems: Iterable[str], before: Mapping[str, File], after: Mapping[str, File], now: float
) -> tuple[Completeness, str]:
    """Whether a checkpoint is complete, and why not.

    Args:
        problems: what is missing or damaged, in words.
        before: its files before it was read.
        after: its files after that.
        now: seconds since the epoch, at the second look.
    """
    change = changed(before, after)
    if change is not None:
        return Completeness.IN_FLIGHT, change
    first = next(iter(problems), None)
    if first is None:
        return Completeness.COMPLETE, "all of it is there, and it held still"
    age = now - max((file.mtime_ns for file in after.values()), default=0) / _NS
    if abs(age) < SETTLE_SECONDS:
        return Completeness.IN_FLIGHT, f"{first}; it was still written to {max(age, 0.0):.0f} s ago"
    return Completeness.TORN, first


def changed(before: Mapping[str, File], after: Mapping[str, File]) -> str | None:
    """What changed between two looks, in words; None if nothing did."""
    for path in sorted(before.keys() | after.keys()):
        old, new = before.get(path), after.get(path)
        if old is None:
            return f"{path} has appeared meanwhile"
        if new is None:
            return f"{path} has gone meanwhile"
        if old.size != new.size:
            return f"{path} grew from {old.size} to {new.size} bytes meanwhile"
        if old != new:
            return f"{path} was written to meanwhile"
    return None


def dcp_problems(metadata: Metadata, files: Mapping[str, File]) -> list[str]:
    """What a DCP folder lacks.

    Args:
        metadata: its `.metadata`.
        files: of the folder.
    """
    problems = []
    for shard, length in sorted(metadata.shard_lengths().items()):
        file = files.get(shard)
        if file is None:
            problems.append(f"{shard} is missing")
        elif file.size < length:
            problems.append(f"{shard} has {file.size} of {length} bytes")
    # .metadata is written last: a younger shard is the work of another save.
    written = files[find.METADATA].mtime_ns
    newer = sorted(
        path for path, file in files.items() if path.endswith(find.SHARD_SUFFIX) and file.mtime_ns > written
    )
    if newer:
        problems.append(f"{newer[0]} is newer than .metadata: a later save into this folder has not finished")
    return problems


def hf_problems(
    names: Collection[str], shards: Iterable[str], siblings: Iterable[Collection[str]]
) -> list[str]:
    """What a Hugging Face folder lacks.

    Args:
        names: of the files directly in it.
        shards: the files that its indices name.
        siblings: the names in the other checkpoints beside it.
    """
    problems = [f"{shard}, which the index names, is missing" for shard in sorted(set(shards) - set(names))]
    others = [set(sibling) for sibling in siblings]
    problems += [
        f"{name} is missing, which other checkpoints beside it have"
        for name in _EXPECTED
        if name not in names and any(name in other for other in others)
    ]
    has_model = any(find.is_model_file(name) for name in names)
    if not has_model and any(find.is_model_file(name) for other in others for name in other):
        problems.append("its model is missing, which other checkpoints beside it have")
    return problems
