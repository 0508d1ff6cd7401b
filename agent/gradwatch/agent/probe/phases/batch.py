"""Which batch went bad, and how: by what entered the model, looked at on a hit only."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from gradwatch.agent.probe import replica
from gradwatch.agent.probe.autopsy.values import FINITE, kinds_of
from gradwatch.agent.probe.passes import Leaves

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from gradwatch.agent.probe.autopsy.capsule import Capsule
    from gradwatch.agent.probe.passes import Pass

_CHARACTERS = 16


def pass_of(passes: Sequence[Pass], microbatch: int | None) -> Pass | None:
    """The pass of a micro-batch; the only one where that is not known; None where it cannot be told."""
    if microbatch is None:
        return passes[0] if len(passes) == 1 else None
    return next((one for one in passes if one.backward == microbatch), None)


def hash_of(capsule: Capsule) -> str:
    """A hash of the inputs of a pass, in hexadecimal; "" where they were not kept, or lie on a device.

    Equal for equal numbers, whatever their order in memory: it tells the same batch from another one.
    """
    tensors = _inputs(capsule)
    if not tensors:
        return ""
    digest = hashlib.blake2b(digest_size=_CHARACTERS // 2)
    for one in tensors:
        try:
            total = int(replica.bits(one))
        except (RuntimeError, TypeError):
            return ""
        digest.update(f"{tuple(one.shape)} {one.dtype} {total};".encode())
    return digest.hexdigest()


def value_of(capsule: Capsule) -> str | None:
    """What the inputs of a pass held that was not finite, an enum name of `gradwatch.v1.Value`.

    NaN where there was one, else +Inf: an infinity of the other sign may be a mask. None where that is not
    known.
    """
    kinds = FINITE
    for one in _inputs(capsule):
        kinds |= kinds_of(one)
    return kinds.value if kinds.any else None


def _inputs(capsule: Capsule) -> Sequence[torch.Tensor]:
    """What entered the model; nothing where it was not kept, or lies on a device."""
    tensors = Leaves((capsule.args, capsule.kwargs)).tensors
    return () if capsule.lost or any(one.device.type != "cpu" for one in tensors) else tensors
