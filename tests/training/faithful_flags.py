"""A module of the user's, of which a forward pass reads a flag."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

UP = False


def spoil(values: torch.Tensor) -> torch.Tensor:
    """Bad while the flag is up."""
    return values / 0 if UP else values
