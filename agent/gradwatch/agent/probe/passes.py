"""What enters a watched model and what leaves it, in each forward pass and in the backward pass through it.

The facts that tell in which phase a gradient went bad: are the inputs finite, is the output, is the gradient
that enters the model. They are taken when the tensors are there, since keeping them would keep their memory.
Nothing is hooked to a module or a tensor: DDP's own `forward` is wrapped, and the gradient is seen at
the node of the graph that it enters by.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from gradwatch.agent.probe import scan
from gradwatch.agent.probe.phases.loss_graph import MARK

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from gradwatch.agent.probe.autopsy.capsule import Capsule, ModelCapsules
    from gradwatch.agent.probe.fuses import Fuses
    from gradwatch.agent.probe.outputs import Outputs
    from gradwatch.agent.probe.phases.loss_pass import LossPass

# Finite or not; on a device the largest magnitude, a float64 of shape (), which nobody waits for;
# None for what is not known.
Fact: TypeAlias = "bool | torch.Tensor | None"

# The part of the probe, for its fuse.
PART = "passes"
# Of a model that is given what another one made, which was given what a third one made.
_MAX_CHAIN = 8
# Passes without a backward pass, such as those of an evaluation, are forgotten beyond these.
_MAX_PASSES = 256
# Of nested inputs. What lies deeper, or is of a kind that holds who knows what, is not known.
_MAX_DEPTH = 8
_MAX_LEAVES = 512
# A scale below it makes gradients smaller than they are: it is not what makes them overflow.
LOWEST_SCALE = 1.0
_PLAIN = (str, bytes, bool, int, type(None), torch.dtype, torch.device, torch.Size)
# Not in every torch.
_current_node: Callable[[], Any] | None = getattr(torch._C, "_current_autograd_node", None)


@dataclasses.dataclass(frozen=True)
class Entrance:
    """A node of the autograd graph by which gradients have entered a model, in its backward pass.

    Attributes:
        node: its output has left the model; None where torch does not tell it.
        ordinals: of the tensors among the output's that it made.
        gradient: finite.
    """

    node: Any
    ordinals: tuple[int, ...]
    gradient: Fact


@dataclasses.dataclass(eq=False)
class Masks:
    """Where infinities below zero have entered or left a model in rounds that turned out clean.

    Attributes:
        usual: "inputs", "handed", "output".
        has_clean_rounds: there were clean rounds at all.
    """

    usual: set[str] = dataclasses.field(default_factory=set)
    has_clean_rounds: bool = False

    def verdict(self, place: str) -> bool | None:
        """Whether such infinities are as good as finite; None when that is not known.

        An input that holds a mask now and then is none to be blamed; an output that never did is.
        """
        if place in self.usual:
            return True
        return False if place == "output" and self.has_clean_rounds else None


@dataclasses.dataclass
class Pass:
    """One forward pass, and what is known of the backward pass through it.

    Attributes:
        batch: JSON of the user's tag.
        inputs: finite before the pass; of those that it was given from outside.
        output: finite after it.
        entering: the gradient that entered the model by its output.
        scaled_loss: the loss, before a GradScaler scaled it; None when none did.
        before: the gradients that had been summed up when that backward pass began; None in the first.
        backward: ordinal of that backward pass since the last reduction; None before it has begun.
        capsule: what is kept of it for a replay, if anything.
        handed: as `inputs`, of those that the job had computed from something.
        makers: the passes of watched models that made these, as far as they are known.
        own: whether the parameters of its model were finite; what gives that, as long as nobody has asked.
        entrances: of its backward pass, in the order in which they were come to; until its round is over,
            since a node holds the graph below it.
        loss: the backward pass that has gone through it.
        masked: where nothing was not finite but infinities below zero: "inputs", "handed", "output".
        masks: of its model, where such are there on purpose.
    """

    batch: str | None = None
    inputs: Fact = None
    output: Fact = None
    entering: Fact = None
    scaled_loss: Fact = None
    before: Fact = None
    backward: int | None = None
    capsule: Capsule | None = None
    handed: Fact = True
    makers: tuple[Pass, ...] = ()
    own: Fact | Callable[[], Fact] = None
    entrances: list[Entrance] = dataclasses.field(default_factory=list)
    loss: LossPass | None = None
    masked: set[str] = dataclasses.field(default_factory=set)
    masks: Masks = dataclasses.field(default_factory=Masks)

    def learn_masks(self) -> None:
        """Its round turned out clean: infinities below zero were there on purpose."""
        self.masks.has_clean_rounds = True
        if self.masked:
            self.masks.usual |= self.masked

    def release(self) -> None:
        """Its round is over: keep nothing for a replay, and nothing of the graph."""
        self.entrances.clear()
        if self.capsule is not None:
            self.capsule.release()

    def all_facts(self) -> list[Fact]:
        """What may have to be read out: see `read_out`."""
        own = None if callable(self.own) else self.own
        facts = [self.inputs, self.handed, self.output, self.entering, self.scaled_loss, self.before, own]
        return [*facts, *(fact for maker in self.makers for fact in maker.all_facts())]

    def read_out(self, facts: Iterator[bool | float | None]) -> Pass:
        """The same with what is known by now, in the order of `all_facts`.

        Args:
            facts: finite or not, or the largest magnitude, which does not tell the sign of an infinity.
        """
        masked = set(self.masked)

        def told(place: str = "") -> bool | None:
            fact = next(facts)
            if not isinstance(fact, float):
                return fact
            if place and math.isinf(fact):
                masked.add(place)
                return self.masks.verdict(place)
            return math.isfinite(fact)

        return dataclasses.replace(
            self,
            inputs=told("inputs"),
            handed=told("handed"),
            output=told("output"),
            entering=told(),
            scaled_loss=told(),
            before=told(),
            own=told(),
            makers=tuple(maker.read_out(facts) for maker in self.makers),
            masked=masked,
        )

    def learn(self) -> None:
        """Ask whether the parameters are finite, while that is to be had."""
        if callable(self.own) and not isinstance(self.own, torch.Tensor):
            self.own = self.own()

    @property
    def is_bad(self) -> bool:
        """Whether something that entered or left the model was."""
        return False in (self.inputs, self.handed, self.output, self.entering)

    @property
    def chain(self) -> int:
        """How many passes one has to go back, at most, from maker to maker."""
        return max((1 + maker.chain for maker in self.makers), default=0)


class Passes:
    """The passes of one model since its last reduction.

    Args:
        fact: whether tensors are all finite: as `Look.fact`.
        ordinal: gives that of the backward pass under way, since the last reduction.
        fuses: blown when the look at a gradient fails; autograd would raise it into the training.
        spent: told how long the look at a gradient took, in seconds.
        gradients: gives those of the model as they are now.
        capsules: where passes are kept for a replay; None to keep none.
        weights: as in `Capsules.begin`.
        device: where the model is.
        loss: gives the backward pass under way.
    """

    def __init__(
        self,
        fact: Callable[[Sequence[torch.Tensor]], Fact],
        ordinal: Callable[[], int],
        fuses: Fuses,
        spent: Callable[[float], object],
        gradients: Callable[[], Sequence[torch.Tensor]],
        *,
        capsules: ModelCapsules | None = None,
        weights: Callable[[], tuple[int, ...]] = tuple,
        device: torch.device | None = None,
        loss: Callable[[], LossPass | None] = lambda: None,
    ) -> None:
        self._fact = fact
        self._ordinal = ordinal
        self._fuses = fuses
        self._spent = spent
        self._gradients = gradients
        self._capsules = capsules
        self._weights = weights
        self._device = device or torch.device("cpu")
        self._loss = loss
        self._passes: list[Pass] = []
        self._masks = Masks()

    @property
    def gave_finite_outputs(self) -> bool:
        """Whether the passes whose backward pass is to come are known to have given finite outputs."""
        return all(one.output is True for one in self._passes if one.backward is None)

    def entered(
        self,
        args: Any,
        kwargs: Any,
        batch: str | None,
        outputs: Outputs | None = None,
        own: Callable[[], Fact] | None = None,
        *,
        remember: bool = True,
    ) -> Pass:
        """A forward pass begins with these arguments.

        Args:
            args: of the call.
            kwargs: of the call.
            batch: JSON of the user's tag.
            outputs: of all models, where there are several.
            own: gives whether the model's parameters are finite.
            remember: a backward pass may follow.
        """
        leaves = Leaves((args, kwargs))
        tensors = leaves.tensors
        handed: list[torch.Tensor] = []
        makers: list[Pass] = []
        leaves.tensors = []
        for tensor in tensors:
            was_made, maker = (False, None) if outputs is None else outputs.maker(tensor)
            (handed if was_made or tensor.grad_fn is not None else leaves.tensors).append(tensor)
            if maker is not None and all(maker is not other for other in makers):
                makers.append(maker)
        one = Pass(batch, own=own, masks=self._masks)
        one.inputs = self._known(leaves, one, "inputs")
        if handed:
            one.handed = self._unless_masked(self._fact(handed), handed, one, "handed")
            if one.handed is not True:
                for maker in makers:
                    maker.learn()
                one.makers = tuple(maker for maker in makers if maker.chain < _MAX_CHAIN)
        if not remember:
            return one
        if self._capsules is not None:
            one.capsule = self._capsules.begin(
                args, kwargs, tensors, leaves.unknown, self._weights, device=self._device
            )
        self._passes = [*self._passes[1 - _MAX_PASSES :], one]
        return one

    def left(self, one: Pass, output: Any, outputs: Outputs | None = None) -> None:
        """It has ended with this output; `outputs` of all models, where there are several."""
        leaves = Leaves(output)
        one.output = self._known(leaves, one, "output")
        if outputs is not None:
            outputs.made(one, leaves.tensors)
        if one.capsule is not None and self._capsules is not None:
            self._capsules.left(one.capsule, leaves.tensors, one.output)
        nodes: dict[int, tuple[Any, list[tuple[int, int]]]] = {}
        for ordinal, tensor in enumerate(leaves.tensors):
            if tensor.grad_fn is not None:
                node, places = nodes.setdefault(id(tensor.grad_fn), (tensor.grad_fn, []))
                if all(number != tensor.output_nr for _, number in places):
                    places.append((ordinal, tensor.output_nr))
        for node, places in nodes.values():
            node.metadata[MARK] = True
            # The node keeps its hook, and the pass keeps nodes: the garbage collector sees no such circle.
            node.register_prehook(functools.partial(self._enters, weakref.ref(one), places))

    def scaled(self, losses: Any) -> None:
        """A GradScaler scales what was made of the newest output; these are as they were before."""
        waiting = [one for one in self._passes if one.backward is None]
        if waiting:
            waiting[-1].scaled_loss = self._known(Leaves(losses), waiting[-1], "")

    def forget_state(self) -> None:
        """Keep nothing of the model's Python state until its next pass."""
        if self._capsules is not None:
            self._capsules.forget()

    def let_go(self) -> None:
        """The model is gone: keep none of its passes."""
        self._passes = []
        self.forget_state()

    def take(self) -> tuple[Pass, ...]:
        """Those that a backward pass has gone through, oldest first; they are forgotten here."""
        gone = [one for one in self._passes if one.backward is not None]
        self._passes = [one for one in self._passes if one.backward is None]
        return tuple(sorted(gone, key=lambda one: one.backward or 0))

    def _enters(
        self,
        known: weakref.ref[Pass],
        places: Sequence[tuple[int, int]],
        gradients: Sequence[torch.Tensor | None],
    ) -> None:
        if not self._fuses.intact(PART):
            return
        one, loss = known(), self._loss()
        if one is None:
            # Its round is over, or too many came after it.
            if loss is not None:
                loss.knows_all = False
            return
        began = time.perf_counter()
        try:
            if one.backward is None:
                one.backward = self._ordinal()
                # Gradient accumulation: which of the passes it was cannot be seen in their sum afterwards.
                one.before = self._fact(self._gradients()) if one.backward > 0 else None
            now = self._fact([gradient for gradient in gradients if gradient is not None])
            one.entering = both(one.entering, now)
            node = None if _current_node is None else _current_node()
            one.entrances.append(Entrance(node, tuple(ordinal for ordinal, _ in places), now))
            # Without roots it is one of `autograd.grad`: a gradient that the loss will use.
            if loss is not None and loss.roots:
                one.loss = loss
                loss.entered(one)
                loss.is_bad = loss.is_bad or now is False
            if one.capsule is not None and self._capsules is not None:
                self._capsules.entered(one.capsule, places, gradients)
        except Exception as error:
            self._fuses.blow(PART, error)
        self._spent(time.perf_counter() - began)

    def _known(self, leaves: Leaves, one: Pass, place: str) -> Fact:
        if not leaves.finite:
            return False
        fact = self._unless_masked(self._fact(leaves.tensors), leaves.tensors, one, place)
        # What could not be looked at may be bad; what was looked at and is bad, is.
        return fact if leaves.all_known or fact is False else None

    def _unless_masked(self, fact: Fact, tensors: Sequence[torch.Tensor], one: Pass, place: str) -> Fact:
        """The fact, unless what is not finite is below zero, as in a mask: then clean rounds tell."""
        if fact is not False or not place or not all(map(scan.is_masked_at_most, tensors)):
            return fact
        one.masked.add(place)
        return self._masks.verdict(place)


