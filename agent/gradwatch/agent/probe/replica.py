"""Checksums of a model's parameters, which replicas have in common: sums of their bits, exact in any order.

Whole numbers are added modulo 2**64, so that the sum is the same whoever adds, and one bit that differs
changes it. Besides the sum over all parameters there is one for each bit of a parameter's ordinal, of those
that have the bit set: when one parameter differs, the sums that differ spell its ordinal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gradwatch.agent.probe.readout import Event

# The part of the probe, for its fuse.
PART = "replicas"
# Sums of 8-byte words are one read pass; of narrower integers they take many times as long.
_WORD = 8


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor's memory read as whole numbers, modulo 2**64: int64 of shape (), on its device.

    Its words of 8 bytes, and the bytes that are left over.
    """
    values = tensor.detach()
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj())
    flat = values.contiguous().view(-1).view(torch.uint8)
    if flat.storage_offset() % _WORD:
        flat = flat.clone()
    whole = flat.numel() // _WORD * _WORD
    words, rest = flat[:whole].view(torch.int64), flat[whole:]
    return words.sum() + rest.sum(dtype=torch.int64)


def sums_of(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """The checksum of parameters, in their order: int64 of shape (1 + bits of the largest ordinal,).

    Args:
        parameters: all on one device, dense, in an order that is the same on every rank.
    """
    each = torch.stack([bits(parameter) for parameter in parameters])
    ordinals = torch.arange(len(parameters), device=each.device)
    widths = range((len(parameters) - 1).bit_length())
    masks = [torch.ones_like(ordinals), *((ordinals >> bit) & 1 for bit in widths)]
    return (torch.stack(masks) * each).sum(1)


class ReplicaCheck:
    """Takes a checksum every so many rounds; on a device it arrives later.

    Args:
        every: rounds of the model between two; 0 for none.
        new_event: makes the event that tells when one has arrived; None on the host.
    """

    def __init__(self, every: int, new_event: Callable[[], Event] | None) -> None:
        self._every = every
        self._event = None if new_event is None else new_event()
        self._under_way: tuple[int, int, int, torch.Tensor] | None = None
        self._rounds = 0

    def is_due(self) -> bool:
        """Whether the round that begins is one for it. Not the first: nothing has been updated."""
        self._rounds += 1
        return self._every > 0 and self._rounds > 1 and (self._rounds - 1) % self._every == 0

    def begin(self, round_: int, step: int, parameters: Sequence[torch.Tensor]) -> None:
        """Take one, before the update of a step; the one before is forgotten if it has not arrived."""
        if not parameters:
            return
        sums = sums_of(parameters)
        if self._event is not None:
            host = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=sums.is_cuda)
            sums = host.copy_(sums, non_blocking=True)
            self._event.record()
        self._under_way = (round_, step, len(parameters), sums)

    @property
    def under_way(self) -> bool:
        """Whether `arrived` has one to give."""
        return self._under_way is not None

    def arrived(self, *, wait: bool = False) -> dict[str, Any] | None:
        """The `Checksum` message, but for its root, of one that has arrived; once."""
        if self._under_way is None:
            return None
        if self._event is not None:
            if wait:
                self._event.synchronize()
            elif not self._event.query():
                return None
        (round_, step, parameters, sums), self._under_way = self._under_way, None
        return {"round": round_, "step": step, "parameters": parameters, "sums": sums.tolist()}
