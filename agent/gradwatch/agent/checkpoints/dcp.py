"""A folder that `torch.distributed.checkpoint` wrote: `.metadata`, written last, and the shards it names.

Each tensor is a set of chunks; each chunk is a torch file at an offset of a `.distcp` file. Read off
`torch/distributed/checkpoint/{metadata,filesystem}.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradwatch.agent.checkpoints import torch_file
from gradwatch.agent.checkpoints.rebuild import dtype_name
from gradwatch.agent.checkpoints.sections import STEP_KEYS
from gradwatch.agent.checkpoints.unpickle import unpickle
from gradwatch.agent.checkpoints.values import FLOATING, Blobs, Extent, Stub, TornError, UnreadableError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Entries that are not tensors are read only if they tell a step.
_STEP_BYTES = 1 << 16
_SAFE_NAME_PARTS = frozenset({"", ".", ".."})


@dataclass(frozen=True)
class Place:
    """Where an entry lies.

    Attributes:
        file: the shard, relative to the folder.
        offset, length: in it.
    """

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Metadata:
    """What `.metadata` says.

    Attributes:
        tensors: dtype and size by key; None for what is not a tensor.
        paths: the keys of the nested dictionary that a key stands for.
        places: the places of each key's entries.
    """

    tensors: dict[str, tuple[str, tuple[int, ...]] | None]
    paths: dict[str, tuple[Any, ...]]
    places: dict[str, list[Place]]

    def shard_lengths(self) -> dict[str, int]:
        """How long each shard must be at least."""
        lengths: dict[str, int] = {}
        for places in self.places.values():
            for place in places:
                lengths[place.file] = max(lengths.get(place.file, 0), place.offset + place.length)
        return lengths


def read_metadata(data: bytes) -> Metadata:
    """Read a `.metadata` file.

    Raises:
        UnreadableError: it is damaged, or of a version that is not known.
    """
    attributes = _attributes(unpickle(data), "Metadata")
    try:
        tensors = {str(key): _tensor(entry) for key, entry in attributes["state_dict_metadata"].items()}
        planner = attributes.get("planner_data")
        planner = planner if isinstance(planner, dict) else {}
        paths = {str(key): path for key, path in planner.items() if isinstance(path, tuple)}
        places: dict[str, list[Place]] = {}
        for index, info in attributes["storage_data"].items():
            places.setdefault(str(_attributes(index, "MetadataIndex")["fqn"]), []).append(_place(info))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UnreadableError(f"its .metadata is not as torch writes it: {error!r:.200}") from error
    return Metadata(tensors, paths, places)


def tree(folder: Path, metadata: Metadata) -> dict[Any, Any]:
    """The nested dictionary that was saved, with `Blobs` in place of tensors.

    Other values are left out, numbers that may tell a step excepted.
    """
    root: dict[Any, Any] = {}
    for key, tensor in metadata.tensors.items():
        places = metadata.places.get(key, [])
        extents = tuple(Extent(folder / place.file, place.offset, place.length) for place in places)
        path = metadata.paths.get(key) or (key,)
        node = root
        for step in path[:-1]:
            inner = node.setdefault(step, {})
            if not isinstance(inner, dict):
                break
            node = inner
        node[path[-1]] = _number(extents, path) if tensor is None else Blobs(*tensor, extents)
    return root


def missing(metadata: Metadata) -> list[str]:
    """Tensors of a floating type of which no part was written."""
    return [
        key
        for key, tensor in metadata.tensors.items()
        if tensor is not None
        and tensor[0] in FLOATING
        and 0 not in tensor[1]
        and not metadata.places.get(key)
    ]


def parts(blobs: Blobs) -> Iterator[Any]:
    """What each chunk of a tensor holds, read one by one.

    Raises:
        UnreadableError: a chunk is no torch file.
        OSError: its file cannot be opened.
    """
    for extent in blobs.extents:
        yield torch_file.read(extent)


def _number(extents: tuple[Extent, ...], path: tuple[Any, ...]) -> int | None:
    if path[-1] not in STEP_KEYS or len(extents) != 1 or extents[0].nbytes > _STEP_BYTES:
        return None
    try:
        value = torch_file.read(extents[0])
    except (UnreadableError, OSError):
        return None
    return value if type(value) is int else None


def _tensor(entry: Any) -> tuple[str, tuple[int, ...]] | None:
    attributes = _attributes(entry, None)
    if "chunks" not in attributes:
        return None
    properties = attributes["properties"]
    # TensorProperties pickles itself as a tuple that begins with the dtype.
    state = properties.state
    dtype = state[0] if isinstance(state, tuple) else properties.attributes()["dtype"]
    return dtype_name(dtype), attributes["size"]


def _place(info: Any) -> Place:
    attributes = _attributes(info, "_StorageInfo")
    if attributes.get("transform_descriptors"):
        raise UnreadableError("its shards are compressed or encrypted")
    file, offset, length = (attributes[key] for key in ("relative_path", "offset", "length"))
    if not isinstance(file, str) or _SAFE_NAME_PARTS & set(file.split("/")) or "\0" in file:
        raise UnreadableError(f"its .metadata names a file outside of the folder: {file!r:.80}")
    if type(offset) is not int or type(length) is not int or offset < 0 or length < 0:
        raise TornError(f"its .metadata gives {file} an impossible range")
    return Place(file, offset, length)


def _attributes(value: Any, name: str | None) -> dict[Any, Any]:
    if not isinstance(value, Stub) or (name is not None and not value.name.endswith(f".{name}")):
        raise UnreadableError(f"its .metadata has something else where {name or 'an entry'} should be")
    return value.attributes()
