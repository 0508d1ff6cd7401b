"""What shows that a replay has repeated a pass: outputs, the graph, gradients, and no way around."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from gradwatch.agent.probe.autopsy.evidence import (
    Evidence,
    Verdict,
    compare_gradients,
    compare_graphs,
    compare_outputs,
    gradient_checksum,
    record_of,
)
from gradwatch.agent.probe.autopsy.graph import digest_of, inner, last_entrances, parameters_outside
from gradwatch.agent.probe.passes import Entrance

NAN = float("nan")
FINITE = torch.tensor([1.0, 2.0, 3.0])


def nudged(tensor: torch.Tensor) -> torch.Tensor:
    return torch.nextafter(tensor, torch.full_like(tensor, math.inf))


@pytest.mark.parametrize(
    ("then", "now", "fields"),
    [
        (FINITE, FINITE, {"faithful": True}),
        (FINITE, nudged(FINITE), {"faithful": False}),
        # What was not finite says nothing.
        (torch.tensor([1.0, NAN]), torch.tensor([1.0, 5.0]), {"faithful": True}),
        (torch.tensor([1.0, NAN]), torch.tensor([1.5, 5.0]), {"faithful": False}),
        (torch.tensor([NAN, math.inf]), torch.tensor([1.0, 5.0]), {}),
        (FINITE, FINITE.double(), {"faithful": False}),
        (FINITE, FINITE[:2], {"faithful": False}),
        (torch.tensor([0.0]), torch.tensor([-0.0]), {"faithful": False}),
        (
            torch.ones(3, 2, dtype=torch.bfloat16).T,
            torch.ones(2, 3, dtype=torch.bfloat16),
            {"faithful": True},
        ),
        (torch.ones(3, dtype=torch.int64), torch.ones(3, dtype=torch.int64), {"faithful": True}),
        (torch.tensor(2.5), torch.tensor(2.5), {"faithful": True}),
        (torch.tensor(2.5), torch.tensor(2.5000002), {"faithful": False}),
        (torch.arange(1000.0), torch.arange(1000.0), {"faithful": True}),
        (torch.arange(1000.0), nudged(torch.arange(1000.0)), {"faithful": False}),
    ],
)
def test_outputs(then, now, fields):
    verdict = Verdict()
    records = record_of([then], finite=bool(torch.isfinite(then).all()))
    for evidence in (Evidence(records), Evidence.of(Evidence(records).plain())):
        verdict = Verdict()
        compare_outputs(evidence, [now], verdict)
        assert verdict.as_fields().get("faithful") == fields.get("faithful")


def test_no_reference_is_kept_to_a_finite_output():
    for output in (FINITE.clone(), torch.arange(1000.0)):
        (record,) = record_of([output], finite=True)
        assert record.values is None
        then = output.clone()
        output.add_(1)
        assert record.equals(then)
        assert not record.equals(output)
        assert Evidence.of(Evidence([record]).plain()).outputs[0].equals(then)


@pytest.mark.parametrize(
    ("checksums", "magnitudes", "gradients", "faithful"),
    [
        ({0: FINITE}, {}, {0: FINITE}, True),
        ({0: FINITE}, {}, {0: nudged(FINITE)}, False),
        ({0: FINITE}, {}, {0: None}, False),
        ({0: torch.tensor([0.0])}, {}, {0: torch.tensor([-0.0])}, True),
        ({}, {0: 3.0}, {0: FINITE}, True),
        ({}, {0: 3.5}, {0: FINITE}, False),
        # Two that were looked at together: the largest of both.
        ({}, {0: 3.0, 1: 3.0}, {0: FINITE, 1: FINITE / 4}, True),
        ({}, {0: 3.0, 1: 3.0}, {0: FINITE / 2, 1: FINITE / 4}, False),
        # A parameter that was not used has a gradient of 0, or none.
        ({}, {0: 0.0}, {0: None}, True),
        ({}, {}, {0: FINITE}, None),
    ],
)
def test_gradients(checksums, magnitudes, gradients, faithful):
    taken = {place: gradient_checksum(gradient) for place, gradient in checksums.items()}
    verdict = Verdict()
    compare_gradients(Evidence(checksums=taken, magnitudes=magnitudes), gradients, verdict)
    assert verdict.as_fields().get("faithful") == faithful


def graph_of(function, values):
    result = function(values)
    return digest_of([(result.grad_fn, result.output_nr)], [values])


def test_graphs():
    layer = nn.Linear(3, 3)
    leaf = torch.ones(2, 3, requires_grad=True)
    computed = leaf * 2

    def plain(values):
        return layer(values).relu()

    known = graph_of(plain, leaf)
    assert known
    assert graph_of(plain, torch.zeros(2, 3, requires_grad=True)) == known
    assert graph_of(plain, computed) == known, "what lies before the input is no part of it"
    assert graph_of(lambda values: layer(values).sigmoid(), leaf) != known
    assert graph_of(lambda values: layer(values).relu() * 1, leaf) != known
    assert graph_of(plain, torch.ones(2, 3)) != known
    for evidence, graph, faithful in ((known, known, True), (known, "other", False), ("", "", False)):
        verdict = Verdict()
        compare_graphs(Evidence(graph=evidence), graph, verdict)
        assert verdict.as_fields()["faithful"] is faithful


class Watching(TorchDispatchMode):
    """Watches as a replay does, and changes nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        del types
        return func(*args, **(kwargs or {}))


