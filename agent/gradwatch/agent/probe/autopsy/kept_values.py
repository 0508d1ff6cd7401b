"""Values that modules keep: which are plain, how they are copied, put back, and handed to another process."""

from __future__ import annotations

import collections
import datetime as dt
import decimal
import enum
import fractions
import logging
import pathlib
import re
import types
import weakref
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

# Of a plain container with all that it holds.
MAX_ELEMENTS = 512
MAX_ARRAY_BYTES = 4096
# A tensor up to this size is kept alive.
MAX_TENSOR_BYTES = 1 << 16
# Of containers inside of containers.
_MAX_DEPTH = 4
# Of a tensor, to be compared with what it holds later.
_SAMPLES = 64
IMMUTABLE = (
    *(str, bytes, int, float, complex, type(None), type(...), range, slice, enum.Enum, re.Pattern),
    *(
        pathlib.PurePath,
        dt.date,
        dt.time,
        dt.timedelta,
        decimal.Decimal,
        fractions.Fraction,
    ),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, logging.Logger),
    *(types.CodeType, types.GenericAlias, types.UnionType),
)
CONTAINERS = frozenset(
    {
        list,
        dict,
        set,
        collections.deque,
        collections.OrderedDict,
        collections.defaultdict,
        collections.Counter,
    }
)
TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})
MISSING: Any = object()


class Held:
    """A tensor that is kept somewhere; held weakly where that would keep much memory."""

    __slots__ = ("_sample", "_strong", "_version", "_weak")

    def __init__(self, tensor: torch.Tensor) -> None:
        small = tensor.grad_fn is None and tensor.numel() * tensor.element_size() <= MAX_TENSOR_BYTES
        self._strong = tensor if small else None
        self._weak = None if small else weakref.ref(tensor)
        self._version = version(tensor)
        self._sample = sample_of(tensor)

    def get(self) -> torch.Tensor | None:
        """The tensor; None once it is gone."""
        return self._strong if self._weak is None else self._weak()

    @property
    def is_as_it_was(self) -> bool:
        """Whether it is still there, and was not written to."""
        tensor = self.get()
        return tensor is not None and version(tensor) == self._version and is_as_sampled(tensor, self._sample)


def is_array(value: Any) -> bool:
    """A small array of NumPy's, or one of its numbers; without importing it."""
    cls = type(value)
    if cls.__module__ != "numpy":
        return False
    if cls.__name__ == "ndarray":
        return bool(value.nbytes <= MAX_ARRAY_BYTES and value.dtype.kind != "O")
    return hasattr(value, "dtype")


def is_harmless(value: Any) -> bool:
    """Nothing that a computation depends on."""
    module = type(value).__module__
    return module in {"typing", "torch._C._distributed_c10d", "torch.distributed.device_mesh"}


def is_known(value: Any, kept: set[int], known: set[int]) -> bool:
    """Whether all of a value that was read is kept."""
    if isinstance(value, (*IMMUTABLE, torch.Tensor, Held)) or value is MISSING or id(value) in known:
        return True
    if type(value) in CONTAINERS:
        return id(value) in kept
    if isinstance(value, (tuple, frozenset)):
        return all(is_known(part, kept, known) for part in value)
    # What is looked through is told of by itself.
    return isinstance(value, (types.FunctionType, types.MethodType, types.BuiltinFunctionType, type)) or (
        isinstance(value, (weakref.ref, types.ModuleType)) or is_array(value) or is_harmless(value)
    )


def may_change(value: Any) -> bool:
    """Whether a value holds something small that can be written to."""
    if type(value) in CONTAINERS:
        return is_small(value)
    if isinstance(value, tuple):
        return any(may_change(part) for part in value)
    return is_array(value) and hasattr(value, "__setitem__")


def is_small(value: Any) -> bool:
    """Whether a container holds few elements, with all containers in it."""
    todo, elements, seen = [value], 0, set()
    while todo:
        one = todo.pop()
        if type(one) in CONTAINERS or isinstance(one, (tuple, frozenset)):
            if id(one) in seen:
                continue
            seen.add(id(one))
            elements += len(one)
            if elements > MAX_ELEMENTS:
                return False
            todo += one.values() if isinstance(one, dict) else one
    return True


