"""From protobuf to domain values."""

from __future__ import annotations

import math

import pytest

from gradwatch.collector.observations import DropReason, Phase, Value
from gradwatch.collector.wire import read_report
from gradwatch.protos.v1 import gradwatch_pb2 as pb
from tests.collector.client import batch, hello


def read_one(record: pb.Record, incarnation: str = "r0"):
    report = read_report(pb.Report(batches=[batch(incarnation, record)]))
    return report.batches[0].records[0]


def nonfinite(**fields: object) -> pb.Record:
    return pb.Record(seq=1, at=1.0, nonfinite=pb.NonFinite(**fields))


def test_an_absent_optional_is_none():
    body = read_one(nonfinite(gradients=[pb.BadGradient(parameter="p")])).body
    assert (body.microbatch, body.phase, body.batch) == (None, None, None)
    assert (body.gradients[0].value, body.gradients[0].count) == (None, None)
    assert body.gradients[0].backward_position is None


def test_a_zero_that_is_there_is_zero():
    body = read_one(nonfinite(microbatch=0, gradients=[pb.BadGradient(count=0, backward_position=0)])).body
    assert (body.microbatch, body.gradients[0].count, body.gradients[0].backward_position) == (0, 0, 0)


@pytest.mark.parametrize("number", [0, 99])
def test_an_enum_without_a_meaning_is_none_and_counted(number: int):
    record = read_one(nonfinite(phase=number, gradients=[pb.BadGradient(value=number)]))
    assert (record.body.phase, record.body.gradients[0].value) == (None, None)
    assert record.drops == (DropReason.UNKNOWN_ENUM, DropReason.UNKNOWN_ENUM)


def test_every_enum_of_the_schema_has_a_meaning():
    phases = [number for number in pb.Phase.values() if number]
    values = [number for number in pb.Value.values() if number]
    assert {read_one(nonfinite(phase=number)).body.phase for number in phases} == {*Phase}
    bodies = [read_one(nonfinite(gradients=[pb.BadGradient(value=number)])).body for number in values]
    assert {body.gradients[0].value for body in bodies} == {*Value}


def test_every_kind_of_record_can_be_read():
    bodies = {
        field.name: field.message_type._concrete_class
        for field in pb.Record.DESCRIPTOR.oneofs_by_name["body"].fields
    }
    needed = {
        "job": "j",
        "launch": "l",
        "world_size": 1,
        "incarnation": "r0",
        "path": "/c/1",
        "kind": 1,
        "replay": 1,
    }
    needed_by = {"checkpoint_root": {"root": "/c"}}
    for name, message in bodies.items():
        fields = {field.name for field in message.DESCRIPTOR.fields}
        values = {key: value for key, value in needed.items() if key in fields}
        body = message(**values, **needed_by.get(name, {}))
        record = read_one(pb.Record(seq=0, **{name: body}))
        assert record.body is not None, name
        assert record.drops == (), name


MALFORMED = [
    # A hello of another journal.
    hello("other", 0),
    # No world can have that size.
    hello("r0", 0, 0),
    # No rank is negative.
    hello("r0", -1),
    # A job without a name.
    hello("r0", 0, job=""),
    nonfinite(round=-1),
    pb.Record(seq=0, launch_started=pb.LaunchStarted(job="j")),
]


@pytest.mark.parametrize("record", MALFORMED)
def test_a_record_that_makes_no_sense_is_counted(record: pb.Record):
    read = read_one(record)
    assert read.body is None
    assert read.drops == (DropReason.MALFORMED_RECORD,)


def test_a_kind_of_record_that_is_not_known_is_counted():
    assert read_one(pb.Record(seq=0)).drops == (DropReason.UNKNOWN_RECORD,)


def test_numbers_that_are_not_finite_do_not_get_in():
    message = pb.Progress(incarnation="r", probe_seconds=math.nan, train_seconds=math.inf, dropped={"a": -1})
    progress = read_report(pb.Report(progress=[message])).progress[0]
    assert (progress.probe_seconds, progress.train_seconds, progress.dropped) == (0.0, 0.0, {})
    assert read_one(pb.Record(seq=0, at=math.inf, hello=hello("r0", 0).hello)).at is None
