"""See every operator of a replay, and note those that give something non-finite."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from gradwatch.agent.probe.autopsy.provenance import Event, Given, on_purpose
from gradwatch.agent.probe.autopsy.values import FINITE, described, kinds_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from gradwatch.agent.probe.autopsy.place import Place
    from gradwatch.agent.probe.autopsy.provenance import Source
    from gradwatch.agent.probe.autopsy.values import Kinds

    # What was bad of an operator's tensors, the kinds of its numbers, and descriptions of all.
    _Taken: TypeAlias = "tuple[tuple[Source, ...], Kinds, list[dict[str, Any]]]"

# They take the dimension along which they normalise second.
_OF_ROWS = {"_softmax", "_log_softmax"}
_COLLECTIVES = frozenset({"c10d", "_c10d_functional", "c10d_functional", "_dtensor"})
# What they give is memory as it happens to be.
_UNINITIALISED = frozenset(
    {"empty", "empty_like", "empty_strided", "empty_permuted", "empty_quantized", "new_empty"}
    | {"new_empty_strided", "resize_", "resize_as_", "set_"}
)
# Of what they write into nothing is left.
_OVERWRITING = frozenset(
    {"copy_", "fill_", "zero_", "uniform_", "normal_", "random_", "bernoulli_", "exponential_", "cauchy_"}
    | {"geometric_", "log_normal_"}
)
_MAX_INPUTS = 8


class Collective(Exception):  # noqa: N818 - not an error: the replay ends here
    """A collective was about to be issued, which the other ranks would have to join.

    Attributes:
        operator: its name.
        bad: what of its input was bad; None when all was finite.
    """

    def __init__(self, operator: str, bad: Source | None) -> None:
        super().__init__(operator)
        self.operator = operator
        self.bad = bad


class Refused(Exception):  # noqa: N818 - not an error: the replay ends here
    """What it was about to do is not to be done in a replay; says why."""


@dataclass(frozen=True)
class Care:
    """What a replay in the training's own process has to mind.

    Attributes:
        own: the tensors from before it into which it may write.
        until: by `time.monotonic()`: no operator is begun after that.
    """

    own: Sequence[torch.Tensor]
    until: float


@dataclass(frozen=True)
class Facts:
    """What is told of an operator.

    Attributes:
        operator: "aten.log.default".
        place: where in the user's code.
        inputs: `OperatorInput` messages.
        backward: whether it ran in the backward pass.
    """

    operator: str
    place: Place
    inputs: list[dict[str, Any]]
    backward: bool


class Dissection(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes each operator that gives something non-finite, and what was bad of what it was given.

    Args:
        given: names what there was before the replay: pairs of "parameter" and the like, and its tensors.
        place: where the operator under way is.
        care: what is to be minded; None in a child process, which may do as it likes.
    """

    def __init__(
        self,
        given: Iterable[tuple[str, Sequence[torch.Tensor]]],
        place: Callable[[], Place],
        care: Care | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.backward = False
        # The exception itself may be turned into another one on its way through C++.
        self.collective: Collective | None = None
        self.refused: Refused | None = None
        self._place = place
        self._care = care
        # By storage, as with events: what the replay has made, and may write into.
        self._made = {} if care is None else {_key(one): _weak(one) for one in care.own}
        self._index = 0
        self._given = {_key(tensor): what for what, tensors in given for tensor in tensors}
        # The weak reference keeps the key from being used for another storage.
        self._events: dict[int, tuple[StorageWeakRef, Event]] = {}

    def bad(self, tensor: torch.Tensor) -> Source | None:
        """Where a tensor's non-finite elements were made; None when it has none."""
        key = _key(tensor)
        known = self._events.get(key)
        if known is not None and _is_whole(tensor):
            return known[1]
        kinds = kinds_of(tensor)
        if not kinds.any:
            return None
        return known[1] if known is not None else Given(self._given.get(key, "constant"), kinds)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See one operator."""
        del types
        kwargs = kwargs or {}
        self._index += 1
        place = self._place()
        name = func._schema.name.partition("::")[2]
        inputs = _inputs(func, args, kwargs)
        if func.namespace in _COLLECTIVES:
            self._refuse_collective(str(func), inputs)
        overwrites = name in _OVERWRITING or func._overloadname.endswith("out")
        written = [one for one, writes in inputs if writes and isinstance(one, torch.Tensor)]
        went_in = [one for one, writes in inputs if not (writes and overwrites)]
        self._mind(str(func), written)
        # What is changed in place cannot be looked at afterwards.
        rows = args[1] if name in _OF_ROWS and len(args) > 1 else None
        before = self._looked_at(went_in, rows) if written else None
        result = func(*args, **kwargs)
        outputs = written or list(_tensors(result))
        self._note_made(name, inputs, result)
        if name in _UNINITIALISED:
            for tensor in outputs:
                self._events.pop(_key(tensor), None)
            return result
        own = {_key(one) for one, _ in inputs if isinstance(one, torch.Tensor)} if not written else set()
        event: Event | None = None
        for tensor in outputs:
            key = _key(tensor)
            if key in own:
                continue  # a view
            kinds = kinds_of(tensor)
            if kinds.any:
                if event is None:
                    taken = self._looked_at(went_in, rows) if before is None else before
                    event = self._event(str(func), kinds, taken, place)
                self._events[key] = _weak(tensor), event
            elif key in self._events and _is_whole(tensor):
                del self._events[key]
        return result

    def _refuse_collective(self, operator: str, inputs: Sequence[tuple[Any, bool]]) -> None:
        read = (self.bad(one) for one, _ in inputs if isinstance(one, torch.Tensor))
        self.collective = Collective(operator, next((bad for bad in read if bad is not None), None))
        raise self.collective

    def _mind(self, operator: str, written: Sequence[torch.Tensor]) -> None:
        """Before an operator runs.

        Raises:
            Refused: it is not to.
        """
        care = self._care
        if care is None:
            return
        if time.monotonic() > care.until:
            self.refused = Refused("it took too long")
        elif any(_key(one) not in self._made for one in written):
            self.refused = Refused(f"{operator} would change a tensor that the training goes on with")
        if self.refused is not None:
            raise self.refused

    def _note_made(self, name: str, inputs: Sequence[tuple[Any, bool]], result: Any) -> None:
        if self._care is None:
            return
        known = {_key(one) for one, _ in inputs if isinstance(one, torch.Tensor)}
        for one in _tensors(result):
            key = _key(one)
            # `torch.tensor(...)` makes its tensor before it comes here.
            if key not in known or name == "lift_fresh":
                self._made[key] = _weak(one)

    def _looked_at(self, went_in: Sequence[Any], rows: int | None) -> _Taken:
        """Inputs as they are now; `rows`: the dimension along which the operator normalises."""
        bad = tuple(
            source
            for one in went_in
            if isinstance(one, torch.Tensor) and (source := self.bad(one)) is not None
        )
        numbers = FINITE
        for one in went_in:
            if not isinstance(one, torch.Tensor):
                numbers |= kinds_of(one)
        if not all(source.masked for source in bad):
            # It only carries on what came before.
            return bad, numbers, []
        return bad, numbers, [described(one, rows) for one in went_in[:_MAX_INPUTS]]

    def _event(self, operator: str, kinds: Kinds, taken: _Taken, place: Place) -> Event:
        bad, numbers, inputs = taken
        facts = Facts(operator, place, inputs, self.backward)
        return Event(self._index, kinds, bad, on_purpose(kinds, bad, numbers), facts)


def _inputs(func: Any, args: Any, kwargs: Any) -> list[tuple[Any, bool]]:
    """The tensors and real numbers that an operator is given, each with whether it writes into it."""
    found: list[tuple[Any, bool]] = []
    for place, argument in enumerate(func._schema.arguments):
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        alias = argument.alias_info
        writes = alias is not None and alias.is_write
        if isinstance(value, (list, tuple)):
            found += [(one, writes) for one in _tensors(value)]
        elif isinstance(value, torch.Tensor):
            found.append((value, writes))
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and _is_number(argument):
            found.append((value, False))
    return found


def _is_number(argument: Any) -> bool:
    kind = argument.type
    if kind.kind() == "OptionalType":
        kind = kind.getElementType()
    return kind.kind() in {"NumberType", "FloatType"}


def _tensors(value: Any) -> Iterable[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)


def _key(tensor: torch.Tensor) -> int:
    """Of its storage."""
    return int(_dense(tensor).untyped_storage()._cdata)


def _weak(tensor: torch.Tensor) -> StorageWeakRef:
    return StorageWeakRef(_dense(tensor).untyped_storage())  # type: ignore[no-untyped-call]


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that has the memory."""
    if tensor.layout == torch.strided:
        return tensor
    return tensor._values() if tensor.layout == torch.sparse_coo else tensor.values()


def _is_whole(tensor: torch.Tensor) -> bool:
    return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
