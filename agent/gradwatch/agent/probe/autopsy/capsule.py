"""What is kept of a forward pass, so that it can be replayed, until its round is over.

References to what went in and came out, and copies of the state of Python and of the random generators.
"""

from __future__ import annotations

import random
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from gradwatch.agent.probe.autopsy.evidence import OutputRecord, record_of
from gradwatch.agent.probe.autopsy.inventory import StateKeeper
from gradwatch.agent.probe.autopsy.kept_values import version as version_of
from gradwatch.agent.probe.passes import Leaves

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gradwatch.agent.probe.autopsy.python_state import State

CAP_BYTES = 64 << 20
_MIB = 1 << 20
_HOST = torch.device("cpu")
NUMPY = "it draws from NumPy's random numbers, whose state was not kept"
PYTHON = "it draws from Python's random numbers, whose state was not kept"
# Passes in which Python's and NumPy's random numbers are watched: taking their state is slow.
_WATCHED_PASSES = 3
# Capsules of which some may be gone, before they are counted.
_MAX_UNCOUNTED = 64
# The smallest normal number: a part of it is 0 where such are flushed.
_SMALLEST = sys.float_info.min

Settings: TypeAlias = "tuple[torch.dtype, str, bool]"


def settings_now() -> Settings:
    """Torch's default dtype, the precision of its products, and whether numbers next to 0 are made 0."""
    return torch.get_default_dtype(), torch.get_float32_matmul_precision(), _SMALLEST * 0.25 == 0


@dataclass
class RandomState:
    """Of the generators of random numbers.

    Attributes:
        host: torch's, of the CPU.
        device: torch's, of the device; None where the model is on none.
        python: Python's; None where it is not kept.
        numpy: NumPy's; None where it is not kept.
    """

    host: torch.Tensor
    device: torch.Tensor | None = None
    python: Any = None
    numpy: Any = None

    @classmethod
    def now(cls, device: torch.device, *, python: bool = False, numpy: bool = False) -> RandomState:
        """As they are; waits for no device: its generator's state is on the host.

        Args:
            device: where the model is.
            python: whether Python's is kept, which takes 10 us.
            numpy: whether NumPy's is kept.
        """
        return cls(
            torch.get_rng_state(),
            torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            random.getstate() if python else None,
            numpy_state() if numpy else None,
        )

    def equals(self, other: RandomState) -> bool:
        """Whether nothing was drawn between the two; what of the CPU is concerned."""
        rest = self.python == other.python and self.numpy == other.numpy
        return rest and torch.equal(self.host, other.host)

    def restore(self, device: torch.device) -> None:
        """Have the generators, that of this device among them, go on from here."""
        torch.set_rng_state(self.host)
        if self.device is not None:
            torch.cuda.set_rng_state(self.device, device)
        if self.python is not None:
            random.setstate(self.python)
        if self.numpy is not None and "numpy.random" in sys.modules:
            kind, words, *rest = self.numpy
            numpy: Any = sys.modules["numpy"]
            numpy.random.set_state((kind, numpy.array(words, dtype="uint32"), *rest))


def numpy_state() -> tuple[Any, ...] | None:
    """Of NumPy's global generator, as plain values; None where there is none."""
    numpy: Any = sys.modules.get("numpy.random")
    state = None if numpy is None else numpy.get_state()
    if not isinstance(state, tuple):
        return None
    kind, words, *rest = state
    return str(kind), words.tolist(), int(rest[0]), int(rest[1]), float(rest[2])


