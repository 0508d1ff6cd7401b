"""The verdict on a tensor: every dtype, every layout, no false alarm at the dtype's maximum."""

from __future__ import annotations

import math

import pytest
import torch

from gradwatch.agent.probe.readout import Slot
from gradwatch.agent.probe.scan import Finding, examine, is_finite, surely_finite

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BAD = {"VALUE_NAN": math.nan, "VALUE_POSITIVE_INFINITY": math.inf, "VALUE_NEGATIVE_INFINITY": -math.inf}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("name", "value"), BAD.items())
@pytest.mark.parametrize("place", [0, 511, 1000])
def test_one_bad_element_among_many_is_found_and_told(dtype, name, value, place):
    tensor = torch.randn(1001).to(dtype)
    tensor[place] = value
    assert not surely_finite(tensor)
    assert not is_finite(tensor)
    assert examine(tensor) == Finding(name, 1)


@pytest.mark.parametrize("dtype", FLOATS)
def test_values_up_to_the_dtypes_maximum_are_finite_although_their_sum_is_not(dtype):
    tensor = torch.full((64,), torch.finfo(dtype).max, dtype=dtype)
    assert not surely_finite(tensor), "the sum overflows: the first look must be in doubt"
    assert is_finite(tensor)
    assert examine(tensor) is None


def test_opposite_infinities_are_not_lost_in_the_sum():
    tensor = torch.zeros(10)
    tensor[2], tensor[7] = math.inf, -math.inf
    assert not is_finite(tensor)
    assert examine(tensor) == Finding("VALUE_POSITIVE_INFINITY", 2)


def test_nan_is_named_before_infinity_and_all_bad_elements_are_counted():
    tensor = torch.tensor([math.inf, 1.0, math.nan, -math.inf])
    assert examine(tensor) == Finding("VALUE_NAN", 3)


def test_empty_and_integer_tensors_are_finite():
    for tensor in (
        torch.empty(0),
        torch.empty(3, 0),
        torch.arange(5),
        torch.tensor([], dtype=torch.bfloat16),
    ):
        assert surely_finite(tensor)
        assert examine(tensor) is None


def test_complex_values_are_looked_at_in_both_parts():
    tensor = torch.ones(4, dtype=torch.complex64)
    assert is_finite(tensor)
    tensor[1] = complex(1.0, math.inf)
    assert examine(tensor) == Finding("VALUE_POSITIVE_INFINITY", 1)
    assert examine(tensor.conj()) == Finding("VALUE_NEGATIVE_INFINITY", 1)


def test_sparse_gradients_are_looked_at_by_their_values():
    sparse = torch.sparse_coo_tensor([[0, 2]], [[1.0, 2.0], [math.nan, 1.0]], (4, 2), check_invariants=False)
    assert examine(sparse) == Finding("VALUE_NAN", 1)
    assert is_finite(torch.sparse_coo_tensor([[0]], [[1.0, 2.0]], (4, 2), check_invariants=False))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_floats_are_looked_at(dtype):
    good = torch.ones(8).to(dtype)
    bad = torch.tensor([1.0, math.nan]).to(dtype)
    assert is_finite(good)
    assert examine(bad) == Finding("VALUE_NAN", 1)


def test_views_with_gaps_are_read_as_they_are():
    whole = torch.zeros(6, 6)
    whole[0, 5] = math.nan
    assert is_finite(whole[:, :5])
    assert not is_finite(whole.t())


class PassedEvent:
    """Stands for a CUDA event whose mark the device has passed."""

    def record(self):
        """Nothing is under way on the CPU."""

    def query(self):
        """It has passed."""
        return True

    def synchronize(self):
        """It has passed."""


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_read_out_of_a_device_agrees_with_the_exact_look(dtype):
    tensors = [torch.randn(33).to(dtype) for _ in range(6)]
    tensors[1][3] = math.nan
    tensors[4][32] = -math.inf
    tensors[5].fill_(torch.finfo(dtype).max)
    slot: Slot[str] = Slot(8, torch.device("cpu"), PassedEvent())
    places = slot.add(tensors)
    slot.close()
    magnitudes = [slot.values()[place] for place in places]
    assert [math.isfinite(magnitude) for magnitude in magnitudes] == [examine(t) is None for t in tensors]
    assert math.isnan(magnitudes[1])
    assert magnitudes[4] == math.inf


def test_a_full_slot_looks_at_no_more_and_says_so():
    slot: Slot[str] = Slot(2, torch.device("cpu"), PassedEvent())
    assert slot.add([torch.ones(2), torch.empty(0), torch.ones(2), torch.ones(2)]) == [0, None, 1, None]
