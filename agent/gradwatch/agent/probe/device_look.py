"""Look at gradients on a device: enqueue it, and read it out rounds later, without waiting."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from gradwatch.agent.probe import scan
from gradwatch.agent.probe.passes import Origin, Pass, origin_of
from gradwatch.agent.probe.readout import Ring
from gradwatch.agent.probe.rounds import BadGradient, BucketFindings, ReducedFindings, RoundResult

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gradwatch.agent.probe.losses import Number
    from gradwatch.agent.probe.passes import Fact
    from gradwatch.agent.probe.readout import Event, Slot
    from gradwatch.agent.probe.rounds import Bucket, Moment

# Rounds under way on a device. A host that runs further ahead than this loses sight of rounds.
SLOTS = 32


@dataclass(frozen=True)
class _LookedAt:
    """A bucket, by its parameters: their keys, the places of their values, and the elements of each."""

    index: int
    keys: Sequence[int]
    places: list[int | None]
    sizes: list[int]


@dataclass
class _Flight:
    """A round on its way from the device."""

    moment: Moment
    facts: list[int | bool | None] = field(default_factory=list)
    numbers: list[int | float | None] = field(default_factory=list)
    buckets: list[_LookedAt] = field(default_factory=list)
    reduced: list[tuple[Sequence[int], list[int | None]]] = field(default_factory=list)
    reduced_looked: bool = False


class DeviceLook:
    """For gradients on a device: enqueue, and read later without waiting.

    Args:
        capacity: values per round: parameters plus buckets, with room.
        device: where the gradients are.
        new_event: `torch.cuda.Event`, or what stands for it.
        lost: called with a reason for each round that could not be looked at.
        with_flag: whether to keep `reduced_flag`, for the guard.
    """

    def __init__(
        self,
        capacity: int,
        device: torch.device,
        new_event: Callable[[], Event],
        lost: Callable[[str], object],
        *,
        with_flag: bool,
    ) -> None:
        self.reduced_flag: torch.Tensor | None = None
        self._with_flag = with_flag
        self._device = device
        self._ring: Ring[_Flight] = Ring(SLOTS, capacity, device, new_event)
        # On the device and on the host, in fp64.
        self.nbytes = SLOTS * capacity * 2 * 8
        self._slot: Slot[_Flight] | None = None
        self._lost = lost
        self._unseen: list[Moment] = []

    def fact(self, tensors: Sequence[torch.Tensor]) -> Fact:
        """See `Look.fact`: a magnitude that nobody waits for; at once for what is in host memory."""
        at_once, all_known = True, True
        by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
        for tensor in tensors:
            values = scan.readable(tensor)
            if values is None:
                continue
            if values.device == self._device:
                by_dtype.setdefault(values.dtype, []).append(values)
            elif values.device.type == "cpu":
                at_once = at_once and scan.is_finite(values)
            else:
                all_known = False
        if not (at_once and all_known):
            return None if at_once else False
        norms = [
            norm.double() for values in by_dtype.values() for norm in torch._foreach_norm(values, math.inf)
        ]
        return torch.stack(norms).amax() if norms else True

    def local(self, moment: Moment, bucket: Bucket, *, brief: bool) -> BucketFindings | None:
        """See `Look.local`: nothing is known at once."""
        del brief
        slot = self._slot_for(moment)
        if slot is not None and slot.about is not None:
            keys, gradients = zip(*bucket.gradients(), strict=True)
            sizes = [gradient.numel() for gradient in gradients]
            slot.about.buckets.append(_LookedAt(bucket.index, keys, slot.add(gradients), sizes))
        return None

    def reduced(self, moment: Moment, buffers: Sequence[torch.Tensor]) -> float | None:
        """See `Look.reduced`: nothing is known at once. Sends the round on its way."""
        slot = self._slot_for(moment)
        if slot is not None and slot.about is not None:
            looked_at = (
                slot.about.buckets if len(slot.about.buckets) == len(buffers) else [None] * len(buffers)
            )
            for buffer, before in zip(buffers, looked_at, strict=True):
                keys, parts = _parts(buffer, before)
                slot.about.reduced.append((keys, slot.add(parts)))
            slot.about.reduced_looked = True
            if self._with_flag:
                self.reduced_flag = slot.flag([place for _, places in slot.about.reduced for place in places])
            self._ring.release(slot)
        self._slot = None
        return None

    def send(self) -> None:
        """See `Look.send`."""
        if self._slot is not None:
            self._ring.release(self._slot)
        self._slot = None

    def arrived(self, *, wait: bool = False) -> list[RoundResult]:
        """See `Look.arrived`."""
        unseen, self._unseen = self._unseen, []
        landed = [_landed(flight, values) for flight, values in self._ring.ready(wait=wait)]
        return [*landed, *(RoundResult(moment) for moment in unseen)]

    @property
    def under_way(self) -> bool:
        """See `Look.under_way`."""
        return bool(self._unseen) or self._ring.under_way

    def _number(self, slot: Slot[_Flight], number: Number) -> int | float | None:
        """The place of a number that is on the device; the number, if the host knows it."""
        if not isinstance(number, torch.Tensor):
            return number
        (place,) = slot.add_facts([number]) if number.device == self._device else (None,)
        return place

    def _slot_for(self, moment: Moment) -> Slot[_Flight] | None:
        slot = self._slot
        if slot is not None and slot.about is not None and slot.about.moment is not moment:
            # The round before got no look at its reduced gradients.
            self._ring.release(slot)
            slot = None
        if slot is None:
            slot = self._ring.acquire(_Flight(moment))
            if slot is not None and slot.about is not None:
                slot.about.facts = slot.add_facts(_facts(moment))
                slot.about.numbers = [
                    self._number(slot, number) for number in (moment.loss, moment.loss_scale)
                ]
            elif moment not in self._unseen:
                self._unseen.append(moment)
                self._lost("device_behind")
        self._slot = slot
        return slot


def _parts(buffer: torch.Tensor, before: _LookedAt | None) -> tuple[Sequence[int], Sequence[torch.Tensor]]:
    """A reduced bucket by parameter, with their keys; whole, without keys, where it lies otherwise."""
    flat = buffer.layout == torch.strided and buffer.dim() == 1
    if before is None or not flat or sum(before.sizes) != buffer.numel():
        return (), [buffer]
    return before.keys, torch.split(buffer, before.sizes)


def _landed(flight: _Flight, values: list[float]) -> RoundResult:
    """Read a round's values as findings."""
    result = RoundResult(flight.moment)
    result.loss, result.loss_scale = (
        values[number] if isinstance(number, int) else number for number in flight.numbers or (None, None)
    )
    result.weights_finite = _known(flight.facts[0], values) if flight.facts else None
    known: tuple[Origin, tuple[Pass, ...]] | None = None
    for bucket in flight.buckets:
        found = _values_at(bucket.keys, bucket.places, values)
        flight.moment.magnitudes.update(found)
        bad = _bad_among(found)
        if bad:
            known = known or _origin(flight, values)
            result.findings.append(
                BucketFindings(flight.moment, bucket.index, bad, *known, weights_finite=result.weights_finite)
            )
    if flight.reduced_looked:
        result.reduced_bad = any(
            place is not None and not math.isfinite(values[place])
            for _, places in flight.reduced
            for place in places
        )
    if not (result.findings or result.reduced_bad):
        _learn_masks(flight, values)
    if result.reduced_bad:
        bad = [one for keys, places in flight.reduced for one in _bad_among(_values_at(keys, places, values))]
        origin, _ = known or _origin(flight, values)
        result.reduced = ReducedFindings(bad, origin.overflow)
    return result


