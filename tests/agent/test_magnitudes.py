"""The largest magnitude of each gradient in a bucket, at the price of one look at runs of small ones."""

from __future__ import annotations

import math

import pytest
import torch

from gradwatch.agent.probe.magnitudes import SMALL, Magnitudes, runs_in
from gradwatch.agent.probe.rounds import Bucket

SIZES = [3, 5, SMALL, 0, 7, 2]


def bucket(values, sizes=SIZES):
    buffer = torch.as_tensor(values).clone()
    views = torch.split(buffer, sizes)
    return Bucket(0, buffer, lambda: list(enumerate(views)), tuple(range(len(sizes))))


def ones(**at):
    values = torch.ones(sum(SIZES))
    for place, value in at.items():
        values[int(place[1:])] = value
    return values


def test_small_gradients_side_by_side_share_a_look():
    whole = bucket(ones())
    assert [run.keys for run in runs_in(whole.buffer, whole.gradients())] == [(0, 1), (2,), (4, 5)]


def test_a_shared_look_tells_the_largest_until_one_has_grown():
    look, found = Magnitudes(), {}
    for _ in range(40):
        assert look.look(bucket(ones(_1=-2.0)), found)
    assert found == {0: 2.0, 1: 2.0, 2: 1.0, 4: 1.0, 5: 1.0}
    assert look.look(bucket(ones(_1=-2.0, _4=100.0)), found)
    assert (found[0], found[1]) == (2.0, 100.0), "it is known which of them has grown"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("place", "key"), [(0, 0), (4, 1), (20, 2), (8 + SMALL, 4), (16 + SMALL, 5)])
def test_a_bad_gradient_is_known_from_its_neighbours(value, place, key):
    look, found = Magnitudes(), {}
    for _ in range(40):
        look.look(bucket(ones()), found)
    assert not look.look(bucket(ones(**{f"_{place}": value})), found)
    assert [other for other, magnitude in found.items() if not math.isfinite(magnitude)] == [key]


def test_the_dtypes_maximum_is_finite():
    found = {}
    assert Magnitudes().look(bucket(torch.full((sum(SIZES),), torch.finfo(torch.float32).max)), found)
    assert found[0] == torch.finfo(torch.float32).max


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.complex64])
def test_other_dtypes(dtype):
    found = {}
    assert Magnitudes().look(bucket(ones(_1=3.0).to(dtype)), found)
    assert (found[0], found[1]) == (3.0, 1.0)


def test_sparse_gradients_and_those_with_memory_of_their_own_are_looked_at_by_themselves():
    sparse = torch.sparse_coo_tensor([[0, 2]], [[1.0, 2.0], [3.0, 1.0]], (4, 2), check_invariants=False)
    found = {}
    assert Magnitudes().look(Bucket(0, sparse, lambda: [(7, sparse)], (7,)), found)
    assert Magnitudes().look(Bucket(0, None, lambda: [(8, torch.tensor(4.0))]), found)
    assert found == {7: 3.0, 8: 4.0}


def test_a_buffer_with_gaps_is_no_run():
    buffer = torch.ones(8)
    assert runs_in(buffer, [(0, buffer[:3]), (1, buffer[4:8])]) is None
    assert runs_in(buffer, [(0, buffer[:3]), (1, buffer[3:7])]) is None


def test_layouts_are_not_kept_without_end():
    look = Magnitudes()
    for first in range(1000):
        buffer = torch.ones(2)
        look.look(Bucket(0, buffer, lambda view=buffer, key=first: [(key, view)], (first,)), {})
    assert len(look._layouts) <= 64
