"""What `torch.save` writes, described without its values: the zip format and the one before it.

A torch file may be a part of a file: DCP packs many into one. The formats are read off
`torch/serialization.py`; the oldest one, a tar archive, is `tar_file`.
"""

from __future__ import annotations

import io
import struct
import zipfile
from typing import IO, Any

from gradwatch.agent.checkpoints import tar_file
from gradwatch.agent.checkpoints.storages import Storages
from gradwatch.agent.checkpoints.unpickle import MAX_BYTES, Clamped, unpickle, unpickle_from
from gradwatch.agent.checkpoints.values import Extent, TornError, UnreadableError
from gradwatch.agent.checkpoints.window import Window

_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = b"\x80"
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # name and extra lengths are at 26
_ANNOUNCED = struct.Struct("<q")


def read(extent: Extent) -> Any:
    """Read the object that was saved, with `Tensor` in place of tensors.

    Raises:
        TornError: it is not whole.
        UnreadableError: it is not a torch file, or one that cannot be read.
        OSError: the file cannot be opened.
    """
    with extent.file.open("rb") as file:
        window = _window(file, extent)
        if window.read(4) == _ZIP_MAGIC:
            return _read_zip(window)
        window.seek(0)
        if tar_file.is_tar(window):
            return tar_file.read(window)
        window.seek(0)
        return _read_legacy(window)


def check(extent: Extent) -> None:
    """Whether a torch file is whole, as far as that shows without reading its pickles: zip files only.

    Raises:
        TornError: it is not.
        OSError: the file cannot be opened.
    """
    with extent.file.open("rb") as file:
        window = _window(file, extent)
        if window.read(4) == _ZIP_MAGIC:
            _members(window)


def _window(file: IO[bytes], extent: Extent) -> Window:
    if extent.nbytes == 0:
        raise TornError("it is empty")
    return Window(file, extent)


def _read_zip(window: Window) -> Any:
    members = _members(window)
    pickles = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise UnreadableError("a zip file that torch.save did not write")
    prefix = pickles[0].removesuffix("data.pkl")
    order = members.get(f"{prefix}byteorder")
    if order is not None and _contents(window, order).strip() != b"little":
        raise UnreadableError("its bytes are in big-endian order")
    named = Storages()
    value = unpickle(_contents(window, members[pickles[0]]), named.persistent)
    for key in named.keys:
        member = members.get(f"{prefix}data/{key}")
        if member is None:
            raise TornError(f"storage {key} is missing")
        named.place(key, _extent(window, member))
    named.place_views()
    return value


def _members(window: Window) -> dict[str, zipfile.ZipInfo]:
    """The entries of the central directory, which is written last."""
    try:
        with zipfile.ZipFile(window) as archive:
            infos = archive.infolist()
    except zipfile.BadZipFile as error:
        raise TornError(
            f"its zip directory, which is written last, is missing or damaged: {error}"
        ) from error
    except (ValueError, OSError, NotImplementedError, struct.error) as error:
        raise TornError(f"its zip directory is damaged: {error}") from error
    members = {}
    for info in infos:
        if info.header_offset + info.compress_size > window.extent.nbytes:
            raise TornError(f"{info.filename} ends after the end of the file")
        members[info.filename] = info
    return members


def _extent(window: Window, member: zipfile.ZipInfo) -> Extent:
    if member.compress_type != zipfile.ZIP_STORED:
        raise UnreadableError(f"{member.filename} is compressed")
    header = b""
    if member.header_offset >= 0:
        window.seek(member.header_offset)
        header = window.read(_LOCAL_HEADER.size)
    if len(header) != _LOCAL_HEADER.size or header[:4] != _ZIP_MAGIC:
        raise TornError(f"{member.filename} is not where the zip directory says")
    _, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    return window.part(member.header_offset + len(header) + name_length + extra_length, member.file_size)


def _contents(window: Window, member: zipfile.ZipInfo) -> bytes:
    extent = _extent(window, member)
    if extent.nbytes > MAX_BYTES:
        raise UnreadableError(f"{member.filename} has {extent.nbytes} bytes; {MAX_BYTES} are read at most")
    window.seek(extent.offset - window.extent.offset)
    return window.read(extent.nbytes)


def _read_legacy(window: Window) -> Any:
    """Five pickles (magic, version, system, object, storage keys), then each storage with its length."""
    stream = Clamped(window)
    try:
        magic = unpickle_from(stream)
    except UnreadableError as error:
        if window.tell() >= window.extent.nbytes and _begins_as_pickle(window):
            raise TornError("it ends in the middle of its first pickle") from error
        raise UnreadableError("not a file that torch.save wrote") from error
    if magic != _LEGACY_MAGIC:
        raise UnreadableError("a pickle that torch.save did not write")
    named = Storages()
    try:
        unpickle_from(stream)
        system = unpickle_from(stream)
        value = unpickle_from(stream, named.persistent)
        keys = unpickle_from(stream)
    except UnreadableError as error:
        if window.tell() >= window.extent.nbytes:
            raise TornError(f"it ends in the middle of a pickle: {error}") from error
        raise
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise UnreadableError("its bytes are in big-endian order")
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(map(str, named.keys)):
        raise UnreadableError("its list of storages is not that of its tensors")
    for key in keys:
        numel = _ANNOUNCED.unpack(_exactly(window, _ANNOUNCED.size))[0]
        # The type is that of the first tensor that named it.
        nbytes = numel * named.item_bytes(key)
        named.place(key, window.part(window.tell(), nbytes))
        window.seek(nbytes, io.SEEK_CUR)
    named.place_views()
    return value


def _begins_as_pickle(window: Window) -> bool:
    window.seek(0)
    return window.read(1) == _PROTOCOL


def _exactly(window: Window, count: int) -> bytes:
    data = window.read(count)
    if len(data) != count:
        raise TornError("it ends before its last storage")
    return data
