"""The storages of a torch file: named by its pickle, then placed in the file."""

from __future__ import annotations

from typing import Any

from gradwatch.agent.checkpoints.rebuild import storage_dtype
from gradwatch.agent.checkpoints.values import ITEM_BYTES, Extent, Global, Storage, TornError, UnreadableError

_TAG = 0
_STORAGE_FIELDS = 5


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
