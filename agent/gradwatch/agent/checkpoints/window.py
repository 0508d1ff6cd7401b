"""Parts of files, read as files, and the storages that lie in them."""

from __future__ import annotations

import io
from typing import IO, Any

from gradwatch.agent.checkpoints.rebuild import storage_dtype
from gradwatch.agent.checkpoints.values import ITEM_BYTES, Extent, Global, Storage, TornError, UnreadableError

_TAG = 0
_STORAGE_FIELDS = 5


class Window(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: IO[bytes], extent: Extent) -> None:
        self.file = file
        self.extent = extent
        self._position = 0

    def readable(self) -> bool:
        """Whether it can be read."""
        return True

    def seekable(self) -> bool:
        """Whether it has positions."""
        return True

    def tell(self) -> int:
        """Position in the window."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move; raises OSError before the beginning, as files do."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.extent.nbytes}[whence]
        if base + offset < 0:
            raise OSError("a position before the beginning")
        self._position = base + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        """Read up to `size` bytes, all that are left by default."""
        left = max(0, self.extent.nbytes - self._position)
        count = left if size < 0 else min(size, left)
        self.file.seek(self.extent.offset + self._position)
        data = self.file.read(count)
        self._position += len(data)
        return data

    def readline(self, size: int | None = -1) -> bytes:
        """Read up to and with the next newline."""
        left = max(0, self.extent.nbytes - self._position)
        self.file.seek(self.extent.offset + self._position)
        data = self.file.readline(left if size is None or size < 0 else min(size, left))
        self._position += len(data)
        return data

    def part(self, offset: int, nbytes: int) -> Extent:
        """Bytes of the window as bytes of its file.

        Raises:
            TornError: it has no such bytes.
        """
        if offset < 0 or nbytes < 0 or offset + nbytes > self.extent.nbytes:
            raise TornError(
                f"bytes {offset} to {offset + nbytes} are said to be in a file of {self.extent.nbytes}"
            )
        return Extent(self.extent.file, self.extent.offset + offset, nbytes)


class Storages:
    """The storages that a pickle names, which are placed once it is known where they lie."""

    def __init__(self) -> None:
        self._named: dict[object, list[Storage]] = {}
        self._views: list[tuple[Storage, object, int]] = []

    def persistent(self, identifier: Any) -> Storage | Global:
        """What a persistent id stands for: ("storage", type, key, location, numel[, view]).

        Raises:
            UnreadableError: it is no such thing.
        """
        if not isinstance(identifier, tuple) or not identifier:
            raise UnreadableError(f"a reference that is not to a storage: {identifier!s:.80}")
        tag = _text(identifier[_TAG])
        if tag == "module" and isinstance(identifier[1], Global):
            return identifier[1]
        if tag != "storage" or len(identifier) < _STORAGE_FIELDS:
            raise UnreadableError(f"a reference that is not to a storage: {tag!s:.80}")
        kind, key, _, numel = identifier[1:_STORAGE_FIELDS]
        key, dtype = _text(key), storage_dtype(kind)
        if type(numel) is not int or numel < 0 or type(key) not in {str, int}:
            raise UnreadableError(f"storage {key!s:.80} with {numel!s:.80} elements")
        item = ITEM_BYTES[dtype or "uint8"]
        view = identifier[_STORAGE_FIELDS] if len(identifier) > _STORAGE_FIELDS else None
        if view is None:
            return self.named(key, dtype, numel * item)
        self.named(key, dtype, numel * item)
        _, offset, length = view
        storage = Storage(key, dtype, length * item)
        self._views.append((storage, key, offset * item))
        return storage

    def named(self, key: object, dtype: str | None, nbytes: int) -> Storage:
        """The storage of that name; the same bytes may be named with several types."""
        known = self._named.setdefault(key, [])
        for storage in known:
            if storage.dtype == dtype and storage.nbytes == nbytes:
                return storage
        storage = Storage(key, dtype, nbytes)
        known.append(storage)
        return storage

    @property
    def keys(self) -> list[object]:
        """The names of all storages."""
        return list(self._named)

    def item_bytes(self, key: object) -> int:
        """Bytes per element of what first named the storage."""
        return ITEM_BYTES[self._named[key][0].dtype or "uint8"]

    def place(self, key: object, extent: Extent) -> None:
        """Say where a storage lies.

        Raises:
            TornError: it is shorter there than it says it is.
            UnreadableError: nobody named it.
        """
        if key not in self._named:
            raise UnreadableError(f"storage {key!s:.80} belongs to nothing")
        for storage in self._named[key]:
            if extent.nbytes < storage.nbytes:
                raise TornError(f"storage {key} has {extent.nbytes} of {storage.nbytes} bytes")
            storage.extent = extent

    def place_views(self) -> None:
        """Place what is a part of another storage, once those are placed."""
        for storage, key, offset in self._views:
            root = self._named[key][0].extent
            if root is None or offset < 0 or offset + storage.nbytes > root.nbytes:
                raise TornError(f"a view of storage {key} is larger than it")
            storage.extent = Extent(root.file, root.offset + offset, storage.nbytes)


def _text(value: Any) -> Any:
    return value.decode("latin-1") if isinstance(value, bytes) else value
