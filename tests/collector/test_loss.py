"""What is said of a loss, in a verdict and as a warning."""

from __future__ import annotations

import math
import re

import pytest
from pydantic import TypeAdapter

from gradwatch.collector import document, tables
from gradwatch.collector import observations as obs
from gradwatch.collector.model import Incident, JobState
from gradwatch.collector.observations import Phase
from tests.collector.bodies import autopsy, reduced, told_of
from tests.collector.history import Told, batch, nonfinite, progress

# Phase, loss, and what is said of it.
SAID = [
    (Phase.LOSS, math.inf, "The loss was inf on rank 1 while the model's output was finite."),
    (Phase.LOSS, -math.inf, "The loss was -inf on rank 1 while the model's output was finite."),
    (Phase.LOSS, math.nan, "The loss was NaN on rank 1 while the model's output was finite."),
    (Phase.LOSS, 0.53, "The loss was finite and its gradient was not: the loss was 0.53."),
    (Phase.LOSS, None, "What its forward pass gave was finite, and the gradient of the loss was not."),
    (Phase.FORWARD, math.nan, "The loss was NaN on rank 1."),
    (Phase.BACKWARD, math.inf, "The loss was inf on rank 1."),
    # It says nothing more, or something of bad data.
    (Phase.BACKWARD, 0.53, None),
    (Phase.INPUT, math.nan, None),
    (Phase.PARAMETER, math.nan, None),
]


def on_one(*bodies: obs.Body) -> Told:
    return Told().hellos(2).tell(*told_of(0, 5, reduced(5)), *told_of(1, 5, *bodies))


def text(told: Told) -> str:
    return " ".join(document.incident(told.incident).verdict)


@pytest.mark.parametrize(("phase", "loss", "says"), SAID)
def test_the_value_of_the_loss(phase, loss, says):
    told = text(on_one(nonfinite(5, phase=phase, loss=loss)))
    assert (says in told) if says else ("The loss was" not in told)


def test_an_operator_of_the_loss_does_not_hide_its_value():
    found = autopsy(1, 5, obs.Replay.REPRODUCED, phase=Phase.LOSS, module=None)
    told = text(on_one(nonfinite(5, phase=Phase.LOSS, loss=math.inf), found))
    assert "aten.log.default made it in the loss function, called from train.py:42" in told
    assert "The loss was inf on rank 1 while the model's output was finite." in told


def test_a_note_on_the_loss_is_a_sentence_after_it():
    note = "It came from a CTC loss whose input is shorter than its target"
    told = text(on_one(nonfinite(5, phase=Phase.LOSS, loss=math.inf, loss_note=note)))
    assert f"while the model's output was finite. {note}." in told


def test_where_nothing_is_wrapped_the_backward_pass_includes_the_loss():
    bad = nonfinite(5, phase=Phase.BACKWARD, source="gradient")
    told = Told().hellos(1).tell(*told_of(0, 5, bad))
    assert "It went bad in the backward pass, which here includes the loss function." in text(told)
    assert "The gradient of the loss was finite" not in text(told)
    told.tell(batch("r0", 2, autopsy(0, 5, obs.Replay.REPRODUCED, phase=Phase.BACKWARD)))
    assert "in the backward pass, which here includes the loss function, called from" in text(told)
    assert "The gradient of the loss was finite" not in text(told)


@pytest.mark.parametrize("phase", [Phase.FORWARD, Phase.LOSS, Phase.BACKWARD, None])
def test_no_sentence_says_that_no_other_rank_was_bad_when_one_was_later(phase):
    told = Told().hellos(2)
    told.tell(*told_of(1, 5, nonfinite(5, phase=phase, loss=math.nan)), *told_of(0, 5, reduced(5)))
    told.tell(batch("r0", 2, nonfinite(6, phase=Phase.PARAMETER)), progress("r0", 7, 3, bad_rounds=1))
    assert told.incident.verdict.contaminated_ranks == (0,)
    assert not re.search(r"(?i)no other rank", text(told))


def test_a_loss_that_is_nan_is_read_back_from_the_store():
    told = on_one(nonfinite(5, phase=Phase.LOSS, loss=math.nan))
    read = TypeAdapter(Incident).validate_json(tables.incident_row(told.incident)["state"])
    assert repr(read) == repr(told.incident)
    assert document.incident(read).first.loss == "NaN"


# ---------------------------------------------------------------- a warning


def bad_loss(step: int, loss: float = math.nan) -> obs.BadLoss:
    return obs.BadLoss(0, step, step, loss, None)


def test_a_bad_loss_with_finite_gradients_is_a_warning_and_no_incident():
    told = Told().hellos(2)
    told.tell(batch("r1", 1, bad_loss(5)), batch("r0", 1, bad_loss(30, math.inf)))
    assert told.incidents == []
    assert document.job(told.state, "j").warnings == [
        "Rank 1: the loss was NaN at step 5 with finite gradients, before and after the reduction.",
        "Rank 0: the loss was inf at step 30 with finite gradients, before and after the reduction.",
    ]


def test_no_warning_says_that_gradients_were_finite_in_a_round_in_which_they_were_bad():
    told = on_one(nonfinite(5, phase=Phase.INPUT))
    told.tell(batch("r0", 2, bad_loss(5), bad_loss(30)))
    assert document.job(told.state, "j").warnings == [
        "Rank 0: the loss was NaN at step 30 with finite gradients, before and after the reduction.",
    ]


def test_a_stretch_of_bad_losses_is_one_warning():
    told = Told().hellos(2)
    for rank in range(2):
        told.tell(batch(f"r{rank}", 1, *(bad_loss(step) for step in range(5, 60))))
    assert len(document.job(told.state, "j").warnings) == 1
    assert told.job.warned == {"loss": 110}


def test_a_bad_loss_does_not_hide_that_gradients_grow():
    told = Told().hellos(1)
    growing = obs.Exploding(0, 6, 6, "a.weight", "a", "Linear", 5e6, 0.5, 1)
    told.tell(batch("r0", 1, bad_loss(5), growing))
    read = TypeAdapter(JobState).validate_json(tables.job_row(told.job)["state"])
    assert repr(read.bad_losses) == repr(((0, bad_loss(5)),))
    assert read.warnings == ((0, growing),)
    assert len(document.job(told.state, "j").warnings) == 2
