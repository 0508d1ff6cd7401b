"""Has a gradient, finite still, grown far beyond what it usually is.

Decided on logarithms, by the median of the rounds before and their median distance from it: neither moves
when single rounds are out of all proportion, and what is not finite takes no part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Limits:
    """When to warn. Such that a healthy run, in which gradients vary by a hundred times, hears nothing.

    Attributes:
        rounds: of history that are needed.
        share: of these, in which a parameter's gradient must not have been zero.
        growth: over the median, from which on it is far beyond.
        spread: over the median, in standard deviations (by the median distance) of the logarithm.
        leap: over the largest so far, for a sudden growth.
        climb: rounds in a row, for a steady one, in each of which it has grown by `step`.
        step: see `climb`.
        overall: over its median, what the largest of all gradients must have grown by too.
    """

    rounds: int = 8
    share: float = 0.75
    growth: float = 1e3
    spread: float = 6.0
    leap: float = 100.0
    climb: int = 4
    step: float = 1.2
    overall: float = 100.0


@dataclass(frozen=True)
class Growth:
    """Gradients that have grown far.

    Attributes:
        places: of their parameters, the one that has grown most first.
        usual: of that one, the median before.
    """

    places: list[int]
    usual: float


# Turns a median distance into a standard deviation, for values that are normally distributed.
_NORMAL = 1.4826


def grown(history: torch.Tensor, now: torch.Tensor, limits: Limits) -> Growth | None:
    """Which gradients have grown far beyond what is usual; None when none has.

    Args:
        history: the largest magnitudes of the rounds before, oldest first: (rounds, parameters), float64.
        now: those of this round: (parameters,), float64.
        limits: when it is far.
    """
    if len(history) < max(limits.rounds, limits.climb):
        return None
    before, after = _logarithms(history), _logarithms(now)
    overall = _usual(_largest(before))
    if not _largest(after.unsqueeze(0)).item() > overall.item() + math.log10(limits.overall):
        return None
    usual = _usual(before)
    spread = limits.spread * _NORMAL * _usual((before - usual).abs())
    known = before.isfinite().sum(0) >= max(limits.rounds, limits.share * len(history))
    far = after > usual + math.log10(limits.growth)
    top = before.nan_to_num(nan=-math.inf).amax(0)
    leapt = (after > usual + spread) & (after > top + math.log10(limits.leap))
    course = torch.cat([before[-limits.climb :], after.unsqueeze(0)])
    climbed = (course.diff(dim=0) > math.log10(limits.step)).all(0) & (after > top)
    by_growth = torch.where(known & far & (leapt | climbed), after - usual, -math.inf)
    order = by_growth.argsort(descending=True)
    places = order[by_growth[order] > 0].tolist()
    return Growth(places, 10 ** usual[places[0]].item()) if places else None


def alarms(history: torch.Tensor, limits: Limits) -> torch.Tensor:
    """Magnitudes below which `grown` finds nothing for some rounds to come, by parameter.

    A tenth of what it takes: the median moves meanwhile. Infinite where too little is known.
    """
    usual = _usual(_logarithms(history))
    return (10.0 ** (usual + math.log10(limits.growth) - 1)).nan_to_num(nan=math.inf)


def _logarithms(magnitudes: torch.Tensor) -> torch.Tensor:
    """NaN for what is zero or not finite."""
    logarithms = magnitudes.log10()
    return logarithms.where(logarithms.isfinite(), torch.nan)


def _usual(logarithms: torch.Tensor) -> torch.Tensor:
    return logarithms.nanmedian(0).values


def _largest(logarithms: torch.Tensor) -> torch.Tensor:
    """Of each round; NaN for a round without any."""
    largest = logarithms.nan_to_num(nan=-math.inf).amax(1)
    return largest.where(largest.isfinite(), torch.nan)
