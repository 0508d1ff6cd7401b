"""What is kept of a forward pass, so that it can be replayed: references, until its round is over."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from gradwatch.agent.probe.passes import Leaves

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CAP_BYTES = 64 << 20
_MIB = 1 << 20


@dataclass(eq=False)
class Capsule:
    """One forward pass: what went in, and the gradient that came back.

    Attributes:
        args: of the module's forward.
        kwargs: likewise.
        rng: state of the CPU's generator before the pass.
        autocast: whether it was on, and its dtype.
        entering: the gradients that came back, by ordinal of the tensor in the output.
        nbytes: of the tensors that are kept.
        lost: why it cannot be replayed; "" while it can.
    """

    args: Any = ()
    kwargs: Any = field(default_factory=dict)
    rng: torch.Tensor | None = None
    autocast: tuple[bool, torch.dtype] = (False, torch.bfloat16)
    entering: dict[int, torch.Tensor] = field(default_factory=dict)
    nbytes: int = 0
    lost: str = ""
    _versions: list[tuple[torch.Tensor, int, str]] = field(default_factory=list)

    def watch_for_changes(self, tensors: Sequence[torch.Tensor], what: str) -> None:
        """These must not be changed in place from now on; `what` names them in a sentence."""
        self._versions += [(tensor, _version(tensor), what) for tensor in tensors]

    def release(self, why: str = "its round is over") -> None:
        """Keep nothing any more."""
        self.lost = self.lost or why
        self.args, self.kwargs, self.rng = (), {}, None
        self.entering = {}
        self._versions = []
        self.nbytes = 0

    def why_not(self) -> str:
        """Why it cannot be replayed now; "" when it can."""
        if self.lost:
            return self.lost
        changed = next((what for tensor, version, what in self._versions if _version(tensor) != version), "")
        return f"{changed} changed in place since the forward pass began" if changed else ""


class Capsules:
    """The capsules of one process, which together stay under a cap."""

    def __init__(self, cap_bytes: int = CAP_BYTES) -> None:
        self._cap = cap_bytes
        self._alive: list[weakref.ref[Capsule]] = []

    def begin(
        self,
        args: Any,
        kwargs: Any,
        tensors: Sequence[torch.Tensor],
        unknown: str | None,
        weights: Callable[[], Sequence[torch.Tensor]],
    ) -> Capsule:
        """A forward pass begins.

        Args:
            args: of the forward.
            kwargs: likewise.
            tensors: that were found in them.
            unknown: the type of something in them that could not be looked into.
            weights: some of the model's parameters, which tell by their version whether there was an update.
        """
        if unknown is not None:
            return Capsule(lost=f"its input holds a {unknown}, of which nothing can be kept")
        iterator = next((value for value in [*args, *kwargs.values()] if isinstance(value, Iterator)), None)
        if iterator is not None:
            return Capsule(lost=f"its input is a {type(iterator).__name__}, which has been consumed")
        capsule = Capsule(
            args,
            kwargs,
            torch.get_rng_state(),
            (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        )
        self._make_room(capsule, sum(map(nbytes, tensors)))
        if not capsule.lost:
            capsule.watch_for_changes(tensors, "an input was")
            capsule.watch_for_changes(weights(), "the parameters were")
            self._alive.append(weakref.ref(capsule))
        return capsule

    def entered(
        self,
        capsule: Capsule,
        places: Sequence[tuple[int, int]],
        gradients: Sequence[torch.Tensor | None],
    ) -> None:
        """Gradients have come back to one node of the output.

        Args:
            capsule: of the pass.
            places: ordinal in the output, and number of the node's output, of each of its tensors.
            gradients: of the node's outputs.
        """
        if capsule.lost:
            return
        for ordinal, number in places:
            gradient = gradients[number] if number < len(gradients) else None
            if gradient is None:
                continue
            if ordinal in capsule.entering:
                capsule.release("gradients came back to its output more than once")
                return
            self._make_room(capsule, nbytes(gradient))
            if capsule.lost:
                return
            capsule.entering[ordinal] = gradient
            capsule.watch_for_changes([gradient], "a gradient at the output was")

    def _make_room(self, capsule: Capsule, more: int) -> None:
        """Count `more` bytes in; older capsules make room, unless it is too large by itself."""
        needed = capsule.nbytes + more
        if needed > self._cap:
            capsule.release(
                f"its inputs and the gradient at its output take {needed / _MIB:.0f} MiB, and at most "
                f"{self._cap / _MIB:.0f} MiB are kept"
            )
            return
        capsule.nbytes = needed
        alive = [one for reference in self._alive if (one := reference()) is not None and not one.lost]
        total = sum(one.nbytes for one in alive if one is not capsule) + needed
        for one in alive:
            if total <= self._cap:
                break
            if one is not capsule:
                total -= one.nbytes
                one.release(f"later ones took its place: at most {self._cap / _MIB:.0f} MiB are kept")
        self._alive = [weakref.ref(one) for one in alive if not one.lost]


def nbytes(tensor: torch.Tensor) -> int:
    """What a tensor's elements take."""
    return tensor.numel() * tensor.element_size()


def nbytes_of(capsule: Capsule) -> int:
    """What a capsule's tensors take, when it has been read back."""
    return sum(map(nbytes, Leaves((capsule.args, capsule.kwargs, capsule.entering)).tensors))


def _version(tensor: torch.Tensor) -> int:
    # A tensor made under inference_mode has none, and raises.
    return 0 if tensor.is_inference() else tensor._version
