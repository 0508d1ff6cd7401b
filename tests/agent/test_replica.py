"""Sums of bits: exact, the same in any order, and another one for one bit that differs."""

from __future__ import annotations

import pytest
import torch

from gradwatch.agent.probe.replica import ReplicaCheck, bits, sums_of


def by_hand(tensor):
    """The sum of the words of 8 bytes, and of the bytes that are left over, modulo 2**64."""
    memory = bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())
    whole = len(memory) // 8 * 8
    words = [int.from_bytes(memory[at : at + 8], "little", signed=True) for at in range(0, whole, 8)]
    total = (sum(words) + sum(memory[whole:])) % 2**64
    return total - 2**64 if total >= 2**63 else total


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(1000),
        torch.randn(7, 3, dtype=torch.float64),
        torch.randn(5, 5).to(torch.bfloat16),
        torch.randn(3).to(torch.float16),
        torch.full((9,), float("nan")),
        torch.randn(4, 6).t(),
        torch.arange(100, dtype=torch.int64) * 2**57,
        torch.randn(()),
        torch.empty(0),
        torch.randn(6, dtype=torch.complex64).view(torch.float32),
    ],
)
def test_the_sum_is_exact(tensor):
    assert bits(tensor).item() == by_hand(tensor)


def test_complex_values_are_summed_by_their_parts():
    values = torch.randn(5, dtype=torch.complex64)
    assert bits(values).item() == by_hand(torch.view_as_real(values))


def test_memory_between_two_words_is_summed_all_the_same():
    whole = torch.randn(101)
    part = whole[1:]
    changed = whole.clone()[1:]
    assert bits(part).item() == by_hand(part)
    assert bits(part).item() == bits(changed).item()
    changed.view(torch.int32)[50] ^= 1
    assert bits(part).item() != bits(changed).item()


@pytest.mark.parametrize("place", [0, 1, 6, 12])
def test_one_bit_of_one_parameter_spells_its_ordinal(place):
    parameters = [torch.randn(11, 3) for _ in range(13)]
    before = sums_of(parameters)
    assert before.shape == (1 + 4,)
    parameters[place].view(torch.int32)[10, 2] ^= 1 << 22
    differ = (sums_of(parameters) != before).tolist()
    assert differ == [True, *(bool(place >> bit & 1) for bit in range(4))]


def test_it_is_due_every_so_many_rounds_and_not_in_the_first():
    check = ReplicaCheck(3, None)
    assert [check.is_due() for _ in range(8)] == [False, False, False, True, False, False, True, False]
    assert not any(ReplicaCheck(0, None).is_due() for _ in range(8))
    check = ReplicaCheck(1, None)
    assert [check.is_due() for _ in range(3)] == [False, True, True]


def test_a_checksum_of_nothing_is_none():
    check = ReplicaCheck(1, None)
    check.begin(1, 1, [])
    assert check.arrived() is None