class Leaves:
    """The tensors in nested arguments: lists, mappings, dataclasses, and objects with attributes.

    Attributes:
        tensors: found.
        finite: no plain number among the rest is NaN or infinite.
        unknown: the type of the first thing that could not; None when there was none.
    """

    def __init__(self, nested: Any) -> None:
        self.tensors: list[torch.Tensor] = []
        self.finite = True
        self.unknown: str | None = None
        self._seen: set[int] = set()
        self._walk(nested, 0)

    @property
    def all_known(self) -> bool:
        """Nothing was found that could not be looked into."""
        return self.unknown is None

    def _walk(self, value: Any, depth: int) -> None:
        if isinstance(value, torch.Tensor):
            self.tensors.append(value)
        elif isinstance(value, float):
            self.finite &= math.isfinite(value)
        elif isinstance(value, _PLAIN) or id(value) in self._seen:
            return
        elif depth >= _MAX_DEPTH or len(self._seen) >= _MAX_LEAVES:
            self.unknown = self.unknown or "deeply nested structure"
        else:
            self._seen.add(id(value))
            parts = _parts(value)
            if parts is None:
                self.unknown = self.unknown or type(value).__name__
                return
            for part in parts:
                self._walk(part, depth + 1)


def _parts(value: Any) -> Iterable[Any] | None:
    """What a container holds; None when it cannot be looked into without calling who knows what."""
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, (list, tuple, set, frozenset)):
        return value
    try:
        attributes: dict[str, Any] = vars(value)
    except TypeError:
        return None
    return attributes.values()


