"""An incident in one line."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from gradwatch.collector import document
from gradwatch.collector import observations as obs
from gradwatch.collector.notify import message
from gradwatch.collector.observations import Phase, UpdateEvidence, Value
from tests.collector.bodies import autopsy, bad_weights, checksum, overflow, reduced, told_of
from tests.collector.history import Told, batch, gradient, hello, nonfinite, progress
from tests.collector.test_weights import after

OF_LOG = autopsy(1, 5, obs.Replay.REPRODUCED, source="/srv/job/model.py:33")
POSITIVE = obs.OperatorInput("float32", (4,), 0.5, 3e5, 0)
ZERO = obs.OperatorInput("float32", (4,), 0.0, 0.0, 0)


def operator(name: str, *inputs: obs.OperatorInput, **changes: object) -> obs.Autopsy:
    return replace(OF_LOG, operator=name, inputs=inputs, **changes)


def on_one(*bodies: obs.Body) -> Told:
    """Rank 1 of two says so, and rank 0 was clean."""
    return Told().hellos(2).tell(*told_of(1, 5, *bodies), *told_of(0, 5))


def on_both(*bodies: obs.Body) -> Told:
    return Told().hellos(2).tell(*told_of(0, 5, *bodies), *told_of(1, 5, *bodies))


FORWARD = nonfinite(5, phase=Phase.FORWARD)
INFINITE = nonfinite(5, phase=Phase.INPUT, batch_value=obs.Value.POSITIVE_INFINITY)
TITLES = [
    (on_one(FORWARD, OF_LOG), "log of 0 at model.py:33, rank 1 on n1, step 5"),
    (
        on_one(FORWARD, operator("aten.div.Tensor", POSITIVE, ZERO)),
        "div by 0 at model.py:33, rank 1 on n1, step 5",
    ),
    (
        on_one(FORWARD, operator("aten.exp.default", POSITIVE)),
        "exp of 3e+05 at model.py:33, rank 1 on n1, step 5",
    ),
    # No number tells what is wrong with what it was given.
    (on_one(FORWARD, operator("aten.log.default", POSITIVE)), "log at model.py:33, rank 1 on n1, step 5"),
    (
        on_one(FORWARD, operator("aten.mul_.Tensor", POSITIVE, source=None)),
        "mul in head, rank 1 on n1, step 5",
    ),
    # Its gradient is NaN, and the batch held infinities only.
    (on_one(INFINITE), "+Inf in the batch of rank 1 on n1, step 5"),
    # An operator that only spread it.
    (on_one(INFINITE, OF_LOG), "+Inf in the batch of rank 1 on n1, step 5"),
    (
        on_one(replace(INFINITE, exchanged=True)),
        "+Inf in what entered the model, rank 1 on n1, step 5",
    ),
    # On a device nobody has looked.
    (on_one(nonfinite(5, phase=Phase.INPUT)), "non-finite numbers in the batch of rank 1 on n1, step 5"),
    (on_one(after(5, "blocks.1.up.weight")), "weight blocks.1.up.weight is NaN, rank 1, step 5"),
    (on_both(after(5, "bg")), "weight bg is NaN, all ranks, step 5"),
    (on_both(reduced(5)), "the sum is not finite, every rank was, step 5"),
    (
        on_one(
            nonfinite(5, phase=Phase.LOSS, loss=math.inf),
            operator("aten.log", ZERO, source=None, module=None, replay=obs.Replay.NOT_DONE),
        ),
        "loss is inf: log of 0, rank 1 on n1, step 5",
    ),
    (
        on_one(
            nonfinite(5, phase=Phase.LOSS, loss=0.5),
            operator("aten.sqrt", source="loss.py:9", module=None, replay=obs.Replay.NOT_DONE),
        ),
        "gradient of sqrt in the loss is NaN at loss.py:9, rank 1 on n1, step 5",
    ),
    (on_one(nonfinite(5, phase=Phase.LOSS, loss=math.inf)), "loss is inf on rank 1 on n1, step 5"),
    (on_one(nonfinite(5, phase=Phase.LOSS, loss=math.nan)), "loss is NaN on rank 1 on n1, step 5"),
    (
        on_one(nonfinite(5, gradient("head.weight"), phase=Phase.LOSS, loss=0.5)),
        "gradient of head.weight is NaN, rank 1 on n1, step 5",
    ),
    (
        on_both(bad_weights(5, UpdateEvidence.EPSILON, "0.weight")),
        "update by Adam made 0.weight NaN, all ranks, step 5",
    ),
    (
        on_both(
            bad_weights(
                5, UpdateEvidence.GRADIENTS, weights=(), weights_total=0, gradients=(gradient("c.bias"),)
            )
        ),
        "update by Adam was given a gradient of c.bias that is NaN, all ranks, step 5",
    ),
    (on_one(overflow(5, 3e30)), "gradient of a.weight overflows the optimizer's state, rank 1 on n1, step 5"),
    (
        on_one(nonfinite(5, gradient("h.bias", value=Value.NEGATIVE_INFINITY))),
        "gradient of h.bias is -Inf, rank 1 on n1, step 5",
    ),
]


@pytest.mark.parametrize(("told", "title"), TITLES)
def test_what_happened_comes_first(told: Told, title: str):
    assert document.incident(told.incident).title == title


def test_a_replica_that_differs():
    told = Told()
    for rank in range(3):
        told.tell(batch(f"r{rank}", 0, hello(rank, 3), checksum(9, 7 + rank // 2)))
    assert document.incident(told.incident).title == "weights differ between ranks, rank 2 on n2, step 9"


def test_who_made_a_bad_sum_may_not_be_known():
    told = Told().hellos(2)
    told.tell(*told_of(0, 7, reduced(7)), progress("r1", 5, 1, ended=True))
    title = document.incident(told.incident).title
    assert title == "the reduced gradient of a.weight is not finite, whose it was is not known, step 7"


def test_a_title_becomes_more_exact_and_the_id_stays():
    told = on_one(FORWARD)
    before = document.incident(told.incident)
    told.tell(batch("r1", 2, OF_LOG))
    after_it = document.incident(told.incident)
    assert before.id == after_it.id
    assert before.title == "gradient of a.weight is NaN, rank 1 on n1, step 5"
    assert after_it.title == "log of 0 at model.py:33, rank 1 on n1, step 5"


@pytest.mark.parametrize("name", ["x" * 5000, "\x1b[31mred\n\u202e", "a.\x00weight"])
def test_a_title_is_one_line_whatever_the_names_are(name: str):
    told = Told().tell(batch("r0", 0, hello(0, 1, node=name), nonfinite(5, gradient(name))))
    title = document.incident(told.incident).title
    assert len(title) <= 200
    assert title.isprintable()
    assert title.endswith(", step 5")


def test_a_webhook_is_told_the_title():
    told = on_both(reduced(5))
    body = json.loads(message.body(document.incident(told.incident)))
    assert body["data"]["title"] == "the sum is not finite, every rank was, step 5"
