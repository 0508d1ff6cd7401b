"""An unpickler that imports nothing, calls nothing and builds plain data.

A pickle is a program. This machine runs its stack operations and leaves out what makes them dangerous:
a global is a name, a call gives a `Stub` that remembers it, and only the handful of calls in `rebuild` are
understood, none of which runs code of the pickle's choosing. Bounds: bytes, operations, and the depth of
keys (hashing recurses). Opcodes are split by `pickletools`, whose readers are the format's documentation.
"""

from __future__ import annotations

import io
import pickletools
from typing import TYPE_CHECKING, Any, Protocol, cast

from gradwatch.agent.checkpoints import rebuild
from gradwatch.agent.checkpoints.values import Global, Stub, UnreadableError

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import IO

MAX_BYTES = 256 << 20
# About 100 bytes of memory each, and a microsecond.
MAX_OPERATIONS = 20_000_000

_MARK = object()
_PUSHED = (
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
)  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


def unpickle(data: bytes, persistent: Callable[[Any], Any] | None = None) -> Any:
    """Read one pickle.

    Args:
        data: the pickle.
        persistent: what a persistent id stands for; None if there can be none.

    Raises:
        UnreadableError: it is damaged, hostile or too large.
    """
    if len(data) > MAX_BYTES:
        raise UnreadableError(f"a pickle of {len(data)} bytes; {MAX_BYTES} are read at most")
    return unpickle_from(io.BytesIO(data), persistent)


def unpickle_from(stream: Stream, persistent: Callable[[Any], Any] | None = None) -> Any:
    """Read one pickle from where `stream` is, and leave it behind the pickle's end.

    Raises:
        UnreadableError: it is damaged, hostile or too large.
    """
    try:
        return _Machine(persistent).run(stream)
    except UnreadableError:
        raise
    except RecursionError as error:
        raise UnreadableError("a pickle that is nested too deeply") from error
    except MemoryError as error:
        raise UnreadableError("a pickle that wants more memory than there is") from error
    except Exception as error:
        # Whatever a damaged program makes the stack do: IndexError, TypeError, KeyError…
        raise UnreadableError(f"a damaged pickle: {type(error).__name__}: {error!s:.200}") from error


class Stream(Protocol):
    """What a pickle is read from."""

    def read(self, size: int = ..., /) -> bytes:
        """Read up to `size` bytes."""
        ...

    def readline(self, size: int = ..., /) -> bytes:
        """Read a line."""
        ...

    def tell(self) -> int:
        """The position."""
        ...


