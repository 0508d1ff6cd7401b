"""Looks at gradients on a device, read out later without waiting for it.

`torch._foreach_norm(..., inf)` is one multi-tensor kernel that propagates NaN and overflows at
nothing; its results go into a preallocated slot, on the stream that the reduction is ordered after.
Once the round is done the slot is copied to pinned memory and an event recorded; a later round
reads it when the event has passed. No call here waits for the device, save `wait` at exit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch

from gradwatch.agent.probe.scan import readable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gradwatch.agent.probe.passes import Fact

T = TypeVar("T")


class Event(Protocol):
    """What is needed of `torch.cuda.Event`."""

    def record(self) -> Any:
        """Mark this place in the current stream."""

    def query(self) -> bool:
        """Whether the device has come past the mark."""

    def synchronize(self) -> Any:
        """Wait until it has."""


class Slot(Generic[T]):
    """One round's values, on their way from the device.

    Args:
        capacity: how many values it takes.
        device: where the gradients are.
        event: a fresh one.
    """

    def __init__(self, capacity: int, device: torch.device, event: Event) -> None:
        self.used = 0
        self.about: T | None = None
        self._event = event
        # fp64 holds the norms of every dtype without overflow.
        self._device = torch.zeros(capacity, dtype=torch.float64, device=device)
        self._host = torch.zeros(capacity, dtype=torch.float64, pin_memory=device.type == "cuda")

    def add(self, tensors: Sequence[torch.Tensor]) -> list[int | None]:
        """Enqueue the largest magnitude of each tensor.

        Args:
            tensors: on the slot's device, all of one dtype, as in one bucket.

        Returns:
            For each tensor the place of its value in `values()`; None for one that holds
            nothing that could be non-finite, or that no longer fits.
        """
        places: list[int | None] = []
        looked_at: list[torch.Tensor] = []
        for tensor in tensors:
            values = readable(tensor)
            if values is None or self.used + len(looked_at) >= self._device.numel():
                places.append(None)
                continue
            places.append(self.used + len(looked_at))
            looked_at.append(values)
        if looked_at:
            end = self.used + len(looked_at)
            norms = torch._foreach_norm(looked_at, float("inf"))
            self._device[self.used : end].copy_(torch.stack(norms))
            self.used = end
        return places

    def add_facts(self, facts: Sequence[Fact]) -> list[int | bool | None]:
        """Take magnitudes that are on the device already; what is known, or not, stays as it is.

        Returns:
            For each fact the place of its value in `values()`, or the fact; None where there is no room.
        """
        places: list[int | bool | None] = []
        taken: list[torch.Tensor] = []
        for fact in facts:
            if not isinstance(fact, torch.Tensor):
                places.append(fact)
            elif self.used + len(taken) < self._device.numel():
                places.append(self.used + len(taken))
                taken.append(fact)
            else:
                places.append(None)
        if taken:
            end = self.used + len(taken)
            self._device[self.used : end].copy_(torch.stack(taken))
            self.used = end
        return places

    def flag(self, places: Sequence[int | None]) -> torch.Tensor:
        """Enqueue whether any value at these places is non-finite: a float of shape (), 1.0 if so."""
        taken = [place for place in places if place is not None]
        if not taken:
            return torch.zeros((), device=self._device.device)
        values = self._device[min(taken) : max(taken) + 1]
        return values.isfinite().logical_not_().any().float()

    def close(self) -> None:
        """All is enqueued: start the copy to the host."""
        self._host.copy_(self._device, non_blocking=True)
        self._event.record()

    def ready(self) -> bool:
        """Whether the copy has arrived."""
        return self._event.query()

    def wait(self) -> None:
        """Wait for the copy. At exit only."""
        self._event.synchronize()

    def values(self) -> list[float]:
        """The largest magnitudes; NaN where there was one."""
        return self._host[: self.used].tolist()


class Ring(Generic[T]):
    """A fixed number of slots, used in turn.

    Args:
        slots: how many rounds can be on their way at once.
        capacity: values per round.
        device: where the gradients are.
        new_event: makes the slots' events.
    """

    def __init__(
        self, slots: int, capacity: int, device: torch.device, new_event: Callable[[], Event]
    ) -> None:
        self._free = [Slot[T](capacity, device, new_event()) for _ in range(slots)]
        self._closed: list[Slot[T]] = []

    def acquire(self, about: T) -> Slot[T] | None:
        """A free slot for a round; None when the device is that many rounds behind."""
        if not self._free:
            return None
        slot = self._free.pop()
        slot.used, slot.about = 0, about
        return slot

    def release(self, slot: Slot[T]) -> None:
        """Close the slot; `ready` will hand it out."""
        slot.close()
        self._closed.append(slot)

    @property
    def under_way(self) -> bool:
        """Whether there is a slot that `ready` has not handed out."""
        return bool(self._closed)

    def ready(self, *, wait: bool = False) -> list[tuple[T, list[float]]]:
        """What has arrived, oldest first; with `wait`, all of it.

        A slot is free again only once its event has passed and it has been read.
        """
        done: list[tuple[T, list[float]]] = []
        while self._closed:
            slot = self._closed[0]
            if wait:
                slot.wait()
            elif not slot.ready():
                break
            del self._closed[0]
            if slot.about is not None:
                done.append((slot.about, slot.values()))
            slot.about = None
            self._free.append(slot)
        return done
