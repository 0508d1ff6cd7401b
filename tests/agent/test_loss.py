"""The loss: what its graph shows of a loss that is not finite, and of a gradient that it made so."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from gradwatch.agent.probe import activate
from gradwatch.agent.probe.fuses import Fuses
from gradwatch.agent.probe.look import HostLook
from gradwatch.agent.probe.losses import Losses
from gradwatch.agent.probe.passes import Origin, Pass, Passes
from gradwatch.agent.probe.phases import armed as armed_module
from gradwatch.agent.probe.phases import loss_graph
from gradwatch.agent.probe.phases.armed import Armed
from gradwatch.agent.probe.phases.loss_maker import made_by
from gradwatch.agent.probe.phases.loss_pass import completed, refine, settled
from gradwatch.agent.probe.settings import Settings
from gradwatch.agent.probe.single import SingleWatch
from gradwatch.agent.probe.watcher import Watcher

NAN = float("nan")
NOT_DONE = {"replay": "REPLAY_NOT_DONE", "reason": "the loss made it"}
FINITE = {"replay": "REPLAY_FINITE"}


def output(*shape: int, fill: float = 0.5) -> torch.Tensor:
    """What a model gave: finite, and marked as such."""
    made = torch.full(shape, fill, requires_grad=True) * 1.0
    made.grad_fn.metadata[loss_graph.MARK] = True
    return made


class Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        ctx.save_for_backward(value)
        return value / 0.0

    @staticmethod
    def backward(ctx, gradient):
        return gradient / 2


# A loss that is not finite, and the operator that made it so; None where nothing shows it.
MADE = {
    "log of zero": (lambda: torch.log(output(3) - 0.5).mean(), "aten.log"),
    "log of one minus a saturated sigmoid": (
        lambda: torch.log(1 - torch.sigmoid(output(3, fill=200.0))).mean(),
        "aten.log",
    ),
    "division by an empty count": (lambda: output(3).sum() / torch.zeros(()), "aten.div"),
    "more targets than frames": (
        lambda: functional.ctc_loss(
            output(4, 1, 5).log_softmax(-1), torch.ones(1, 9, dtype=torch.long), (4,), (9,)
        ),
        "aten.ctc_loss",
    ),
    "all labels ignored": (
        lambda: functional.cross_entropy(output(2, 3), torch.tensor([-100, -100])),
        "aten.nll_loss",
    ),
    "mean of nothing": (lambda: output(3)[:0].mean() + 0, "aten.mean"),
    "spread of one": (lambda: output(1).std(), "aten.std"),
    "square that overflows": (
        lambda: functional.mse_loss(output(2, fill=1e25), torch.zeros(2)),
        "aten.mse_loss",
    ),
    "root of what is negative": (lambda: (output(2) - 1.0).pow(0.5).sum(), "aten.pow"),
    "root of a negative sum": (lambda: (-output(3)).sum().sqrt(), "aten.sqrt"),
    "norm that overflows": (lambda: (output(3, fill=3e38)).norm(), "aten.linalg_vector_norm"),
    "a function in Python": (lambda: Halved.apply(output(2)).sum(), None),
    "a sum that overflows": (lambda: (output(4, fill=3e38)).sum(), None),
    "a weight that was NaN": (lambda: (output(2) * torch.tensor([1.0, NAN])).mean() + 0, None),
    "a target that was infinite": (
        lambda: functional.smooth_l1_loss(output(2), torch.tensor([0.0, math.inf])),
        None,
    ),
    "infinities that are masked away": (
        lambda: torch.log(output(2).masked_fill(torch.tensor([True, False]), -math.inf).softmax(0)).sum(),
        "aten.log",
    ),
}


@pytest.mark.filterwarnings("ignore:std\\(\\)")
@pytest.mark.parametrize("name", MADE)
def test_a_loss_that_is_not_finite_tells_its_operator(name):
    make, expected = MADE[name]
    loss = make()
    assert not math.isfinite(loss.item())
    told = made_by([loss.grad_fn])
    assert told.get("operator") == expected
    assert all("no operator is named" in one for one in told["missing"]) or expected


def test_what_came_from_outside_is_said_to_have_been_bad_already():
    loss = (output(2) * torch.tensor([1.0, NAN])).mean()
    (missing,) = made_by([loss.grad_fn])["missing"]
    assert "from outside of the model, by mul, was NaN already" in missing


def test_inputs_are_told_in_the_order_in_which_the_operator_takes_them():
    loss = (output(1, fill=4.0) / (output(1) * 0.0).sum()).sum()
    assert [one["max"] for one in made_by([loss.grad_fn])["inputs"]] == [4.0, 0.0]


def test_what_a_division_was_given_first_is_not_known_and_keeps_its_place():
    loss = (output(2) / torch.zeros(2)).sum()
    first, second = made_by([loss.grad_fn])["inputs"]
    assert "min" not in first
    assert (second["min"], second["max"]) == (0.0, 0.0)


def test_a_finite_loss_has_no_maker():
    told = made_by([functional.mse_loss(output(3), torch.zeros(3)).grad_fn])
    assert "operator" not in told


# ---------------------------------------------------------------- a backward pass


class Run:
    """One backward pass through models that are watched as DDP's are."""

    def __init__(self) -> None:
        self.losses = Losses(Fuses())
        self.models: dict[int, Passes] = {}

    def forward(self, model: nn.Module, *args: torch.Tensor):
        passes = self.models.setdefault(
            id(model),
            Passes(
                HostLook().fact, lambda: 0, Fuses(), lambda _: None, list, loss=lambda: self.losses.current
            ),
        )
        one = passes.entered(args, {}, None)
        given = model(*args)
        passes.left(one, given)
        return given

    def backward(self, loss: torch.Tensor, model: nn.Module):
        """The passes of a model, before the graph is forgotten."""
        self.losses.backward_begins(loss)
        loss.backward()
        taken = self.models[id(model)].take()
        self.losses.current.look()
        return taken


