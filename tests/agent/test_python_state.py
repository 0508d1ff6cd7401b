"""Python's state is taken before each pass and put back in the replay; what cannot be known is said."""

from __future__ import annotations

import collections
import copy
import enum
import functools
import itertools
import logging
import math
import random
import statistics
import threading
import time
import types
import warnings
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import nn

from gradwatch.agent.probe.autopsy.capsule import PYTHON, Capsules, ModelCapsules
from gradwatch.agent.probe.autopsy.evidence import Evidence
from gradwatch.agent.probe.autopsy.inventory import StateKeeper, take_inventory
from gradwatch.agent.probe.autopsy.kept_values import MAX_ELEMENTS
from gradwatch.agent.probe.autopsy.replay import Case, replay

LEVEL = 1
SCHEDULE = {"rates": [1, 2]}


@dataclass
class Options:
    rate: float = 0.5
    names: list = field(default_factory=lambda: ["a"])


class Inner(nn.Module):
    """Keeps what modules keep."""

    shared = 1

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.drop = nn.Dropout(0.5)

    def forward(self, values, seen=[]):  # noqa: B006 - what is tried
        seen.append(len(seen))
        return self.helper(values)

    def helper(self, values):
        return self.layer(values) * LEVEL * Inner.shared * len(SCHEDULE)


class Asking(nn.Module):
    """Asks a layer whether it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, values):
        return self.layer(values) * (2 if self.layer.training else 1)


class Own(nn.Linear):
    """Its code is not torch's."""


def hooked(module):
    module.register_forward_pre_hook(lambda _module, _args: None)
    return module


class Outer(nn.Module):
    def __init__(self, **attributes) -> None:
        super().__init__()
        self.inner = Inner()
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, values):
        return self.inner(values)


def taken(module):
    keeper = StateKeeper(lambda: module)
    return keeper.take()