class Clamped:
    """A stream in which no single read is larger than a pickle may be."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def read(self, size: int = -1) -> bytes:
        """Read `size` bytes."""
        if not 0 <= size <= MAX_BYTES:
            raise UnreadableError(f"a pickle with an item of {size} bytes; {MAX_BYTES} are read at most")
        return self._stream.read(size)

    def readline(self, size: int = -1) -> bytes:  # noqa: ARG002 - as files have it
        """Read a line, of at most MAX_BYTES."""
        return self._stream.readline(MAX_BYTES)

    def tell(self) -> int:
        """The position in the stream."""
        return self._stream.tell()


class _Machine:
    """A pickle's stack, its memo, and one method for each operation that is not a mere push."""

    def __init__(self, persistent: Callable[[Any], Any] | None) -> None:
        self._persistent = persistent
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, stream: Stream) -> Any:
        operations = self._operations()
        left = MAX_OPERATIONS
        start = None
        for opcode, arg, position in pickletools.genops(cast("IO[bytes]", stream)):
            if start is None:
                start = position or 0
            left -= 1
            if left < 0 or (position or 0) - start > MAX_BYTES:
                raise UnreadableError(
                    f"a pickle of more than {MAX_BYTES} bytes or {MAX_OPERATIONS} operations"
                )
            operations[opcode.name](arg)
        return self._stack.pop()

    def _operations(self) -> dict[str, Callable[[Any], None]]:
        push = self._stack.append
        return {
            **dict.fromkeys(_PUSHED, push),
            **{name: _pushing(push, value) for name, value in _CONSTANTS.items()},
            **dict.fromkeys(("PROTO", "FRAME", "STOP", "READONLY_BUFFER"), _nothing),
            **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda arg: push(self._memo[arg])),
            **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), self._put),
            "MEMOIZE": lambda _: self._put(len(self._memo)),
            "MARK": lambda _: push(_MARK),
            "POP": lambda _: self._stack.pop(),
            "POP_MARK": lambda _: self._to_mark(),
            "DUP": lambda _: push(self._stack[-1]),
            "EMPTY_LIST": lambda _: push([]),
            "EMPTY_DICT": lambda _: push({}),
            "EMPTY_TUPLE": lambda _: push(()),
            "EMPTY_SET": lambda _: push(Stub("builtins.set")),
            "LIST": lambda _: push(self._to_mark()),
            "TUPLE": lambda _: push(tuple(self._to_mark())),
            "TUPLE1": lambda _: push((self._stack.pop(),)),
            "TUPLE2": lambda _: self._tuple(2),
            "TUPLE3": lambda _: self._tuple(3),
            "FROZENSET": lambda _: push(Stub("builtins.frozenset", tuple(self._to_mark()))),
            "DICT": lambda _: push(rebuild.pairs({}, self._to_mark())),
            "APPEND": lambda _: self._extend([self._stack.pop()]),
            "APPENDS": lambda _: self._extend(self._to_mark()),
            "ADDITEMS": lambda _: self._extend(self._to_mark()),
            "SETITEM": lambda _: self._set(self._pop(2)),
            "SETITEMS": lambda _: self._set(self._to_mark()),
            "GLOBAL": lambda arg: push(Global(arg.replace(" ", ".", 1))),
            "STACK_GLOBAL": lambda _: push(Global("{}.{}".format(*self._pop(2)))),
            "REDUCE": lambda _: push(_call(*self._pop(2))),
            "NEWOBJ": lambda _: push(_call(*self._pop(2))),
            "NEWOBJ_EX": lambda _: self._new_with_names(*self._pop(3)),
            "INST": lambda arg: push(_call(Global(arg.replace(" ", ".", 1)), tuple(self._to_mark()))),
            "OBJ": lambda _: self._object(self._to_mark()),
            "BUILD": lambda _: self._build(self._stack.pop()),
            "PERSID": self._persist,
            "BINPERSID": lambda _: self._persist(self._stack.pop()),
        }

    def _pop(self, count: int) -> list[Any]:
        values = self._stack[-count:]
        if len(values) < count:
            raise UnreadableError("a damaged pickle: its stack is empty")
        del self._stack[-count:]
        return values

    def _to_mark(self) -> list[Any]:
        values: list[Any] = []
        while (value := self._stack.pop()) is not _MARK:
            values.append(value)
        values.reverse()
        return values

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _tuple(self, count: int) -> None:
        self._stack.append(tuple(self._pop(count)))

    def _extend(self, values: list[Any]) -> None:
        target = self._stack[-1]
        (target.items if isinstance(target, Stub) else target).extend(values)

    def _set(self, flat: list[Any]) -> None:
        target = self._stack[-1]
        rebuild.pairs(target.mapping if isinstance(target, Stub) else target, flat)

    def _new_with_names(self, target: Any, args: tuple[Any, ...], names: dict[str, Any]) -> None:
        self._stack.append(_call(target, (*args, names)))

    def _object(self, values: list[Any]) -> None:
        self._stack.append(_call(values[0], tuple(values[1:])))

    def _build(self, state: Any) -> None:
        target = self._stack[-1]
        if isinstance(target, Stub):
            target.state = state
            self._stack[-1] = rebuild.finish(target)

    def _persist(self, identifier: Any) -> None:
        if self._persistent is None:
            raise UnreadableError("a pickle with references to what lies outside it")
        self._stack.append(self._persistent(identifier))


def _call(target: Any, args: Any) -> Any:
    if not isinstance(args, tuple):
        raise UnreadableError("a damaged pickle: it calls something without arguments")
    return rebuild.call(target.name, args) if isinstance(target, Global) else Stub("?", (target, *args))


def _pushing(push: Callable[[Any], None], value: Any) -> Callable[[Any], None]:
    return lambda _: push(value)


def _nothing(_: Any) -> None:
    pass