@dataclass(eq=False)
class Capsule:
    """One forward pass: what went in, and the gradient that came back.

    Attributes:
        args: of the module's forward.
        kwargs: likewise.
        rng: of before the pass.
        state: of Python, before the pass; None where it was not kept.
        threads: with which the pass computed.
        settings: of torch for the process, as `settings_now` gives them.
        output: what left the model; None where that cannot be compared.
        doubts: why a replay may not be the same again: phrases.
        autocast: whether it was on, and its dtype.
        device: where the model is.
        entering: the gradients that came back, by ordinal of the tensor in the output.
        numbers: of the node's output that each of these tensors was, likewise.
        nbytes: of the tensors that are kept.
        lost: why it cannot be replayed; "" while it can.
    """

    args: Any = ()
    kwargs: Any = field(default_factory=dict)
    rng: RandomState | None = None
    autocast: tuple[bool, torch.dtype] = (False, torch.bfloat16)
    device: torch.device = _HOST
    entering: dict[int, torch.Tensor] = field(default_factory=dict)
    numbers: dict[int, int] = field(default_factory=dict)
    nbytes: int = 0
    lost: str = ""
    state: State | None = None
    threads: int = 1
    settings: Settings = field(default_factory=settings_now)
    output: list[OutputRecord] | None = None
    doubts: list[str] = field(default_factory=list)
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
        self.entering, self.state, self.output = {}, None, None
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
    """The capsules of one process, which together stay under a cap.

    Attributes:
        keeps_numpy: whether a pass was seen to draw from NumPy's random numbers.
        keeps_python: likewise from Python's.
    """

    def __init__(self, cap_bytes: int = CAP_BYTES) -> None:
        self.keeps_numpy = self.keeps_python = False
        self._cap = cap_bytes
        self._alive: list[weakref.ref[Capsule]] = []
        # What these take at most: it does not tell when one lets go of what it keeps.
        self._taken = 0

    def begin(
        self,
        args: Any,
        kwargs: Any,
        tensors: Sequence[torch.Tensor],
        unknown: str | None,
        weights: Callable[[], tuple[int, ...]],
        *,
        device: torch.device = _HOST,
        numpy: bool = False,
    ) -> Capsule:
        """A forward pass begins.

        Args:
            args: of the forward.
            kwargs: likewise.
            tensors: that were found in them.
            unknown: the type of something in them that could not be looked into.
            weights: gives what is another one after each update of the model's parameters.
            device: where the model is.
            numpy: whether NumPy's random numbers are kept.
        """
        if unknown is not None:
            return Capsule(lost=f"its input holds a {unknown}, of which nothing can be kept")
        iterator = next((value for value in [*args, *kwargs.values()] if isinstance(value, Iterator)), None)
        if iterator is not None:
            return Capsule(lost=f"its input is a {type(iterator).__name__}, which has been consumed")
        capsule = Capsule(
            args,
            kwargs,
            RandomState.now(device, numpy=numpy),
            (torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)),
            device,
            threads=torch.get_num_threads(),
            settings=settings_now(),
        )
        self._make_room(capsule, sum(map(nbytes, tensors)))
        if not capsule.lost:
            capsule.watch_for_changes(tensors, "an input was")
            capsule.watch_weights(weights)
            self._alive.append(weakref.ref(capsule))
        return capsule

    def left(self, capsule: Capsule, tensors: Sequence[torch.Tensor], fact: object) -> None:
        """A forward pass has ended.

        Args:
            capsule: of the pass.
            tensors: of its output.
            fact: whether they are finite, as `Look.fact`.
        """
        # The gradient of what is larger is not kept either.
        if capsule.lost or sum(map(nbytes, tensors)) > self._cap:
            return
        output = record_of(tensors, finite=fact if isinstance(fact, bool) else None)
        if fact is True or output is None:
            capsule.output = output
            return
        kept = [one.values for one in output if one.values is not None]
        if kept:
            self._make_room(capsule, sum(map(nbytes, kept)))
        if capsule.lost:
            return
        capsule.output = output
        capsule.watch_for_changes(kept, "an output was")

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
            capsule.numbers[ordinal] = number
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
        self._taken += more
        if self._taken > self._cap or len(self._alive) >= _MAX_UNCOUNTED:
            self._taken = self._count(capsule)

    def _count(self, capsule: Capsule) -> int:
        """What all capsules take; older ones than this make room where that is too much."""
        alive = [one for reference in self._alive if (one := reference()) is not None and not one.lost]
        total = sum(one.nbytes for one in alive if one is not capsule) + capsule.nbytes
        for one in alive:
            if total <= self._cap:
                break
            if one is not capsule:
                total -= one.nbytes
                one.release(f"later ones took its place: at most {self._cap / _MIB:.0f} MiB are kept")
        self._alive = [weakref.ref(one) for one in alive if not one.lost]
        return total


class ModelCapsules:
    """The capsules of one model, with what is kept of Python's state.

    Args:
        capsules: of the process.
        module: gives the model.
    """

    def __init__(self, capsules: Capsules, module: Callable[[], torch.nn.Module | None]) -> None:
        self._capsules = capsules
        self._keeper = StateKeeper(module)
        self._begun = 0
        # Of Python and NumPy, before a pass that is watched.
        self._drawn_before: tuple[Any, Any] | None = None

    def forget(self) -> None:
        """Keep nothing of the model until its next pass."""
        self._keeper.forget()

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
        """See `Capsules.begin`."""
        capsule = self._capsules.begin(
            args, kwargs, tensors, unknown, weights, device=device, numpy=self._capsules.keeps_numpy
        )
        if capsule.lost:
            return capsule
        try:
            capsule.state = self._keeper.take()
        except Exception as error:
            # Whatever a user's objects do when they are looked at: the rest is kept.
            capsule.doubts.append(f"the state of its modules could not be kept ({type(error).__name__})")
        is_watched = self._begun < _WATCHED_PASSES
        # Asked now: the state above may have been taken by another inventory than that of the pass before.
        if capsule.rng is not None and (is_watched or self._capsules.keeps_python or self._keeper.draws):
            capsule.rng.python = random.getstate()
        if is_watched:
            self._begun += 1
            self._drawn_before = random.getstate(), None if self._capsules.keeps_numpy else numpy_state()
        return capsule

    def left(self, capsule: Capsule, tensors: Sequence[torch.Tensor], fact: object) -> None:
        """See `Capsules.left`."""
        before, self._drawn_before = self._drawn_before, None
        if before is not None:
            python, numpy = before
            self._capsules.keeps_python = self._capsules.keeps_python or python != random.getstate()
            if numpy is not None and numpy != numpy_state():
                self._capsules.keeps_numpy = True
                capsule.doubts.append(NUMPY)
        if capsule.doubts or capsule.state is None or capsule.state.inventory.doubts:
            return  # no replay of it could be called faithful
        self._capsules.left(capsule, tensors, fact)

    def entered(
        self,
        capsule: Capsule,
        places: Sequence[tuple[int, int]],
        gradients: Sequence[torch.Tensor | None],
    ) -> None:
        """See `Capsules.entered`."""
        self._capsules.entered(capsule, places, gradients)


def nbytes(tensor: torch.Tensor) -> int:
    """What a tensor's elements take."""
    return tensor.numel() * tensor.element_size()


def nbytes_of(capsule: Capsule) -> int:
    """What a capsule's tensors take, when it has been read back."""
    return sum(map(nbytes, Leaves((capsule.args, capsule.kwargs, capsule.entering)).tensors))
