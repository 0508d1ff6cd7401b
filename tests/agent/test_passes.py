"""In which phase a gradient went bad: by what entered the model, what left it, and what came back."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import weakref
from collections import OrderedDict

import pytest
import torch

from gradwatch.agent.probe.fuses import Fuses
from gradwatch.agent.probe.look import HostLook
from gradwatch.agent.probe.passes import Leaves, Origin, Pass, Passes, both, origin_of
from gradwatch.agent.probe.phases.loss_pass import LossPass
from gradwatch.agent.probe.tally import OVERFLOWS_IN_A_ROW
from tests.ranks import run_ranks
from tests.training.phases import BAD_STEP, CASES, COLLAPSE, STEPS

NAN = math.nan
T, F, U = True, False, None


# ---------------------------------------------------------------- real ranks


@pytest.fixture(scope="module", params=["host", "device"])
def told(request, tmp_path_factory):
    """What rank 1 journalled, by case; and that rank 0 journalled nothing bad."""
    folder = tmp_path_factory.mktemp("phases")
    spool = folder / "spool"
    spool.mkdir()
    results = run_ranks("tests.training.phases", 2, [str(folder / "told"), request.param], spool=spool)
    assert not any("gradwatch:" in result.output for result in results), results[0].output
    bad = []
    for journal in sorted(spool.glob("rank*.jsonl")):
        records = [json.loads(line) for line in journal.read_text().splitlines()]
        bad.append([record["nonfinite"] for record in records if "nonfinite" in record])
    assert bad[0] == []
    return [[record for record in bad[1] if record["root"] == root] for root in range(len(CASES) + 2)]


@pytest.mark.parametrize("name", CASES)
def test_the_phase_is_told(told, name):
    _, said = CASES[name]
    place = [*CASES].index(name)
    (record,) = told[place]
    # The update of the bad step is left out, or is an attempt that the scaler skips.
    attempts = [STEPS if "scaler" in options else BAD_STEP for options, _ in [*CASES.values()][:place]]
    assert record["step"] == sum(attempts) + BAD_STEP
    assert record.get("phase") == said["phase"]
    assert record["microbatch"] == said.get("microbatch", 0)
    assert record["batch"] == json.dumps(said.get("batch", 0))
    assert record.get("loss_scale_overflow", False) == said.get("overflow", False)


def test_a_loss_scale_that_collapses_is_not_excused_for_ever(told):
    excused = [record.get("loss_scale_overflow", False) for record in told[-1]]
    assert excused == [True] * OVERFLOWS_IN_A_ROW + [False] * (COLLAPSE - OVERFLOWS_IN_A_ROW)


def test_a_loss_scale_that_has_sunk_to_nothing_is_no_excuse(told):
    excused = [record.get("loss_scale_overflow", False) for record in told[-2]]
    # Every other step overflows, at scales of 4, 2, 1 and less.
    assert excused == [True] * 3 + [False] * (len(excused) - 3)
    assert len(excused) > 3


# ---------------------------------------------------------------- deciding


@pytest.mark.parametrize(
    ("passes", "parameters", "phase", "microbatch"),
    [
        # facts: inputs, output, entering
        ([(F, F, F)], T, "PHASE_INPUT", 0),
        ([(F, F, F)], F, "PHASE_INPUT", 0),
        ([(T, F, F)], F, "PHASE_PARAMETER", 0),
        ([(U, F, F)], F, "PHASE_PARAMETER", 0),
        ([(T, T, T)], F, "PHASE_PARAMETER", 0),
        ([(T, F, F)], T, "PHASE_FORWARD", 0),
        # It may have been the input, or the weights.
        ([(U, F, F)], T, None, 0),
        ([(T, F, F)], U, None, 0),
        # A finite output clears what was before it.
        ([(U, T, F)], U, "PHASE_LOSS", 0),
        ([(U, T, T)], U, "PHASE_BACKWARD", 0),
        ([(T, U, T)], T, None, 0),
        ([(T, T, U)], T, None, 0),
        # The first bad pass is the one.
        ([(T, T, T), (T, T, F), (T, F, F)], T, "PHASE_LOSS", 1),
        # Gradients were looked at when they had been summed up.
        ([(T, T, T), (T, T, T)], T, "PHASE_BACKWARD", None),
        ([(T, T, T), (T, U, U)], T, None, None),
        ([], F, "PHASE_PARAMETER", None),
        ([], T, None, None),
    ],
)
def test_where_it_began(passes, parameters, phase, microbatch):
    known = [Pass(f'"{place}"', *facts, backward=place) for place, facts in enumerate(passes)]
    batch = None if microbatch is None else f'"{microbatch}"'
    assert origin_of(known, parameters=parameters) == Origin(phase, microbatch, batch)


@pytest.mark.parametrize(
    ("before", "phase", "microbatch"),
    [
        # What had been summed up when each backward pass began.
        ((U, T, T), "PHASE_BACKWARD", 2),
        ((U, T, F), "PHASE_BACKWARD", 1),
        ((U, F, F), "PHASE_BACKWARD", 0),
        ((U, T, U), "PHASE_BACKWARD", None),
        ((U, U, T), "PHASE_BACKWARD", 2),
    ],
)
def test_which_micro_batch_spoilt_the_sum(before, phase, microbatch):
    passes = [Pass(None, T, T, T, U, one, backward=place) for place, one in enumerate(before)]
    assert origin_of(passes, parameters=True) == Origin(phase, microbatch)
    # A later pass that shows something was not the first.
    later = [*passes, Pass(None, F, F, F, U, F, backward=3)]
    assert origin_of(later, parameters=True).microbatch == (2 if microbatch is None else microbatch)


@pytest.mark.parametrize(
    ("facts", "parameters", "overflow"),
    [
        # inputs, output, entering, loss before it was scaled
        ((T, T, F, T), T, True),
        ((T, T, T, T), T, True),
        ((U, U, U, T), U, True),
        ((T, T, F, F), T, False),
        ((T, T, F, U), T, False),
        ((F, T, F, T), T, False),
        ((T, F, F, T), T, False),
        ((T, T, F, T), F, False),
    ],
)
def test_when_only_the_scale_was_too_large(facts, parameters, overflow):
    scaled, fine = Pass(None, *facts, backward=0), Pass(None, T, T, T, T, backward=1)
    assert origin_of([scaled], parameters=parameters).overflow == overflow
    assert origin_of([fine, scaled], parameters=parameters).overflow == overflow
    assert not origin_of([Pass(None, T, T, T, U), scaled], parameters=parameters).overflow


@pytest.mark.parametrize(
    ("one", "other", "is_"),
    [(U, U, U), (U, T, T), (F, U, F), (T, T, T), (T, F, F), (torch.tensor(2.0), F, F)],
)
def test_two_facts_are_one(one, other, is_):
    assert both(one, other) is is_


def test_two_magnitudes_are_the_larger_and_nan_if_one_is():
    one, nan = torch.tensor(2.0), torch.tensor(NAN)
    assert both(one, torch.tensor(3.0)).item() == 3.0
    assert both(one, T) is one
    assert math.isnan(both(nan, one).item())


# ---------------------------------------------------------------- nested arguments


@dataclasses.dataclass
class Batch:
    values: object
    more: object = None


class Slots:
    __slots__ = ("hidden",)


def test_tensors_are_found_however_they_are_nested():
    tensors = [torch.ones(1) for _ in range(5)]
    leaves = Leaves(
        (
            [tensors[0], {"a": tensors[1]}],
            Batch(tensors[2], (1, "x", None)),
            OrderedDict(b={"c": tensors[3:]}),
        )
    )
    assert [id(tensor) for tensor in leaves.tensors] == [id(tensor) for tensor in tensors]
    assert (leaves.finite, leaves.all_known) == (True, True)


@pytest.mark.parametrize("value", [Slots(), (number for number in ()), iter([torch.ones(1)]), object()])
def test_what_cannot_be_looked_into_is_not_known_and_left_as_it_is(value):
    leaves = Leaves([torch.ones(1), value])
    assert len(leaves.tensors) == 1
    assert not leaves.all_known


def test_an_iterator_is_not_consumed():
    batches = iter([1, 2])
    Leaves(batches)
    assert [*batches] == [1, 2]


def test_a_plain_number_counts_too():
    assert Leaves({"scale": [1.0, 2.0]}).finite
    assert not Leaves({"scale": [1.0, math.inf]}).finite


def test_a_structure_without_end_is_given_up():
    loop: list[object] = [torch.ones(1)]
    loop.append(loop)
    assert Leaves(loop).all_known
    deep: object = torch.ones(1)
    for _ in range(30):
        deep = [deep]
    assert not Leaves(deep).all_known
    assert not Leaves([[number] for number in range(5000)]).all_known


# ---------------------------------------------------------------- passes


def passes(fuses: Fuses | None = None) -> Passes:
    return Passes(HostLook().fact, lambda: 0, fuses or Fuses(), [].append, list)


def test_a_pass_without_a_backward_pass_is_not_taken_for_one_with():
    known = passes()
    weight = torch.ones(2, requires_grad=True)
    evaluated = known.entered((torch.tensor([NAN]),), {}, None)
    known.left(evaluated, weight * NAN)
    trained = known.entered((torch.ones(2),), {"scale": 1}, None)
    output = weight * 2
    known.left(trained, output)
    output.sum().backward()
    (taken,) = known.take()
    assert taken is trained
    assert (taken.inputs, taken.output, taken.entering, taken.backward) == (True, True, True, 0)
    assert known.take() == ()


def test_of_passes_that_are_never_gone_through_not_all_are_kept():
    known = passes()
    for _ in range(1000):
        known.entered((), {}, None)
    assert len(known._passes) == 256


def test_a_pass_that_nobody_releases_does_not_keep_its_graph():
    known = passes()
    weight = torch.ones(2, requires_grad=True)
    output = weight * 2
    known.left(known.entered((), {}, None), output)
    output.sum().backward()
    (taken,) = known.take()
    assert taken.entrances, "the pass keeps the nodes by which gradients have entered"
    there = weakref.ref(weight)
    gc.disable()
    try:
        del weight, output, taken
        assert there() is None, "it waits for the garbage collector"
    finally:
        gc.enable()


def test_a_backward_pass_through_a_forward_pass_that_is_forgotten_shows_nothing_of_its_loss():
    loss = LossPass((object(),))
    known = Passes(HostLook().fact, lambda: 0, Fuses(), [].append, list, loss=lambda: loss)
    output = torch.ones(2, requires_grad=True) * 2
    known.left(known.entered((), {}, None), output)
    known.let_go()
    output.sum().backward()
    assert loss.look() is None


def test_a_look_that_fails_is_not_raised_into_the_backward_pass(capsys):
    fuses = Fuses()

    def fact(tensors):
        if any(tensor.grad_fn is None for tensor in tensors):
            raise RuntimeError("told to fail")
        return True

    known = Passes(fact, lambda: 0, fuses, [].append, list)
    weight = torch.ones(2, requires_grad=True)
    output = weight * 2
    known.left(known.entered((), {}, None), output)
    output.sum().backward()
    assert weight.grad.tolist() == [2.0, 2.0]
    assert not fuses.intact("passes")
    assert "told to fail" in capsys.readouterr().err
