"""From protobuf to domain values."""

from __future__ import annotations

import math

import pytest

from gradwatch.collector import observations as obs
from gradwatch.collector.observations import DropReason, Value
from gradwatch.collector.wire import read_report
from gradwatch.protos.v1 import gradwatch_pb2 as pb
from tests.collector.client import batch, hello
from tests.collector.history import GRADIENT_PHASES


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


@pytest.mark.parametrize("number", [0, 6, 99])
def test_an_enum_without_a_meaning_is_none_and_counted(number: int):
    record = read_one(nonfinite(phase=number, gradients=[pb.BadGradient(value=number)]))
    assert (record.body.phase, record.body.gradients[0].value) == (None, None)
    assert record.drops == (DropReason.UNKNOWN_ENUM, DropReason.UNKNOWN_ENUM)


def test_every_enum_of_the_schema_has_a_meaning():
    phases = [number for number in pb.Phase.values() if number]
    values = [number for number in pb.Value.values() if number]
    assert {read_one(nonfinite(phase=number)).body.phase for number in phases} == {*GRADIENT_PHASES}
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
    # Nor is a model's ordinal.
    nonfinite(root=-1),
    pb.Record(seq=0, model=pb.Model(root=-1)),
    pb.Record(seq=0, weights=pb.BadWeights(root=-1)),
    pb.Record(seq=0, loss=pb.BadLoss(root=-1)),
    pb.Record(seq=0, rehearsal=pb.Rehearsal(root=-1)),
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


# ---------------------------------------------------------------- weights, losses, replays of clean passes


def test_what_is_known_of_a_bad_round_beside_its_gradients():
    body = read_one(
        pb.Record(
            seq=0,
            nonfinite=pb.NonFinite(
                round=3,
                step=3,
                model_step=2,
                weights_finite=False,
                bad_weights=[pb.BadWeight(parameter="a", value=pb.VALUE_NAN, count=1, numel=4)],
                bad_weights_total=9,
                weights_finite_step=1,
                loss=float("inf"),
                exchanged=True,
                batch_hash="ab",
                batch_value=pb.VALUE_POSITIVE_INFINITY,
                loss_note="n",
            ),
        )
    ).body
    assert (body.model_step, body.weights_finite, body.weights_finite_step) == (2, False, 1)
    assert body.bad_weights == (obs.BadWeight("a", obs.Value.NAN, 1, 4),)
    assert (body.bad_weights_total, body.loss, body.exchanged) == (9, float("inf"), True)
    assert (body.batch_hash, body.loss_note) == ("ab", "n")
    assert body.batch_value is obs.Value.POSITIVE_INFINITY


def test_what_is_not_told_is_not_known():
    body = read_one(pb.Record(seq=0, nonfinite=pb.NonFinite(round=3, step=3))).body
    assert (body.model_step, body.weights_finite, body.loss, body.batch_hash) == (None, None, None, "")
    assert body.batch_value is None
    body = read_one(pb.Record(seq=0, autopsy=pb.Autopsy(replay=pb.REPLAY_FINITE))).body
    assert (body.faithful, body.doubts) == (None, ())


def test_a_probe_gone_wild_does_not_fill_the_store():
    long = "x" * 100_000
    weights = [pb.BadWeight(parameter=long)] * 1000
    record = read_one(pb.Record(seq=0, weights=pb.BadWeights(step=3, weights=weights, optimizer=long)))
    assert len(record.body.weights) == 16
    assert {len(one.parameter) for one in record.body.weights} == {512}
    assert len(record.body.optimizer) == 512
    body = read_one(pb.Record(seq=0, nonfinite=pb.NonFinite(loss_note=long, bad_weights=weights))).body
    assert (len(body.loss_note), len(body.bad_weights)) == (500, 16)
    body = read_one(pb.Record(seq=0, model=pb.Model(group=range(100_000)))).body
    assert len(body.group) == 65_536
    body = read_one(pb.Record(seq=0, rehearsal=pb.Rehearsal(doubts=[long] * 100))).body
    assert [len(doubt) for doubt in body.doubts] == [500] * 16


LONG = "x" * 100_000
BAD = pb.BadGradient(parameter=LONG, module=LONG, module_class=LONG, dtype=LONG, numel=-1, count=-1)
INPUT = pb.OperatorInput(dtype=LONG, shape=range(1000), nonfinite=-1, empty_rows=-1)
STEP = pb.FlightStep(magnitudes=[1.0] * 1000)
# A record of a probe gone wild, by kind.
WILD = {
    "model": pb.Model(module_class=LONG, wrapper=LONG, group_size=-1, parameters=[pb.Parameter(name=LONG)]),
    "nonfinite": pb.NonFinite(gradients=[BAD] * 1000, gradients_total=-1, batch=LONG, source=LONG),
    "reduced": pb.Reduced(gradients=[BAD] * 1000, gradients_total=-1),
    "weights": pb.BadWeights(gradients=[BAD] * 1000, batch=LONG),
    "loss": pb.BadLoss(batch=LONG),
    "optimizer_state": pb.OptimizerState(parameter=LONG, module=LONG, batch=LONG, numel=-1, optimizer=LONG),
    "exploding": pb.Exploding(parameter=LONG, module=LONG, parameters_total=-1),
    "autopsy": pb.Autopsy(
        replay=pb.REPLAY_FINITE,
        reason=LONG,
        operator=LONG,
        source=LONG,
        code=LONG,
        inputs=[INPUT] * 1000,
        missing=[LONG] * 1000,
        nbytes=-1,
    ),
    "flight": pb.Flight(parameters=[LONG] * 1000, steps=[STEP] * 1000, dtype=LONG),
    "checksum": pb.Checksum(sums=[7] * 100_000),
}


@pytest.mark.parametrize("kind", WILD)
def test_what_a_record_may_bring_is_bounded(kind: str):
    record = read_one(pb.Record(seq=0, **{kind: WILD[kind]}))
    assert record.body is not None
    assert len(repr(record.body)) < 70_000
    assert "=-" not in repr(record.body)


def test_weights_before_the_first_reduction_and_an_update_of_a_later_version():
    body = read_one(pb.Record(seq=0, weights=pb.BadWeights(round=-1, initial=True))).body
    assert (body.round, body.initial, body.evidence) == (0, True, None)
    record = read_one(pb.Record(seq=0, weights=pb.BadWeights(evidence=99)))
    assert (record.body.evidence, record.drops) == (None, (DropReason.UNKNOWN_ENUM,))
    record = read_one(pb.Record(seq=0, weights=pb.BadWeights(round=-5)))
    assert record.drops == (DropReason.MALFORMED_RECORD,)
