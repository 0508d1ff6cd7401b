"""From journal lines to messages: the sidecar's one place that knows the JSON mapping."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any, TypeVar

from google.protobuf import json_format

from gradwatch.protos.v1 import gradwatch_pb2 as pb

if TYPE_CHECKING:
    from google.protobuf.descriptor import Descriptor, FieldDescriptor

# The gRPC default limit is 4 MiB for a whole report.
MAX_RECORD_BYTES = 3 << 20

_M = TypeVar("_M", pb.Record, pb.Progress)


@dataclasses.dataclass(frozen=True)
class Read:
    """A journal line that could be read.

    Attributes:
        record: the message.
        unknown_enums: values of enums that this version does not know. They are taken
            out, hence unknown: the JSON mapping would have read each as the enum's zero.
    """

    record: pb.Record
    unknown_enums: int


def read_record(line: bytes) -> Read | None:
    """Read one line of a journal; None when it is malformed."""
    document = _load_object(line)
    if document is None or "seq" not in document:
        return None
    unknown = _take_out_unknown_enums(pb.Record.DESCRIPTOR, document)
    record = _parse(document, pb.Record())
    if record is None or record.ByteSize() > MAX_RECORD_BYTES:
        return None
    return Read(record, unknown)


def read_progress(data: bytes) -> pb.Progress | None:
    """Read the content of a progress file; None when it is malformed."""
    document = _load_object(data)
    return None if document is None else _parse(document, pb.Progress())


def order_document(order: pb.Order) -> bytes:
    """An order as the launcher reads it in the spool."""
    return json_format.MessageToJson(order, preserving_proto_field_name=True, indent=None).encode()


def _load_object(line: bytes) -> dict[str, Any] | None:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def _parse(document: dict[str, Any], message: _M) -> _M | None:
    # Whatever is in the line, it must not stop the lines after it: json_format lets
    # errors of several kinds through (a lone surrogate is an encoding error).
    try:
        json_format.ParseDict(document, message, ignore_unknown_fields=True)
    except (json_format.Error, ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    return message


def _take_out_unknown_enums(descriptor: Descriptor, document: dict[str, Any]) -> int:
    fields: dict[str, FieldDescriptor] = {}
    for field in descriptor.fields:
        fields[field.name] = fields[field.json_name] = field
    unknown = 0
    for key in list(document):
        known = fields.get(key)
        if known is None:
            continue
        value = document[key]
        if known.enum_type is not None:
            kept = [item for item in _listed(value) if _is_known(known, item)]
            if len(kept) == len(_listed(value)):
                continue
            unknown += len(_listed(value)) - len(kept)
            if isinstance(value, list):
                document[key] = kept
            else:
                del document[key]
        elif known.message_type is not None and not _is_map(known.message_type):
            for item in _listed(value):
                if isinstance(item, dict):
                    unknown += _take_out_unknown_enums(known.message_type, item)
    return unknown


def _is_known(field: FieldDescriptor, value: object) -> bool:
    enum = field.enum_type
    if enum is None or value is None:
        return True
    if isinstance(value, int):
        return value in enum.values_by_number
    return isinstance(value, str) and value in enum.values_by_name


def _is_map(descriptor: Descriptor) -> bool:
    return bool(descriptor.GetOptions().map_entry)


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else [value]