def _known(place: int | bool | None, values: list[float]) -> bool | None:
    """A fact that has been read out."""
    return place if place is None or isinstance(place, bool) else math.isfinite(values[place])


def _values_at(keys: Sequence[int], places: Sequence[int | None], values: list[float]) -> dict[int, float]:
    return {key: values[place] for key, place in zip(keys, places, strict=False) if place is not None}


def _bad_among(found: dict[int, float]) -> list[BadGradient]:
    """A magnitude of infinity does not tell its sign."""
    return [
        BadGradient(key, "VALUE_NAN" if math.isnan(magnitude) else None, None)
        for key, magnitude in found.items()
        if not math.isfinite(magnitude)
    ]


def _facts(moment: Moment) -> list[Fact]:
    """Of the parameters, then of each pass."""
    return [moment.parameters(), *(fact for one in moment.passes for fact in one.all_facts())]


def _origin(flight: _Flight, values: list[float]) -> tuple[Origin, tuple[Pass, ...]]:
    """Where it began, by the facts as they have been read out, and the passes with these."""
    parameters, *rest = _facts_known(flight, values)
    facts = iter(rest)
    passes = tuple(one.read_out(facts) for one in flight.moment.passes)
    _, scale = flight.numbers or (None, None)
    scale = values[scale] if isinstance(scale, int) else scale
    if isinstance(parameters, float):
        parameters = math.isfinite(parameters)
    return origin_of(passes, parameters=parameters, scale=scale), passes


def _facts_known(flight: _Flight, values: list[float]) -> list[bool | float | None]:
    """What the host knew, and the magnitudes that have been read out."""
    return [place if place is None or isinstance(place, bool) else values[place] for place in flight.facts]


def _learn_masks(flight: _Flight, values: list[float]) -> None:
    """The round is clean: what was infinite of inputs and outputs was so on purpose."""
    known = _facts_known(flight, values)
    if any(isinstance(fact, float) and math.isinf(fact) for fact in known):
        facts = iter(known[1:])
        for one in flight.moment.passes:
            one.read_out(facts).learn_masks()