class Both(nn.Module):
    """Gives its output and a loss made of it, whose gradient is bad."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, values):
        given = self.linear(values)
        return given, (given * 0).sum().sqrt() + given.sum()


def test_a_loss_inside_of_the_model_is_no_loss_outside():
    run, model = Run(), Both()
    _, loss = run.forward(model, torch.ones(1, 2))
    (one,) = run.backward(loss, model)
    assert one.entering is False, "by what came to the logits"
    (one,) = settled([one])
    assert one.entering is True


def test_a_gradient_that_comes_from_within_and_from_outside_is_not_known():
    run, model = Run(), Both()
    given, loss = run.forward(model, torch.ones(1, 2))
    (one,) = settled(run.backward(loss + given.sum(), model))
    assert one.entering is None


def test_to_a_model_the_loss_is_also_the_other_model_after_it():
    run, first, second = Run(), nn.Linear(2, 2), nn.Linear(2, 1)
    made = run.forward(second, run.forward(first, torch.ones(1, 2)))
    for model in (first, second):
        (one,) = run.models[id(model)]._passes
        assert one.output is True
    loss = (made * 0).sum().sqrt()
    run.losses.backward_begins(loss)
    loss.backward()
    assert [settled(run.models[id(model)].take())[0].entering for model in (first, second)] == [False, False]


class Prototypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.unused = nn.Parameter(torch.zeros(2, 2))

    def forward(self, values):
        return self.linear(values)


# A loss that uses a weight beside the output; whether some weight is reached around it.
AROUND = {
    "a penalty": lambda model, given: given.sum() + model.unused.pow(2).sum().sqrt(),
    "prototypes": lambda model, given: (given - model.unused[0]).pow(2).sum(),
}


@pytest.mark.parametrize("name", AROUND)
def test_a_weight_that_the_loss_uses_itself_leaves_the_phase_open(name):
    run, model = Run(), Prototypes()
    loss = AROUND[name](model, run.forward(model, torch.ones(1, 2)))
    passes = run.backward(loss, model)
    origin, note = refine(Origin("PHASE_BACKWARD"), {id(model.unused)}, passes)
    assert origin.phase is None
    assert "outside of the model's forward pass" in note
    origin, note = refine(Origin("PHASE_BACKWARD"), {id(model.linear.weight)}, passes)
    assert (origin.phase, note) == ("PHASE_BACKWARD", "")


def test_a_gradient_of_a_gradient_goes_around_the_output():
    run, model = Run(), nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    values = torch.zeros(1, 2, requires_grad=True)
    given = run.forward(model, values)
    (slope,) = torch.autograd.grad(given.sum(), values, create_graph=True)
    passes = run.backward(slope.pow(2).sum().sqrt(), model)
    origin, _ = refine(Origin("PHASE_BACKWARD"), {id(model[0].weight)}, passes)
    assert origin.phase is None
    told = completed(FINITE, origin.phase, passes)
    assert (told["phase"], told["operator"]) == ("PHASE_LOSS", "aten.sqrt")


# Losses whose gradient is bad though they are finite, and the only operator that can have made it so.
SUSPECTS = {
    "root of zero": (lambda given: (given * 0).sum().sqrt(), "aten.sqrt"),
    "half a power of zero": (lambda given: (given * 0).pow(0.5).sum(), "aten.pow"),
    "angle of nothing": (lambda given: torch.atan2(given * 0, given * 0).sum(), None),
    "a root of squares": (lambda given: (given * 0).pow(2).sum().sqrt() + given.pow(3).sum(), "aten.sqrt"),
    "one of two": (lambda given: (given * 0).sum().sqrt() + torch.asin(given.clamp(0, 1)).sum(), None),
    "a logarithm that is not taken": (
        lambda given: torch.where(given > 9, torch.log(given * 0), given).sum(),
        "aten.log",
    ),
}


@pytest.mark.parametrize("name", SUSPECTS)
def test_one_operator_that_can_have_made_it_is_inferred_and_of_two_none(name):
    loss_of, expected = SUSPECTS[name]
    run, model = Run(), nn.Linear(2, 2)
    passes = run.backward(loss_of(run.forward(model, torch.ones(1, 2))), model)
    told = completed(NOT_DONE, "PHASE_LOSS", passes)
    if name != "angle of nothing":
        assert told.get("operator") == expected
    if expected is not None:
        assert any("inferred" in one for one in told["missing"])


def test_an_operator_that_a_replay_has_seen_stands():
    run, model = Run(), nn.Linear(2, 2)
    passes = run.backward((run.forward(model, torch.ones(1, 2)) * 0).sum().sqrt(), model)
    seen = {"replay": "REPLAY_REPRODUCED", "operator": "aten.div.Tensor"}
    assert completed(seen, "PHASE_LOSS", passes) is seen


def test_nothing_of_the_graph_is_kept_after_the_pass():
    run, model = Run(), nn.Linear(2, 2)
    loss = run.forward(model, torch.ones(1, 2)).sum()
    (one,) = run.backward(loss, model)
    run.losses.backward_over()
    one.release()
    assert (run.losses.current.roots, run.losses.current.passes, one.entrances) == ((), [], [])


# ---------------------------------------------------------------- a recurrence


def test_when_it_comes_again_the_operator_has_its_line():
    losses, armed = Losses(Fuses()), Armed(Fuses())

    def step(values):
        loss = (values * 2).pow(2).sum().sqrt()  # the line
        losses.backward_begins(loss)
        armed.begins(losses.current)
        loss.backward()
        armed.over()
        return armed.report()

    zeros = torch.zeros(2, requires_grad=True)
    assert step(zeros) == {}, "it is not armed"
    armed.arm()
    assert step(torch.ones(2, requires_grad=True)) == {}
    told = step(zeros)
    assert told["operator"] == "aten.sqrt"
    assert "the line" in told["code"]
    for _ in range(20):
        assert torch.is_anomaly_enabled() == bool(armed._passes_left)
        step(torch.ones(2, requires_grad=True))
    assert not torch.is_anomaly_enabled()
    assert step(zeros) == {}, "it is over after some passes"


def test_somebody_elses_anomaly_mode_stays():
    armed = Armed(Fuses())
    with torch.autograd.set_detect_anomaly(True):
        armed.arm()
        for _ in range(20):
            loss = torch.ones(1, requires_grad=True).sum()
            losses = Losses(Fuses())
            losses.backward_begins(loss)
            armed.begins(losses.current)
            loss.backward()
            armed.over()
        assert torch.is_anomaly_enabled()
        assert torch.is_anomaly_check_nan_enabled()


class PlantedError(Exception):
    """A fault of the probe."""


def planted(*_: object) -> bool:
    raise PlantedError


def test_a_hook_that_fails_does_not_break_the_pass_and_ends_the_close_look(monkeypatch, capsys):
    fuses = Fuses()
    losses, armed = Losses(fuses), Armed(fuses)
    armed.arm()
    assert torch.is_anomaly_enabled()
    monkeypatch.setattr("gradwatch.agent.probe.scan.is_finite", planted)
    values = torch.ones(2, requires_grad=True)
    loss = (values * 2).sum()
    losses.backward_begins(loss)
    armed.begins(losses.current)
    loss.backward()
    armed.over()
    assert values.grad.tolist() == [2.0, 2.0]
    assert list(fuses.counts) == ["armed"]
    assert not torch.is_anomaly_enabled(), "the lines of forward operators are still kept"
    armed.arm()
    assert not torch.is_anomaly_enabled(), "what is off is armed again"
    assert "PlantedError" in capsys.readouterr().err


def test_a_graph_that_is_too_large_is_not_looked_at_closely(monkeypatch):
    fuses = Fuses()
    losses, armed = Losses(fuses), Armed(fuses)
    armed.arm()
    monkeypatch.setattr(loss_graph, "MAX_NODES", 2)
    loss = (torch.ones(2, requires_grad=True) * 2 + 1).sum()
    losses.backward_begins(loss)
    armed.begins(losses.current)
    armed.over()
    assert not torch.is_anomaly_enabled()
    assert not fuses.counts


class Sharded(torch.Tensor):
    """One whose values are computed by all ranks together."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)

    def __init__(self, held):
        self._local_tensor = held

    @classmethod
    def __torch_dispatch__(cls, *_):
        raise AssertionError("something was computed with the whole tensor")


