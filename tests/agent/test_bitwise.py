"""Promise one: watched and idle, the trained weights are those of an unwatched run, to the bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.ranks import run_ranks

if TYPE_CHECKING:
    from pathlib import Path


def same_bits(left: Any, right: Any) -> bool:
    """Equal in every bit, NaN included."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and bool(
            torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))
        )
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same_bits(left[key], right[key]) for key in left)
    return bool(left == right)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_weights_are_bitwise_those_of_an_unwatched_run(world_size: int, tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    spool.mkdir()
    run_ranks("tests.training.bitwise", world_size, [str(tmp_path / "without")])
    run_ranks("tests.training.bitwise", world_size, [str(tmp_path / "with")], spool=spool)

    without = torch.load(tmp_path / "without", weights_only=False)
    with_us = torch.load(tmp_path / "with", weights_only=False)

    assert without.keys() == with_us.keys()
    differing = [name for name in without if not same_bits(without[name], with_us[name])]
    assert differing == []
    # The comparison says something only if the second run was watched, and all of it.
    journals = list(spool.glob("rank*.jsonl"))
    assert len(journals) == world_size
    for journal in journals:
        text = journal.read_text()
        assert '"fault"' not in text
        assert '"nonfinite"' not in text
        assert text.count('"model"') >= len(without)
