"""How much of a spool the collector has acknowledged, remembered across a SIGKILL.

A cursor that is behind costs a duplicate, which the collector drops; one that is ahead
would cost an event. So it is written after the acknowledgement, and never before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

FILENAME = "sidecar.cursors.json"


@dataclasses.dataclass(frozen=True)
class Cursor:
    """What of one journal the collector has.

    Attributes:
        segment: index of the segment that is read next.
        offset: the byte in it that is read next.
        malformed: lines skipped so far because they could not be read.
        unknown_enums: values taken out of records because this version does not know them.
        closed: the process is gone and the collector knows how far it came.
    """

    segment: int = 0
    offset: int = 0
    malformed: int = 0
    unknown_enums: int = 0
    closed: bool = False


def load(folder: Path) -> dict[str, Cursor]:
    """Read the cursors of a spool, by journal name.

    A missing or damaged file gives none: everything that is still there is sent again.
    """
    try:
        document = json.loads((folder / FILENAME).read_bytes())
        return {str(name): _cursor(value) for name, value in document["journals"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def save(folder: Path, cursors: Mapping[str, Cursor]) -> None:
    """Replace the cursors of a spool in one step.

    Raises:
        OSError: the file cannot be written; the previous one is untouched.
    """
    document = {"journals": {name: dataclasses.asdict(cursor) for name, cursor in cursors.items()}}
    replace_file(folder / FILENAME, json.dumps(document, separators=(",", ":")).encode())


def replace_file(path: Path, data: bytes) -> None:
    """Write `path` so that a reader sees the old content or the new, never a part.

    Raises:
        OSError: it cannot be written; the previous content is untouched.
    """
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        new.write_bytes(data)
        new.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            new.unlink()
        raise


def _cursor(value: dict[str, Any]) -> Cursor:
    counts = ("segment", "offset", "malformed", "unknown_enums")
    if not all(isinstance(value[count], int) and value[count] >= 0 for count in counts):
        raise ValueError(f"not a cursor: {value}")
    segment, offset, malformed, unknown_enums = (value[count] for count in counts)
    return Cursor(segment, offset, malformed, unknown_enums, value["closed"] is True)