def test_of_sharded_gradients_only_the_own_part_is_looked_at():
    assert armed_module._are_finite([Sharded(torch.ones(2)), None]) is True
    assert armed_module._are_finite([Sharded(torch.tensor([NAN]))]) is False
    within = Sharded(Sharded(torch.ones(2)))
    assert armed_module._are_finite([torch.ones(1), within]) is None, "nobody knows it here"
    assert armed_module._are_finite([torch.tensor([NAN]), within]) is False


@pytest.mark.parametrize("part", ["_roots", "scalar"])
def test_a_loss_that_cannot_be_looked_at_leaves_nothing_of_the_one_before(part, monkeypatch):
    fuses = Fuses()
    losses = Losses(fuses)
    losses.backward_begins(torch.ones(1, requires_grad=True).sum())
    losses.backward_over()
    monkeypatch.setattr(f"gradwatch.agent.probe.losses.{part}", planted)
    for _ in range(2):
        losses.backward_begins(torch.ones(1, requires_grad=True).sum())
        assert losses.roots == ()
        assert losses.current.loss is None
        losses.backward_over()
    assert fuses.counts == {"losses": 1}


def test_a_backward_pass_is_let_go_when_the_look_at_it_has_failed(monkeypatch):
    fuses = Fuses()
    losses = Losses(fuses)
    for _ in range(2):
        losses.backward_begins(torch.ones(1, requires_grad=True).sum())
        losses.current.is_bad = True
        losses.current.entered(Pass())
        monkeypatch.setattr("gradwatch.agent.probe.phases.loss_pass.LossPass.look", planted)
        losses.backward_over()
        assert (losses.roots, losses.current.passes) == ((), [])
    assert list(fuses.counts) == ["losses"]


