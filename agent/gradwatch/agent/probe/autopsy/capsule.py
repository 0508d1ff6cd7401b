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
_HOST = torch.device("cpu")


@dataclass(frozen=True)
class RandomState:
    """Of torch's generators.

    Attributes:
        host: the CPU's.
        device: the device's; None where the model is on none.
    """

    host: torch.Tensor
    device: torch.Tensor | None = None

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        """As they are; waits for no device: its generator's state is on the host."""
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    def restore(self, device: torch.device) -> None:
        """Have the generators, that of this device among them, go on from here."""
        torch.set_rng_state(self.host)
        if self.device is not None:
            torch.cuda.set_rng_state(self.device, device)


@dataclass(eq=False)
class Capsule:
    """One forward pass: what went in, and the gradient that came back.

    Attributes:
        args: of the module's forward.
        kwargs: likewise.
        rng: of before the pass.
        autocast: whether it was on, and its dtype.
        device: where the model is.
        entering: the gradients that came back, by ordinal of the tensor in the output.
        nbytes: of the tensors that are kept.
        lost: why it cannot be replayed; "" while it can.
    """

    args: Any = ()
    kwargs: Any = field(default_factory=dict)
    rng: RandomState | None = None
    autocast: tuple[bool, torch.dtype] = (False, torch.bfloat16)
    device: torch.device = _HOST
    entering: dict[int, torch.Tensor] = field(default_factory=dict)
    nbytes: int = 0
    lost: str = ""
    _versions: list[tuple[torch.Tensor, int, str]] = field(default_factory=list)
    _weights_now: Callable[[], tuple[int, ...]] = tuple
    _weights: tuple[int, ...] = ()

    def watch_for_changes(self, tensors: Sequence[torch.Tensor], what: str) -> None:
        """These must not be changed in place from now on; `what` names them in a sentence."""
        self._versions += [(tensor, version_of(tensor), what) for tensor in tensors]

    def watch_weights(self, now: Callable[[], tuple[int, ...]]) -> None:
        """There must be no update from now on; `now` gives what is another one after each."""
        self._weights_now, self._weights = now, now()

    def update_left_out(self) -> None:
        """What an optimizer has just done, it did to no weight."""
        self._weights = self._weights_now()

    @property
    def is_of_these_weights(self) -> bool:
        """Whether there was no update since."""
        return not self.lost and self._weights_now() == self._weights

    def release(self, why: str = "its round is over") -> None:
        """Keep nothing any more."""
        self.lost = self.lost or why
        self.args, self.kwargs, self.rng = (), {}, None
        self.entering = {}
        self._versions, self._weights_now, self._weights = [], tuple, ()
        self.nbytes = 0

    def why_not(self) -> str:
        """Why it cannot be replayed now; "" when it can."""
        if self.lost:
            return self.lost
        changed = next(
            (what for tensor, version, what in self._versions if version_of(tensor) != version), ""
        )
        if not changed and not self.is_of_these_weights:
            changed = "the parameters were"
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
        weights: Callable[[], tuple[int, ...]],
        *,
        device: torch.device = _HOST,
    ) -> Capsule:
        """A forward pass begins.

        Args:
            args: of the forward.
            kwargs: likewise.
            tensors: that were found in them.
            unknown: the type of something in them that could not be looked into.
            weights: gives what is another one after each update of the model's parameters.
            device: where the model is.
        """
        if unknown is not None:
            return Capsule(lost=f"its input holds a {unknown}, of which nothing can be kept")
        iterator = next((value for value in [*args, *kwargs.values()] if isinstance(value, Iterator)), None)
        if iterator is not None:
            return Capsule(lost=f"its input is a {type(iterator).__name__}, which has been consumed")
        capsule = Capsule(
            args,
            kwargs,
            RandomState.now(device),
            (torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)),
            device,
        )
        self._make_room(capsule, sum(map(nbytes, tensors)))
        if not capsule.lost:
            capsule.watch_for_changes(tensors, "an input was")
            capsule.watch_weights(weights)
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


def version_of(tensor: torch.Tensor) -> int:
    """How often it was changed in place."""
    # A tensor made under inference_mode has none, and raises.
    return 0 if tensor.is_inference() else tensor._version
