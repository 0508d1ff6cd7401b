"""What a rank warns of before anything is bad, in words. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradwatch.collector.words import number

if TYPE_CHECKING:
    from gradwatch.collector.observations import BadLoss, Exploding


def warn_of_growth(rank: int, warning: Exploding) -> str:
    """Say that a gradient grows."""
    return (
        f"Rank {rank}: the gradient of {warning.parameter} has grown to {warning.magnitude:.3g} at step "
        f"{warning.step}, from {warning.usual:.3g} as usual; if it goes on, it will overflow."
    )


def warn_of_loss(rank: int, warning: BadLoss) -> str:
    """Say that a loss is not finite, and its gradients are."""
    return (
        f"Rank {rank}: the loss was {number(warning.loss)} at step {warning.step} with finite gradients, "
        "before and after the reduction."
    )