def ctc(values):
    lengths = torch.full((2,), 6), torch.full((2,), 1)
    return functional.ctc_loss(values.log_softmax(-1), torch.ones(2, 1, dtype=torch.long), *lengths)


@pytest.mark.parametrize(
    "function",
    [
        lambda values: values.transpose(0, 1).reshape(-1, 4) * 2,
        lambda values: values @ values.transpose(1, 2),
        lambda values: values[:, None] @ torch.ones(4, 4),
        nn.TransformerEncoderLayer(4, 2, 8),
        nn.LSTM(4, 3),
        ctc,
    ],
    ids=["reshape", "product", "product with more dimensions", "transformer", "LSTM", "CTC"],
)
def test_a_graph_is_the_same_while_it_is_watched(function):
    def first(values):
        result = function(values)
        return result[0] if isinstance(result, tuple) else result

    values = torch.ones(6, 2, 4, requires_grad=True)
    plain = graph_of(first, values)
    with Watching():
        assert graph_of(first, values) == plain


def test_an_output_of_which_another_one_was_made_is_no_entrance():
    values = torch.ones(3, requires_grad=True)
    logits = values * 2
    loss, aside = logits.square().mean(), values + 1
    entrances = [
        Entrance(one.grad_fn, (place,), place != 0) for place, one in enumerate((logits, loss, aside))
    ]
    assert inner([one.node for one in entrances]) == {id(logits.grad_fn)}
    assert [one.ordinals for one in last_entrances(entrances)] == [(1,), (2,)]


def ways(case):
    weight, bias = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    values = torch.ones(3, requires_grad=True)
    hidden = values * weight
    output = hidden + bias
    if case == "none":
        loss = output.sum()
    elif case == "penalty":
        loss = output.sum() + weight.square().sum()
    elif case == "from inside":
        loss = output.sum() + hidden.sum()
    else:
        (slope,) = torch.autograd.grad(output.square().sum(), values, create_graph=True)
        loss = slope.square().sum()
    outside = parameters_outside([loss.grad_fn], [output.grad_fn])
    return {name for name, one in (("weight", weight), ("bias", bias)) if id(one) in outside}


@pytest.mark.parametrize(
    ("case", "reached"),
    [("none", set()), ("penalty", {"weight"}), ("from inside", {"weight"}), ("twice", {"weight"})],
)
def test_ways_around_the_output(case, reached):
    assert ways(case) == reached
