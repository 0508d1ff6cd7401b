"""From journal lines to messages."""

from __future__ import annotations

import json

import pytest

from gradwatch.agent.sidecar import wire
from gradwatch.protos.v1 import gradwatch_pb2 as pb


def nonfinite(**gradient) -> bytes:
    body = {"round": 2, "step": 2, "gradients": [{"parameter": "w", **gradient}]}
    return json.dumps({"seq": 5, "at": 1.5, "nonfinite": body}).encode()


def test_a_record_is_read_whole():
    read = wire.read_record(nonfinite(value="VALUE_NAN", count=3))
    assert read is not None
    gradient = read.record.nonfinite.gradients[0]
    assert (read.record.seq, gradient.value, gradient.count) == (5, pb.VALUE_NAN, 3)
    assert read.unknown_enums == 0


@pytest.mark.parametrize("value", ["VALUE_FROM_THE_FUTURE", 99, {"no": "enum"}, ["VALUE_NAN", "VALUE_X"]])
def test_an_unknown_enum_is_counted_and_unknown_never_zero(value):
    read = wire.read_record(nonfinite(value=value))
    if isinstance(value, list):  # a list where one value belongs is malformed altogether
        assert read is None
        return
    assert read is not None
    assert read.unknown_enums == 1
    assert not read.record.nonfinite.gradients[0].HasField("value")


def test_fields_of_a_newer_version_are_ignored():
    line = json.dumps({"seq": 1, "novelty": {"a": 1}, "fault": {"part": "x", "depth": 2}}).encode()
    read = wire.read_record(line)
    assert read is not None
    assert read.record.fault.part == "x"


def test_a_record_of_a_kind_unknown_here_still_carries_its_number():
    read = wire.read_record(b'{"seq": 9, "from_the_future": {}}')
    assert read is not None
    assert read.record.seq == 9


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"no json",
        b'{"seq": 1, "fault": {"part":',  # cut off
        b"[1, 2]",
        b"\xff\xfe",
        b'{"fault": {"part": "x"}}',  # without a number it could not be told from others
        b'{"seq": "many"}',
        b'{"seq": 1.5}',
        b'{"seq": 99999999999999999999999}',
        b'{"seq": 1, "fault": 7}',
        b'{"seq": 1, "fault": {"part": 7}}',
        b'{"seq": 1, "fault": {"part": "\\ud800"}}',
        b'{"seq": 1, "hello": {"rank": 4294967296}}',
        b'{"seq": 1, "fault": {"part": "a"}, "hello": {}}',  # two bodies
        b'{"a":' * 2000,
    ],
)
def test_a_line_that_cannot_be_read_is_none_and_raises_nothing(line):
    assert wire.read_record(line) is None


def test_a_record_too_large_for_a_message_is_malformed():
    line = json.dumps({"seq": 1, "fault": {"part": "x" * (wire.MAX_RECORD_BYTES + 1)}}).encode()
    assert wire.read_record(line) is None


def test_progress_keeps_absent_and_zero_apart():
    progress = wire.read_progress(b'{"round": 4, "dropped": {"disk_full": "2"}}   \n')
    assert progress is not None
    assert (progress.round, progress.dropped["disk_full"]) == (4, 2)
    assert not progress.HasField("last_bad_round")


def test_a_number_beyond_fp32_is_no_reason_to_lose_a_record():
    read = wire.read_record(b'{"seq": 1, "at": 1e300, "fault": {"part": "x"}}')
    assert read is not None
    assert read.record.at == 1e300