CHANGES = {
    "number": (lambda: {"thing": 1}, lambda m: setattr(m, "thing", 2), lambda m: m.thing),
    "list": (lambda: {"thing": [1, [2]]}, lambda m: m.thing[1].append(3), lambda m: m.thing),
    "deque": (
        lambda: {"thing": collections.deque([1, 2])}, lambda m: m.thing.popleft(), lambda m: list(m.thing),
    ),
    "set": (lambda: {"thing": {1}}, lambda m: m.thing.clear(), lambda m: m.thing),
    "mapping": (lambda: {"thing": {"a": {"b": 1}}}, lambda m: m.thing["a"].update(b=2), lambda m: m.thing),
    "exchanged": (lambda: {"thing": [1]}, lambda m: setattr(m, "thing", [2]), lambda m: m.thing),
    "options": (lambda: {"thing": Options()}, lambda m: setattr(m.thing, "rate", 9), lambda m: m.thing.rate),
    "inside": (lambda: {"thing": Options()}, lambda m: m.thing.names.append("b"), lambda m: m.thing.names),
    "namespace": (
        lambda: {"thing": types.SimpleNamespace(a=1)},
        lambda m: setattr(m.thing, "a", 2),
        lambda m: m.thing.a,
    ),
    "array": (lambda: {"thing": np.zeros(2)}, lambda m: m.thing.fill(1), lambda m: m.thing.tolist()),
    "random": (
        lambda: {"thing": random.Random(1)}, lambda m: m.thing.random(), lambda m: m.thing.getstate(),
    ),
    "torch_random": (
        lambda: {"thing": torch.Generator()},
        lambda m: torch.rand(1, generator=m.thing),
        lambda m: m.thing.get_state().tolist(),
    ),
    "training": (dict, lambda m: m.eval(), lambda m: (m.training, m.inner.drop.training)),
    "hooked": (
        lambda: {"thing": hooked(nn.Linear(2, 2))}, lambda m: m.eval(), lambda m: m.thing.training,
    ),
    "asked": (lambda: {"thing": Asking()}, lambda m: m.eval(), lambda m: m.thing.layer.training),
    "own": (lambda: {"thing": Own(2, 2)}, lambda m: m.eval(), lambda m: m.thing.training),
    "dropout": (dict, lambda m: setattr(m.inner.drop, "p", 0.1), lambda m: m.inner.drop.p),
    "class": (dict, lambda _: setattr(Inner, "shared", 7), lambda _: Inner.shared),
    "global": (dict, lambda _: globals().update(LEVEL=5), lambda _: LEVEL),
    "global_content": (dict, lambda _: SCHEDULE["rates"].append(3), lambda _: SCHEDULE["rates"]),
    "default": (
        dict, lambda m: m.inner(torch.ones(2)), lambda m: list(type(m.inner).forward.__defaults__[0]),
    ),
    "tensor": (
        lambda: {"thing": torch.zeros(2)},
        lambda m: setattr(m, "thing", torch.ones(2)),
        lambda m: m.thing.tolist(),
    ),
    "new": (dict, lambda m: setattr(m, "late", 1), lambda m: hasattr(m, "late")),
    "forward": (dict, lambda m: setattr(m, "forward", len), lambda m: "forward" in vars(m)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.setitem(globals(), "LEVEL", 1)
    monkeypatch.setitem(SCHEDULE, "rates", [1, 2])
    monkeypatch.setattr(Inner, "shared", 1)


@pytest.mark.parametrize("kind", CHANGES)
def test_what_has_changed_is_put_back(kind):
    attributes, change, look = CHANGES[kind]
    module = Outer(**attributes())
    module(torch.ones(2))
    before, state = look(module), taken(module)
    assert state.doubts() == []
    before = copy.deepcopy(before)
    change(module)
    assert look(module) != before
    assert state.doubts() == []
    state.restore()
    assert look(module) == before


@pytest.mark.parametrize(
    "kind",
    ["number", "list", "deque", "set", "mapping", "exchanged", "options", "inside", "training", "dropout"],
)
def test_another_process_takes_it_over(kind):
    attributes, change, look = CHANGES[kind]
    theirs, ours = Outer(**attributes()), Outer(**attributes())
    change(theirs)
    given = taken(theirs).plain()
    state = taken(ours)
    assert state.take_over(given) == []
    assert state.doubts() == []
    state.restore()
    assert look(ours) == look(theirs)


def test_another_program_is_not_taken_over():
    other = Outer(thing=1)
    assert taken(Outer()).take_over(taken(other).plain()) == [
        "the model (Outer) has other attributes on the other rank"
    ]
    assert taken(nn.Linear(2, 2)).take_over(taken(other).plain()) != []


class Raising:
    @property
    def anything(self):
        raise RuntimeError("looked at")

    def __getattr__(self, name):
        raise RuntimeError(name)


class Slotted:
    __slots__ = ("value",)


@pytest.mark.parametrize(
    ("value", "phrase"),
    [
        (threading.Lock(), "keeps a lock"),
        (open("/dev/null"), "keeps a TextIOWrapper"),  # noqa: SIM115, PTH123
        (np.random.default_rng(1), "keeps a Generator"),
        (iter([1]), "keeps a list_iterator"),
        (itertools.count(), "keeps a count"),
        (threading.local(), "keeps a _local"),
        (Slotted(), "keeps a Slotted"),
        ([threading.Lock()], "keeps a lock"),
        (Options(names=[(threading.Lock(),)]), "keeps a lock"),
        (list(range(MAX_ELEMENTS + 1)), "keeps a large list"),
        (np.zeros(10_000), "keeps a ndarray"),
        (torch.optim.SGD([torch.zeros(1)], lr=1.0), "keeps a SGD"),
    ],
)
def test_what_cannot_be_known_is_said(value, phrase):
    module = Outer(thing=value)
    doubts = taken(module).doubts()
    assert any(phrase in doubt and "the model (Outer)" in doubt for doubt in doubts), doubts


def reads_time(values):
    return values if time.time() > 0 else -values


def reads_file(values):
    with open("/dev/null") as file:  # noqa: PTH123
        return values + len(file.read())


def imports(values):
    import socket

    return values if socket.gethostname() else -values


@pytest.mark.parametrize(
    ("function", "phrase"),
    [(reads_time, "uses time"), (reads_file, "calls open"), (imports, "uses socket")],
)
def test_code_that_looks_outside_is_said(function, phrase):
    class Reading(Outer):
        def forward(self, values):
            return function(values)

    doubts = taken(Reading()).doubts()
    assert any(phrase in doubt for doubt in doubts), doubts
    assert any(phrase in one for one in taken(Outer(thing=functools.partial(function))).doubts())


def test_objects_that_raise_and_scripted_modules_are_no_obstacle():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(nn.Linear(2, 2))
    module = Outer(thing=Raising(), scripted=scripted, same=scripted)
    state = taken(module)
    assert any("scripted" in doubt for doubt in state.doubts())
    state.restore()


def test_a_running_mean_is_no_doubt_and_another_buffer_is():
    module = Outer(norm=nn.BatchNorm1d(2))
    module.inner.register_buffer("calls", torch.zeros(1))
    state = taken(module)
    module.norm(torch.randn(4, 2))
    assert state.doubts() == []
    module.inner.calls += 1
    assert state.doubts() == ["buffer inner.calls was changed in place"]


def test_most_layers_of_torch_do_not_care_whether_they_train():
    module = Outer(many=nn.Sequential(*(nn.Linear(2, 2) for _ in range(9))), norm=nn.BatchNorm1d(2))
    caring = {id(vars(one)) for one in (module, module.inner, module.inner.drop, module.norm)}
    assert {id(one) for one in take_inventory(module).modules} == caring


def test_an_attribute_of_a_layer_of_torch_that_changes_is_a_doubt():
    module = Outer()
    state = taken(module)
    module.inner.layer.out_features = 3
    assert state.doubts() == ["an attribute of module inner.layer (Linear) was changed"]


def test_large_tensors_are_not_kept_alive():
    module = Outer(thing=torch.zeros(1 << 20), many=[torch.zeros(1 << 20)])
    state = taken(module)
    module.thing = None
    module.many.clear()
    assert len([doubt for doubt in state.doubts() if "tensor" in doubt]) == 2
    state.restore()


def test_attributes_that_come_and_go():
    module = Outer()
    keeper = StateKeeper(lambda: module)
    keeper.take()
    module.late = 1
    state = keeper.take()
    module.late = 2
    state.restore()
    assert module.late == 1


def test_tied_and_shared_modules_are_looked_at_once():
    module = Outer()
    module.again = module.inner
    inventory = take_inventory(module)
    assert len([one for one in inventory.holders if one.key.startswith("module:")]) == 2


# ---------------------------------------------------------------- random numbers of Python's


def draws_by_module(values):
    return values * random.random()


def draws_by_method(values):
    return values * (uniform(0, 1) + drawn())


def draws_unseen(values):
    # The standard library's own code is not looked through.
    return values * statistics.NormalDist().samples(1)[0]


def imports_and_draws(values):
    from random import gauss

    return values * gauss(0, 1)


def draws_none(values):
    return values * math.pi


uniform, drawn = random.uniform, random.random


def drawing(function):
    class Drawing(Outer):
        def forward(self, values):
            return function(self.inner(values))

    return Drawing()


@pytest.mark.parametrize(
    ("function", "draws"),
    [
        (draws_by_module, True),
        (draws_by_method, True),
        (imports_and_draws, True),
        (random.Random(3).gauss, True),
        (random.Random(3).random, True),
        (draws_none, False),
        # What cannot be known may draw.
        (reads_time, True),
    ],
)
def test_whether_the_code_draws(function, draws):
    assert take_inventory(drawing(function)).draws is draws


def test_a_method_of_a_generator_goes_on_from_where_it_was():
    module = drawing(random.Random(3).random)
    module.thing = random.Random(4).random
    state = taken(module)
    now = module.thing()
    state.restore()
    assert module.thing() == now


def began(capsules):
    capsule = capsules.begin((), {}, [], None, tuple)
    capsules.left(capsule, [], fact=True)
    return capsule


def test_the_state_of_the_random_numbers_is_kept_of_models_that_draw():
    for function, draws in [(draws_by_module, True), (draws_none, False), (reads_time, True)]:
        module = drawing(function)
        capsules = ModelCapsules(Capsules(), lambda module=module: module)
        kept = [began(capsules).rng.python is not None for _ in range(6)]
        assert kept == [True] * 3 + [draws] * 3, function


def test_nothing_is_kept_of_an_output_whose_pass_is_doubtful():
    output = torch.ones(2)
    for function, kept in [(draws_none, True), (reads_time, False)]:
        module = drawing(function)
        capsules = ModelCapsules(Capsules(), lambda module=module: module)
        capsule = capsules.begin((), {}, [], None, tuple)
        capsules.left(capsule, [output], fact=True)
        assert (capsule.output is not None) is kept


def test_a_model_that_was_seen_to_draw_has_its_random_numbers_kept():
    capsules = ModelCapsules(shared := Capsules(), lambda: drawing_none)
    drawing_none = drawing(draws_none)
    capsule = capsules.begin((), {}, [], None, tuple)
    random.random()
    capsules.left(capsule, [], fact=True)
    assert capsule.doubts == [], "its state was kept"
    assert shared.keeps_python
    assert all(began(capsules).rng.python is not None for _ in range(6))


@pytest.mark.parametrize(
    ("function", "kept", "doubted"),
    [(draws_unseen, False, True), (draws_unseen, True, False), (draws_none, False, False)],
)
def test_a_replay_that_draws_what_was_not_kept_is_doubtful(function, kept, doubted):
    module, values = drawing(function), torch.ones(2)
    capsule = Capsules().begin((values,), {}, [values], None, tuple)
    capsule.rng.python = random.getstate() if kept else None
    output = module(values)
    Capsules().entered(capsule, [(0, 0)], [torch.ones_like(output)])
    case = Case(module, capsule, lambda: list(module.parameters()), False, Evidence(), list(range(2)))
    assert (PYTHON in replay(case)["doubts"]) is doubted


# ---------------------------------------------------------------- what changes unseen

TABLE = torch.ones(3)
LOG = logging.getLogger("tests")


class Colour(enum.Enum):
    RED = 1


class Tinted(enum.Enum):
    RED = 1

    def __init__(self, value):
        self.strength = value


class Keeping(Outer):
    """Keeps tensors in an attribute, a buffer, a list and a global."""

    def __init__(self) -> None:
        super().__init__(thing=torch.ones(3), many=[torch.ones(3)], large=torch.ones(5, 1000))
        self.register_buffer("table", torch.ones(3))

    def forward(self, values):
        return super().forward(values) * TABLE.sum()


WRITES = {
    "data": lambda tensor: tensor.data.fill_(2),
    "numpy": lambda tensor: tensor.numpy().fill(2),
    "dlpack": lambda tensor: torch.from_dlpack(tensor.__dlpack__()).data.fill_(2),
    "nan": lambda tensor: tensor.data.fill_(math.nan),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize(
    ("get", "phrase"),
    [
        (lambda m: m.thing, "keeps a tensor that has changed (thing)"),
        (lambda m: m.many[0], "a list holds a tensor that has changed"),
        (lambda m: m.large, "keeps a tensor that has changed (large)"),
        (lambda m: m.table, "buffer table was changed in place"),
        (lambda _: TABLE, "keeps a tensor that has changed (TABLE)"),
    ],
)
def test_what_is_written_into_a_tensor_unseen_is_a_doubt(monkeypatch, get, phrase, write):
    monkeypatch.setitem(globals(), "TABLE", torch.ones(3))
    module = Keeping()
    state = taken(module)
    assert state.doubts() == []
    version = get(module)._version
    WRITES[write](get(module))
    assert get(module)._version == version
    assert [phrase in doubt for doubt in state.doubts()] == [True], state.doubts()


@pytest.mark.parametrize("get", [lambda m: m.thing, lambda m: m.many[0], lambda m: m.table])
def test_another_process_whose_tensors_differ_is_said(get):
    theirs, ours = Keeping(), Keeping()
    assert taken(ours).take_over(taken(theirs).plain()) == []
    get(theirs).data[1] = 3e38
    phrases = taken(ours).take_over(taken(theirs).plain())
    assert phrases == ["tensors that its modules keep are not the same on both ranks"]


def warns(values):
    return values if warnings.filters else -values


def logs(values):
    return values if LOG.level else -values


def asks_dtype(values):
    return values if torch.get_default_dtype() == torch.float32 else -values


def reads_table(values):
    return values * TABLE.sum()


def reads_tinted(values):
    return values * Tinted.RED.strength


def reads_plain(values):
    return values * Colour.RED.value * LEVEL * len(SCHEDULE)


@pytest.mark.parametrize(
    ("function", "phrase"),
    [
        (warns, "uses warnings"),
        (logs, "uses logging"),
        (asks_dtype, "settings of torch"),
        (reads_table, "TABLE of module"),
        (reads_tinted, "Tinted with attributes"),
        (reads_plain, None),
    ],
)
def test_what_may_change_unseen_is_no_doubt_while_something_can_be_compared(function, phrase):
    state = taken(drawing(function))
    assert state.doubts() == []
    assert [phrase in one for one in state.hidden()] == [True] * (phrase is not None), state.hidden()


def test_attributes_of_parameters_that_the_code_reads():
    module = drawing(lambda values: values.strength)
    assert taken(module).hidden() == []
    next(module.parameters()).strength = 2
    assert taken(module).hidden() == ["its code reads attributes of its parameters"]


def replayed(module, values, output, change=lambda: None):
    capsules = Capsules()
    capsule = capsules.begin((values,), {}, [values], None, tuple)
    capsule.state = taken(module)
    capsules.left(capsule, [output], fact=bool(torch.isfinite(output).all()))
    change()
    capsules.entered(capsule, [(0, 0)], [torch.ones_like(output)])
    evidence = Evidence(capsule.output, ordinals=[0])
    case = Case(module, capsule, lambda: list(module.parameters()), False, evidence, list(range(2)))
    return replay(case)


@pytest.mark.parametrize(("bad", "said"), [(2, True), (1, False)])
def test_it_is_a_doubt_where_nothing_of_the_output_was_finite(bad, said):
    module, values = drawing(reads_table), torch.ones(2)
    output = module(values).detach()
    output[:bad] = math.nan
    doubts = replayed(module, values, output)["doubts"]
    assert any("can be written to unseen" in doubt for doubt in doubts) is said, doubts


@pytest.mark.parametrize(
    "changes",
    [
        (torch.set_default_dtype, torch.float64, torch.float32),
        (torch.set_flush_denormal, True, False),
        (torch.set_float32_matmul_precision, "medium", "highest"),
    ],
)
def test_torch_that_is_set_up_otherwise_is_a_doubt(changes):
    change, other, usual = changes
    module, values = drawing(draws_none), torch.ones(2)
    try:
        doubts = replayed(module, values, module(values), lambda: change(other))["doubts"]
    finally:
        change(usual)
    assert any("set up otherwise" in doubt for doubt in doubts), doubts
    doubts = replayed(module, values, module(values))["doubts"]
    assert not any("set up otherwise" in doubt for doubt in doubts), doubts
