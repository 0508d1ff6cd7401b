"""When progress is sent."""

from __future__ import annotations

import pytest

from gradwatch.agent.sidecar import coalesce
from gradwatch.agent.sidecar.coalesce import Due
from gradwatch.protos.v1 import gradwatch_pb2 as pb

SENT = pb.Progress(round=10, step=10, bad_rounds=1, last_bad_round=4)


@pytest.mark.parametrize(
    ("now", "records", "change", "expected"),
    [
        # a watermark alone waits for the interval
        (0.5, False, {"round": 11}, Due.TOO_SOON),
        (1.0, False, {"round": 11}, Due.INTERVAL),
        # nothing new is not sent at all
        (60.0, False, {}, Due.UNCHANGED),
        # what a verdict waits for goes at once
        (0.0, False, {"last_bad_round": 11}, Due.HAPPENED),
        (0.0, False, {"bad_rounds": 2}, Due.HAPPENED),
        (0.0, False, {"ended": True}, Due.HAPPENED),
        (0.0, False, {"malformed_lines": 1}, Due.HAPPENED),
        (0.0, False, {"dropped": {"disk_full": 1}}, Due.HAPPENED),
        (0.0, False, {"faults": {"scan": 1}}, Due.HAPPENED),
        # and with records of the same rank
        (0.0, True, {"round": 11}, Due.HAPPENED),
    ],
)
def test_due(now, records, change, expected):
    progress = pb.Progress()
    progress.CopyFrom(SENT)
    progress.MergeFrom(pb.Progress(**change))
    assert coalesce.due(coalesce.Sent(SENT, 0.0), progress, now, records=records) is expected


def test_the_first_is_sent():
    assert coalesce.due(None, SENT, 0.0, records=False).now


def test_a_bad_round_zero_is_not_the_absence_of_one():
    sent = coalesce.Sent(pb.Progress(round=1), 0.0)
    assert coalesce.due(sent, pb.Progress(round=1, last_bad_round=0), 0.0, records=False) is Due.HAPPENED
