"""A safetensors file: eight bytes of length, a JSON header with each tensor's place, the values.

The format: https://huggingface.co/docs/safetensors (read without the library, which maps whole files).
"""

from __future__ import annotations

import json
import math
from typing import Any

from gradwatch.agent.checkpoints.values import (
    ITEM_BYTES,
    Extent,
    Storage,
    Tensor,
    TornError,
    UnreadableError,
)

# The library's own limit.
_MAX_HEADER = 100_000_000
_LENGTH_BYTES = 8
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


def read(extent: Extent) -> dict[str, Tensor]:
    """The tensors of a file by name; those of types that are always finite and unknown here are left out.

    Raises:
        TornError: it is not whole.
        UnreadableError: it is not a safetensors file.
        OSError: it cannot be opened.
    """
    with extent.file.open("rb") as file:
        file.seek(extent.offset)
        announced = file.read(_LENGTH_BYTES)
        if len(announced) < _LENGTH_BYTES or extent.nbytes < _LENGTH_BYTES:
            raise TornError(f"it has {extent.nbytes} bytes")
        length = int.from_bytes(announced, "little")
        if length > _MAX_HEADER:
            raise UnreadableError(f"a header of {length} bytes; {_MAX_HEADER} are allowed")
        values = _LENGTH_BYTES + length
        if values > extent.nbytes:
            raise TornError(f"its header ends at byte {values} and the file at {extent.nbytes}")
        header = _parse(file.read(length))
    tensors = {}
    end = 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            begin, stop = entry["data_offsets"]
            shape = tuple(entry["shape"])
            dtype = _DTYPES.get(entry["dtype"])
            item = ITEM_BYTES.get(dtype or "", 0)
            whole = 0 <= begin <= stop and (dtype is None or math.prod(shape) * item == stop - begin)
        except (KeyError, TypeError, ValueError) as error:
            raise UnreadableError(f"its header does not describe {name!s:.80}") from error
        if not whole:
            raise UnreadableError(
                f"its header gives {name!s:.80} {stop - begin} bytes, which do not fit its shape"
            )
        end = max(end, stop)
        if dtype is not None:
            place = Extent(extent.file, extent.offset + values + begin, stop - begin)
            storage = Storage(name, dtype, stop - begin, place)
            tensors[name] = Tensor(dtype, storage, 0, (math.prod(shape),), (1,))
    if values + end != extent.nbytes:
        raise TornError(f"its header says {values + end} bytes and it has {extent.nbytes}")
    return tensors


def _parse(data: bytes) -> dict[str, Any]:
    try:
        header = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise TornError(f"its header is not JSON: {error!s:.100}") from error
    if not isinstance(header, dict):
        raise UnreadableError("its header is not an object")
    return header