def copy_contents(value: Any, contents: list[tuple[Any, Any]], depth: int = 0) -> None:
    """Shallow copies of a container and of those in it; a large one is left out, which is seen afterwards."""
    kind = type(value)
    if kind in CONTAINERS:
        if len(value) > MAX_ELEMENTS or depth > _MAX_DEPTH:
            return
        within = value.values() if isinstance(value, dict) else value
        contents.append((value, value.copy()))
    elif kind is tuple:
        within = value
    else:
        if is_array(value) and hasattr(value, "__setitem__"):
            contents.append((value, value.copy()))
        return
    for part in within:
        if not isinstance(part, (int, float, str)):
            copy_contents(part, contents, depth + 1)


def held(copy: Any) -> Any:
    """A copy of a container that does not keep tensors alive."""
    if type(copy) not in CONTAINERS or TENSORS.isdisjoint(map(type, parts(copy))):
        return copy
    if isinstance(copy, dict):
        copy.update({key: Held(part) for key, part in copy.items() if type(part) in TENSORS})
        return copy
    with_held = [Held(part) if type(part) in TENSORS else part for part in copy]
    copy.clear()
    (copy.update if isinstance(copy, set) else copy.extend)(with_held)
    return copy


def without_tensors(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same, with tensors held as `Held`."""
    if TENSORS.isdisjoint(map(type, values)):
        return values
    return tuple(Held(value) if type(value) in TENSORS else value for value in values)


def plainly(value: Any) -> Any:
    """The tensor that is held, or the value itself."""
    return value.get() if isinstance(value, Held) else value


def parts(content: Any) -> Iterable[Any]:
    """What a container holds."""
    if isinstance(content, dict):
        return content.values()
    return content if type(content) in CONTAINERS else ()


def put_back(container: Any, content: Any) -> None:
    """Have a container hold what a copy of it holds."""
    if type(container) not in CONTAINERS:
        container[...] = content
        return
    if isinstance(container, dict):
        within: Any = {key: plainly(value) for key, value in content.items()}
    else:
        within = [plainly(value) for value in content]
    ordered = isinstance(container, (list, collections.deque))
    container.clear()
    (container.extend if ordered else container.update)(within)


def kind(value: Any) -> str:
    """The name of its type."""
    return type(value).__name__


def version(tensor: torch.Tensor) -> int:
    """How often it was changed in place."""
    # A tensor made under inference_mode has none, and raises.
    return 0 if tensor.is_inference() else tensor._version


def sample_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """Some of the elements, copied: what is written by `.data` or by NumPy changes no version.

    None for a parameter, and for what is not all in the host's memory, in order.
    """
    if type(tensor) is not torch.Tensor or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return None
    flat = tensor.detach().view(-1)
    return (flat[:: flat.numel() // _SAMPLES] if flat.numel() > _SAMPLES else flat).clone()


def is_as_sampled(tensor: torch.Tensor, sample: torch.Tensor | None) -> bool:
    """Whether a tensor holds what it did when it was sampled; True without a sample."""
    if sample is None:
        return True
    now = sample_of(tensor)
    return (
        now is not None
        and (now.dtype, now.shape) == (sample.dtype, sample.shape)
        and torch.equal(now.view(torch.uint8), sample.view(torch.uint8))
    )


def generator_state(generator: Any) -> Any:
    """Of a generator of torch's, or of Python's `random`."""
    return generator.get_state() if isinstance(generator, torch.Generator) else generator.getstate()


def set_generator(generator: Any, state: Any) -> None:
    """Have a generator go on from a state."""
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    else:
        generator.setstate(state)


SKIPPED = "skipped"
_BUILD: dict[str, Callable[[Any], Any]] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "dict": dict,
    "deque": collections.deque,
    "OrderedDict": collections.OrderedDict,
}


def encoded(value: Any, contents: dict[int, Any]) -> list[Any]:
    """As nested lists of plain values with the names of their types."""
    value = contents.get(id(value), value)
    cls = type(value)
    if cls in {str, int, float, bool, type(None)}:
        return ["", value]
    if cls.__name__ not in _BUILD or _BUILD[cls.__name__] is not cls:
        return [SKIPPED, None]
    items = [list(item) for item in value.items()] if isinstance(value, dict) else [[one] for one in value]
    inner = [[encoded(one, contents) for one in part] for part in items]
    if any(tag == SKIPPED for part in inner for tag, _ in part):
        return [SKIPPED, None]
    return [cls.__name__, inner]


def decoded(encoded: list[Any]) -> Any:
    """What was `encoded`."""
    tag, value = encoded
    if not tag:
        return value
    items = [tuple(decoded(one) for one in part) for part in value]
    return _BUILD[tag](items if tag in {"dict", "OrderedDict"} else [part[0] for part in items])
