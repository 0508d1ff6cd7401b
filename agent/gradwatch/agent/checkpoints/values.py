"""What a checkpoint's pickle turns into: plain data, and descriptions of what was left unbuilt.

UnreadableError     it cannot be understood; that says nothing about its bytes
└── TornError       bytes are missing, or are not where the format says they are
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

# Bytes per element, by torch's name of the dtype. Only dtypes that have a NaN are ever read.
FLOATING = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "complex128": 16,
    "complex64": 8,
    "complex32": 4,
}
_OTHER = {
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint64": 8,
    "uint32": 4,
    "uint16": 2,
    "uint8": 1,
    "bool": 1,
    "qint8": 1,
    "quint8": 1,
    "qint32": 4,
    "quint4x2": 1,
    "quint2x4": 1,
}
ITEM_BYTES = FLOATING | _OTHER


class UnreadableError(Exception):
    """A file that cannot be read as what it seems to be, and why."""


class TornError(UnreadableError):
    """A file that is not whole."""


@dataclass(frozen=True)
class Extent:
    """Bytes of a file."""

    file: Path
    offset: int
    nbytes: int

    @classmethod
    def whole(cls, file: Path) -> Extent:
        """All of a file.

        Raises:
            OSError: it is not there.
        """
        return cls(file, 0, file.stat().st_size)


@dataclass(frozen=True)
class Global:
    """A name that a pickle would have imported. It is never looked up."""

    name: str


class Stub:
    """An object that was not built: the call that would have made it, and what it was given then.

    Attributes:
        name: what would have been called.
        args: its arguments.
        state: what `__setstate__` would have got; None if nothing.
        items: what would have been appended to it.
        mapping: what would have been set in it by key.
        tensor: it would be a kind of tensor, such as a DTensor; what it is made of lies inside.
    """

    __slots__ = ("args", "items", "mapping", "name", "state", "tensor")

    def __init__(self, name: str, args: tuple[Any, ...] = (), *, tensor: bool = False) -> None:
        self.name = name
        self.tensor = tensor
        self.args = args
        self.state: Any = None
        self.items: list[Any] = []
        self.mapping: dict[Any, Any] = {}

    def attributes(self) -> dict[Any, Any]:
        """The instance's `__dict__`, also where it has slots; empty if there is none."""
        state = self.state
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):  # noqa: PLR2004 - (dict, slots)
            return {**(state[0] if isinstance(state[0], dict) else {}), **state[1]}
        return state if isinstance(state, dict) else {}


@dataclass(eq=False)
class Storage:
    """A run of bytes that tensors are views of.

    Attributes:
        key: its name within the file.
        dtype: of its elements; None for untyped bytes.
        nbytes: how long it says it is.
        extent: where it lies; None until that is known.
    """

    key: object
    dtype: str | None
    nbytes: int
    extent: Extent | None = None


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor as described; its values are still on disk.

    Attributes:
        dtype: torch's name of it, such as "bfloat16".
        storage: what it is a view of.
        offset: where it begins there, in elements.
        size, stride: in elements.
    """

    dtype: str
    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def span(self) -> tuple[int, int]:
        """Begin and end of the elements in the storage, in bytes, gaps between them included.

        Raises:
            UnreadableError: the description cannot be right.
        """
        numbers = (self.offset, *self.size, *self.stride)
        if len(self.size) != len(self.stride) or not all(
            type(number) is int and number >= 0 for number in numbers
        ):
            raise UnreadableError(f"a tensor of size {self.size} and stride {self.stride}")
        if 0 in self.size:
            return 0, 0
        last = sum((size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True))
        item = ITEM_BYTES[self.dtype]
        begin, end = self.offset * item, (self.offset + last + 1) * item
        if end > self.storage.nbytes:
            raise TornError(f"a tensor ends at byte {end} of a storage of {self.storage.nbytes}")
        return begin, end


@dataclass(frozen=True, eq=False)
class Inline:
    """Values that lie in the pickle itself, as numpy's arrays do.

    Attributes:
        dtype: torch's name of it.
        data: little-endian bytes.
    """

    dtype: str
    data: bytes


@dataclass(frozen=True, eq=False)
class Blobs:
    """A tensor in parts, each of them a torch file within a file, as DCP writes it."""

    dtype: str
    size: tuple[int, ...]
    extents: tuple[Extent, ...] = field(default=())


Leaf = Tensor | Inline | Blobs
