"""The few calls in a checkpoint's pickle that are understood; all others stay stubs.

Nothing here costs more than its arguments did, and nothing looks a name up. The signatures are those
of `torch._utils._rebuild_*`, `numpy._core.multiarray` and of the standard containers.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from gradwatch.agent.checkpoints.values import (
    ITEM_BYTES,
    Global,
    Inline,
    Storage,
    Stub,
    Tensor,
    UnreadableError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "QInt8Storage": "qint8",
    "QUInt8Storage": "quint8",
    "QInt32Storage": "qint32",
    "QUInt4x2Storage": "quint4x2",
    "QUInt2x4Storage": "quint2x4",
}
# numpy's type strings without the byte order.
_NUMPY = {"f8": "float64", "f4": "float32", "f2": "float16", "c16": "complex128", "c8": "complex64"}
# Rebuilders of sparse, nested, quantized and wrapped tensors; FSDP's ShardedTensor.
_TENSOR = re.compile(
    r"torch\._utils\._rebuild_|torch\.nested\.|torch\.distributed\..*\.(ShardedTensor|DTensor)$"
)
_UNTYPED = "UntypedStorage"
_MAX_KEY_NODES = 1000
_MAX_KEY_DEPTH = 20
_MAX_DIMENSIONS = 64


def call(name: str, args: tuple[Any, ...]) -> Any:
    """What calling `name` would give, as far as it is understood; else a stub.

    Raises:
        UnreadableError: the arguments cannot be those of this call.
    """
    known = _CALLS.get(name)
    if known is None:
        return Stub(name, args, tensor=_TENSOR.match(name) is not None)
    try:
        return known(args)
    except (TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        raise UnreadableError(f"{name} with arguments that it does not take: {error!s:.200}") from error


def finish(stub: Stub) -> Any:
    """What a stub has become now that its state is known: an array, or itself."""
    state = stub.state
    if stub.name in _ARRAYS and isinstance(state, tuple) and len(state) == 5:  # noqa: PLR2004 - numpy's state
        _, _, dtype, _, data = state
        name = _numpy_dtype(dtype)
        if name is not None and isinstance(data, bytes):
            return Inline(name, data)
    return stub


def pairs(target: Any, flat: list[Any]) -> Any:
    """Set keys and values, which alternate in `flat`, in a dictionary.

    Raises:
        UnreadableError: it is no dictionary, or a key could not be hashed in bounded time and stack.
    """
    if not isinstance(target, dict) or len(flat) % 2:
        raise UnreadableError("a damaged pickle: it sets keys of what has none")
    for index in range(0, len(flat), 2):
        key = flat[index]
        if type(key) is tuple:
            _check_key(key)
        target[key] = flat[index + 1]
    return target


def _check_key(key: tuple[Any, ...]) -> None:
    nodes = 0
    waiting: list[tuple[tuple[Any, ...], int]] = [(key, 0)]
    while waiting:
        node, depth = waiting.pop()
        nodes += len(node)
        if nodes > _MAX_KEY_NODES or depth > _MAX_KEY_DEPTH:
            raise UnreadableError("a pickle with a key that is nested too deeply")
        waiting.extend((inner, depth + 1) for inner in node if type(inner) is tuple)


def storage_dtype(kind: Any) -> str | None:
    """The element type of a storage class; None for untyped bytes.

    Raises:
        UnreadableError: it is not a storage class that is known.
    """
    last = kind.name.rpartition(".")[2] if isinstance(kind, Global) else str(kind)
    if last == _UNTYPED:
        return None
    if last not in _STORAGES:
        raise UnreadableError(f"a storage of type {last!s:.80}")
    return _STORAGES[last]


def dtype_name(dtype: Any) -> str:
    """The name that torch gives a dtype.

    Raises:
        UnreadableError: it is none that is known.
    """
    name = dtype.name.removeprefix("torch.") if isinstance(dtype, Global) else str(dtype)
    if name not in ITEM_BYTES:
        raise UnreadableError(f"a tensor of type {name!s:.80}")
    return name


def _tensor(args: tuple[Any, ...]) -> Tensor:
    """_rebuild_tensor(storage, storage_offset, size, stride), and _v2, which has more after it."""
    storage, offset, size, stride = args[:4]
    return Tensor(_typed(storage), storage, offset, _shape(size), _shape(stride))


def _tensor_v3(args: tuple[Any, ...]) -> Tensor:
    """_rebuild_tensor_v3(storage, storage_offset, size, stride, requires_grad, hooks, dtype, metadata)."""
    storage, offset, size, stride, _, _, dtype = args[:7]
    _typed(storage)
    return Tensor(dtype_name(dtype), storage, offset, _shape(size), _shape(stride))


def _shape(sizes: Any) -> tuple[int, ...]:
    if len(sizes) > _MAX_DIMENSIONS:
        raise UnreadableError(f"a tensor of {len(sizes)} dimensions")
    return tuple(sizes)


def _typed(storage: Any) -> str:
    if not isinstance(storage, Storage):
        raise UnreadableError("a tensor without a storage")
    return storage.dtype or "uint8"


def _first(args: tuple[Any, ...]) -> Any:
    """_rebuild_parameter(data, requires_grad, backward_hooks), with a state behind it or not."""
    return args[0]


def _from_type(args: tuple[Any, ...]) -> Any:
    """_rebuild_from_type_v2(func, type, args, state): a subclass, whose own tensors may be in the state."""
    function, kind, inner, state = args
    made = call(function.name, inner)
    if isinstance(made, Stub):
        made.name = kind.name
        made.tensor = True
        made.state = state
    return made


def _mapping(args: tuple[Any, ...]) -> dict[Any, Any]:
    """OrderedDict(), or OrderedDict([[key, value], …]) as old protocols have it."""
    if not args:
        return {}
    source = args[0]
    return source if isinstance(source, dict) else pairs({}, [item for pair in source for item in pair])


def _encode(args: tuple[Any, ...]) -> bytes:
    """_codecs.encode(text, "latin1"): how protocol 2 writes bytes."""
    text, encoding = args
    if encoding not in {"latin1", "latin-1"}:
        raise UnreadableError(f"bytes in {encoding!s:.40}")
    return bytes(text, "latin-1")


def _bytes(args: tuple[Any, ...]) -> bytes:
    """bytes() or bytearray(b"…"); of a number, they would be a way to ask for memory."""
    if args and not isinstance(args[0], (bytes, bytearray)):
        raise UnreadableError("bytes of something else")
    return bytes(args[0]) if args else b""


def _scalar(args: tuple[Any, ...]) -> Any:
    """A scalar of numpy's: (dtype, bytes)."""
    dtype, data = args
    name = _numpy_dtype(dtype)
    if name is not None and isinstance(data, bytes):
        return Inline(name, data)
    kind = str(dtype.args[0]) if isinstance(dtype, Stub) and dtype.args else ""
    if kind[:1] in {"i", "u"} and isinstance(data, bytes):
        return int.from_bytes(data, "little", signed=kind[0] == "i")
    return Stub("numpy.scalar", args)


def _numpy_dtype(dtype: Any) -> str | None:
    """The name that torch gives a little-endian floating dtype of numpy's; None for others."""
    if not isinstance(dtype, Stub) or not dtype.args:
        return None
    big_endian = isinstance(dtype.state, tuple) and len(dtype.state) > 1 and dtype.state[1] == ">"
    return None if big_endian else _NUMPY.get(str(dtype.args[0]))


_ARRAYS = frozenset({"numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"})
_CALLS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.Size": lambda args: _shape(args[0]) if args else (),
    "torch.serialization._get_layout": _first,
    "collections.OrderedDict": _mapping,
    "collections.Counter": _mapping,
    "collections.defaultdict": lambda args: _mapping(args[1:]),
    "builtins.dict": _mapping,
    "__builtin__.dict": _mapping,
    "builtins.bytes": _bytes,
    "__builtin__.bytes": _bytes,
    "builtins.bytearray": _bytes,
    "__builtin__.bytearray": _bytes,
    "_codecs.encode": _encode,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
}
