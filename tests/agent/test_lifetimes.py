"""Nothing of the user's outlives its last use by us: models and weights are freed when they are let go."""

from __future__ import annotations

import gc
import json
import weakref

import pytest
import torch
from torch import nn

from gradwatch.agent.probe.model import WatchedModel, is_followed
from gradwatch.agent.probe.parameters import Names, name_parameters
from gradwatch.agent.probe.rounds import Bucket
from gradwatch.agent.probe.settings import Settings
from gradwatch.agent.probe.single_model import SingleModel
from gradwatch.agent.probe.watcher import Watcher
from tests.ranks import run_ranks

CPU = torch.device("cpu")


@pytest.fixture
def watcher(tmp_path):
    return Watcher(Settings.from_environment({"GRADWATCH_SPOOL": str(tmp_path)}))


def test_a_model_that_is_let_go_is_freed(tmp_path):
    (tmp_path / "spool").mkdir()
    (result,) = run_ranks("tests.training.lifetimes", 1, [str(tmp_path / "freed")], spool=tmp_path / "spool")
    assert "gradwatch:" not in result.output, result.output
    freed = json.loads((tmp_path / "freed").read_text())
    assert freed == dict.fromkeys(freed, True)
    assert len(freed) == 5


def test_what_trains_alone_is_freed_with_its_weights_bad_or_not(watcher):
    module = nn.Linear(2, 2)
    names = Names("Linear", name_parameters(module, module.parameters()))
    keys = {id(one): key for key, (one, _) in enumerate(names.parameters)}
    model = SingleModel(watcher, names, keys, device=CPU, root=0, before_telling=lambda: None)
    with torch.no_grad():
        module.weight.fill_(float("nan"))
    watcher.weights.wrapped(model)
    assert [one.name for one in model.weights.bad] == ["weight"]
    assert not watcher.fuses.counts
    there = weakref.ref(module.weight)
    del module, names
    gc.collect()
    assert there() is None


def test_a_new_parameter_with_the_identity_of_one_that_is_gone_is_followed(watcher):
    module, head = nn.Linear(2, 2), nn.Linear(2, 2)
    wrapped = WatchedModel(
        watcher, module, [*module.parameters()], device=CPU, root=0, wrapper="", group_size=1
    )
    watcher.models.append(wrapped)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    unowned = watcher.unowned
    unowned.given(optimizer)
    unowned.backward_begins([], None)
    before = unowned.model
    # As it is with one that was made since: it has no hook of ours.
    for _, handle in unowned._hooks.values():
        handle.remove()
    unowned.given(optimizer)
    unowned.backward_begins([], None)
    assert unowned.model is not before
    assert all(is_followed(one, unowned._hooks[id(one)][1]) for one in head.parameters())


@pytest.mark.parametrize("is_last", [True, False])
def test_a_model_that_goes_before_its_update_holds_no_later_round_up(watcher, is_last):
    """Also one whose backward pass an exception has left before all of it was reduced."""
    module = nn.Linear(2, 2)
    model = WatchedModel(
        watcher, module, [*module.parameters()], device=CPU, root=0, wrapper="", group_size=1
    )
    # An update has taken gradients that nobody had reduced: such are waited for.
    model.eager = True
    tally = watcher.round_log.tally
    model.look_before(Bucket(0, None, list), is_last=is_last)
    tally.rounds = 1
    assert tally.progress([], {})["round"] == 0, "it is waited for"
    watcher.depart(model)
    assert tally.progress([], {})["round"] == 1