def test_the_recorder_s_fuse_is_not_that_of_the_losses(monkeypatch, tmp_path):
    """Each backward pass is let go, whatever else of the probe is off."""
    begun: list[tuple] = []
    monkeypatch.setattr(activate, "patch_backward", lambda *calls: begun.append(calls))
    settings = Settings.from_environment({"GRADWATCH_SPOOL": str(tmp_path)})
    watcher = Watcher(settings)
    activate._patch_backward(watcher, SingleWatch(watcher))
    ((begins, ended),) = begun
    watcher.fuses.blow("recorder", PlantedError())
    loss = torch.ones(1, requires_grad=True).sum()
    begins(loss, None)
    assert watcher.losses.roots == (loss.grad_fn,)
    ended(False)
    assert watcher.losses.roots == ()


# ---------------------------------------------------------------- masks


def test_infinities_below_zero_are_told_by_clean_rounds():
    known = Passes(HostLook().fact, lambda: 0, Fuses(), lambda _: None, list)
    mask = torch.tensor([0.0, -math.inf])
    one = known.entered((mask,), {}, None)
    known.left(one, mask + torch.zeros(2, requires_grad=True))
    assert (one.inputs, one.output) == (None, None), "nothing is known of clean rounds yet"
    one.learn_masks()
    one = known.entered((mask,), {}, None)
    known.left(one, mask + torch.zeros(2, requires_grad=True))
    assert (one.inputs, one.output) == (True, True)


@pytest.mark.parametrize("bad", [[NAN, -math.inf], [math.inf, 0.0], [NAN, 0.0]])
def test_what_no_mask_holds_is_bad(bad):
    known = Passes(HostLook().fact, lambda: 0, Fuses(), lambda _: None, list)
    usual = known.entered((torch.tensor([-math.inf]),), {}, None)
    usual.learn_masks()
    assert known.entered((torch.tensor(bad),), {}, None).inputs is False


def test_an_output_that_never_held_a_mask_is_bad_with_one():
    known = Passes(HostLook().fact, lambda: 0, Fuses(), lambda _: None, list)
    clean = known.entered((torch.ones(1),), {}, None)
    known.left(clean, torch.ones(1, requires_grad=True) * 1)
    clean.learn_masks()
    one = known.entered((torch.ones(1),), {}, None)
    known.left(one, torch.log(torch.zeros(1, requires_grad=True)))
    assert one.output is False