def both(one: Fact, other: Fact) -> Fact:
    """One fact of two about parts of the same; None takes no part."""
    if one is None or other is None:
        return other if one is None else one
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.stack([one, other]).amax()
    if isinstance(one, bool) and isinstance(other, bool):
        return one and other
    # A part that holds nothing to be looked at is finite, and known at once.
    tensor, known = (one, other) if isinstance(one, torch.Tensor) else (other, one)
    return tensor if known else False


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a rank's gradients went bad, as far as it can be told.

    Attributes:
        phase: enum name of `gradwatch.v1.Phase`.
        microbatch: ordinal of the backward pass since the last reduction.
        batch: JSON of the user's tag.
        overflow: only the scale of a GradScaler made them bad, for all that is known: everything before it
            was finite, the unscaled loss too.
    """

    phase: str | None = None
    microbatch: int | None = None
    batch: str | None = None
    overflow: bool = False


def origin_of(passes: Sequence[Pass], *, parameters: bool | None, scale: float | None = None) -> Origin:
    """Where it began on this rank, when its gradients are bad.

    Args:
        passes: that the gradients are of, oldest first, with facts that the host knows.
        parameters: whether they are finite before the step; None when not known.
        scale: of a GradScaler; None when not known, or without one.
    """
    overflow = bool(passes) and all(_may_overflow(one) for one in passes) and parameters is not False
    if scale is not None and scale < LOWEST_SCALE:
        overflow = False
    one = _first_bad(passes)
    if one is None and parameters is False:
        one = next(iter(passes), None)
    if one is not None:
        return Origin(_phase_of(one, parameters), one.backward, one.batch, overflow)
    if parameters is False:
        return Origin("PHASE_PARAMETER")
    # Several passes, and the gradients were looked at when they had been summed up.
    backward = passes and all(one.output and one.entering for one in passes)
    return Origin("PHASE_BACKWARD" if backward else None, overflow=overflow)


def _first_bad(passes: Sequence[Pass]) -> Pass | None:
    """The pass in which it began; None when that cannot be told."""
    for one in passes:
        if one.before is False:
            # It had gone bad by then, and nothing that entered or left had shown it.
            return next((other for other in passes if other.backward == (one.backward or 0) - 1), None)
        if one.is_bad:
            return one
    last = passes[-1] if passes else None
    return last if last is not None and (not last.backward or last.before) else None


def _phase_of_makers(makers: Sequence[Pass]) -> str | None:
    """Where it began in those that made a bad input; None where the script computed it, or changed it."""
    bad = [maker for maker in makers if maker.output is False]
    own = [maker.own if isinstance(maker.own, bool) else None for maker in bad]
    phases = {_phase_of(maker, parameters) for maker, parameters in zip(bad, own, strict=True)}
    return phases.pop() if len(phases) == 1 else None


def _may_overflow(one: Pass) -> bool:
    return one.scaled_loss is True and False not in (one.inputs, one.handed, one.output)


def _phase_of(one: Pass, parameters: bool | None) -> str | None:
    if one.inputs is False:
        return "PHASE_INPUT"
    if one.handed is False or (one.handed is None and any(maker.output is False for maker in one.makers)):
        return _phase_of_makers(one.makers)
    if parameters is False:
        return "PHASE_PARAMETER"
    if one.output is False:
        return "PHASE_FORWARD" if one.inputs and one.handed and parameters else None
    if one.output is None or one.entering is None:
        return None
    return "PHASE_BACKWARD" if one.entering else "PHASE_LOSS"
