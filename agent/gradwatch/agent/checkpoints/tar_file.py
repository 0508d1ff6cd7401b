"""The oldest format of `torch.save`: a tar archive of `storages`, `tensors` and `pickle`.

Read off `_legacy_load` in `torch/serialization.py`.
"""

from __future__ import annotations

import struct
import tarfile
from typing import Any

from gradwatch.agent.checkpoints.rebuild import storage_dtype
from gradwatch.agent.checkpoints.unpickle import Clamped, unpickle, unpickle_from
from gradwatch.agent.checkpoints.values import ITEM_BYTES, Extent, Storage, Tensor, TornError, UnreadableError
from gradwatch.agent.checkpoints.window import Window

_MAX_DIMENSIONS = 64
_USTAR = (257, b"ustar")
_TYPES = ("storages", "tensors", "pickle")


def is_tar(window: Window) -> bool:
    """Whether it begins as a tar archive does."""
    window.seek(_USTAR[0])
    return window.read(len(_USTAR[1])) == _USTAR[1]


def read(window: Window) -> Any:
    """Read the object that was saved, with `Tensor` in place of tensors.

    Raises:
        TornError: it is not whole.
        UnreadableError: torch did not write it.
    """
    window.seek(0)
    try:
        with tarfile.open(fileobj=window, mode="r:") as archive:
            members = {info.name: info for info in archive.getmembers() if info.isreg()}
    except tarfile.TarError as error:
        raise TornError(f"its tar archive is damaged: {error}") from error
    if not all(name in members for name in _TYPES):
        raise TornError("its tar archive lacks storages, tensors or the pickle")
    part = {name: _window(window, members[name]) for name in _TYPES}
    try:
        storages = _storages(part["storages"])
        known = _tensors(part["tensors"], storages)
    except (TypeError, ValueError, KeyError, struct.error) as error:
        raise UnreadableError(f"its list of tensors is damaged: {error!s:.200}") from error
    known.update(storages)
    data = part["pickle"].read()

    def persistent(identifier: Any) -> Any:
        if isinstance(identifier, tuple):
            return identifier[0]
        key = int(identifier)
        if key not in known:
            raise UnreadableError(f"it refers to tensor {key}, which is not there")
        return known[key]

    return unpickle(data, persistent)


def _window(window: Window, info: tarfile.TarInfo) -> Window:
    return Window(window.file, window.part(info.offset_data, info.size))


def _storages(window: Window) -> dict[Any, Any]:
    """A count; for each: (key, location, type), the length in elements, the bytes; then the views."""
    stream = Clamped(window)
    storages: dict[Any, Any] = {}
    for _ in range(unpickle_from(stream)):
        key, _, kind = unpickle_from(stream)
        dtype = storage_dtype(kind) or "uint8"
        (numel,) = struct.unpack("<q", window.read(8))
        extent = window.part(window.tell(), numel * ITEM_BYTES[dtype])
        window.seek(window.tell() + extent.nbytes)
        storages[key] = Storage(key, dtype, extent.nbytes, extent)
    for target, key, offset, numel in unpickle_from(stream):
        root = storages[key]
        item = ITEM_BYTES[root.dtype]
        begin = root.extent.offset + offset * item
        if not 0 <= offset * item <= offset * item + numel * item <= root.nbytes:
            raise TornError("a view is larger than its storage")
        storages[target] = Storage(
            target, root.dtype, numel * item, Extent(root.extent.file, begin, numel * item)
        )
    return storages


def _tensors(window: Window, storages: dict[Any, Any]) -> dict[Any, Any]:
    """A count; for each: (key, storage, type), the number of dimensions, size, stride, offset."""
    stream = Clamped(window)
    tensors: dict[Any, Any] = {}
    for _ in range(unpickle_from(stream)):
        key, storage_key, _ = unpickle_from(stream)
        (dimensions,) = struct.unpack("<i4x", window.read(8))
        if not 0 <= dimensions <= _MAX_DIMENSIONS:
            raise UnreadableError(f"a tensor of {dimensions} dimensions")
        size = struct.unpack(f"<{dimensions}q", window.read(8 * dimensions))
        stride = struct.unpack(f"<{dimensions}q", window.read(8 * dimensions))
        (offset,) = struct.unpack("<q", window.read(8))
        storage = storages[storage_key]
        tensors[key] = Tensor(storage.dtype, storage, offset, size, stride)
    return tensors
