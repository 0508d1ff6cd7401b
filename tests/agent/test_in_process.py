"""A replay in the training process itself leaves no trace of itself."""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from gradwatch.agent.probe.autopsy.borrowed import NotLendableError, borrowed
from gradwatch.agent.probe.autopsy.capsule import Capsules
from gradwatch.agent.probe.autopsy.in_process import in_process
from gradwatch.agent.probe.autopsy.replay import Case

HOST = torch.device("cpu")


class Busy(nn.Module):
    """Changes all that a forward pass can change of a module, and draws all kinds of random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.GRU(4, 4, batch_first=True)  # keeps its parameters in a list, too
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.5)
        self.last = nn.Linear(4, 2)
        self.tied = self.last.weight
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.count = 0
        self.seen = []
        self.cache = torch.zeros(3)
        self.write_cache = False

    def forward(self, values):
        self.count += 1
        self.calls += 1
        self.seen.append(values.shape)
        self.newest = values
        random.random()
        np.random.rand()  # noqa: NPY002 - what old models draw from
        if self.write_cache:
            self.cache += 1
        hidden, _ = self.recurrent(values[:, None])
        kept = torch.tensor([1.0, 2.0]).mul_(2.0)
        return (
            self.last(self.dropout(self.norm(hidden[:, 0]))) * kept
            + (hidden * (values[0, 0] - 1)).abs().sqrt().sum()
        )


def made():
    torch.manual_seed(3)
    return Busy()


def case_of(module, values):
    """What the probe would keep of a pass."""
    capsule = Capsules().begin((values,), {}, [values], None, list)
    output = module(values)
    Capsules().entered(capsule, [(0, 0)], [torch.ones_like(output)])
    return Case(module, capsule, lambda: list(module.parameters()), None)


def everything_of(module):
    state = {name: value.clone() for name, value in module.state_dict().items()}
    hooks = [len(one._forward_hooks) + len(one._forward_pre_hooks) for one in module.modules()]
    identities = [
        [(name, id(value)) for name, value in vars(one).items() if name not in {"_parameters", "count"}]
        + [(name, id(value)) for name, value in one.named_parameters(recurse=False)]
        + [(name, id(value), value._version) for name, value in one.named_buffers(recurse=False)]
        for one in module.modules()
    ]
    random_numbers = (random.getstate(), torch.get_rng_state(), np.random.get_state())  # noqa: NPY002
    rest = (module.count, list(module.seen), list(module.recurrent._flat_weights), module.newest)
    gradients = [parameter.grad for parameter in module.parameters()]
    return state, hooks, identities, random_numbers, rest, gradients


def equal(one, other):
    if isinstance(one, (torch.Tensor, np.ndarray)):
        return one.shape == other.shape and bool((one == other).all())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and not isinstance(one, torch.Size):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def test_a_replay_leaves_no_trace():
    module = made()
    fired = []
    module.last.bias.register_post_accumulate_grad_hook(fired.append)
    module.last.bias.register_hook(fired.append)
    case = case_of(module, torch.ones(3, 4))
    fired.clear()
    before = everything_of(module)
    told = in_process(case, HOST, seconds=60)
    # The slope of a square root at 0; `count` is not.
    assert (told["replay"], told["operator"]) == ("REPLAY_REPRODUCED", "aten.div.Tensor")
    assert equal(before, everything_of(module))
    assert not fired


def test_the_random_numbers_are_those_of_the_pass():
    module = made()
    values = torch.full((3, 4), 2.0)
    case = case_of(module, values)
    outputs = []
    module.register_forward_hook(lambda _module, _args, output: outputs.append(output.detach().clone()))
    torch.manual_seed(99)
    assert in_process(case, HOST, seconds=60) == {"replay": "REPLAY_FINITE"}
    torch.set_rng_state(case.capsule.rng.host)
    module.norm.reset_running_stats()
    module(values)
    assert equal(*outputs)


def test_what_the_training_goes_on_with_is_not_written_to():
    module = made()
    case = case_of(module, torch.ones(3, 4))
    module.write_cache = True
    told = in_process(case, HOST, seconds=60)
    assert told["replay"] == "REPLAY_NOT_DONE"
    assert told["reason"] == "aten.add_.Tensor would change a tensor that the training goes on with"
    assert equal(module.cache, torch.zeros(3))


def test_it_ends_in_time():
    told = in_process(case_of(made(), torch.ones(3, 4)), HOST, seconds=-1)
    assert (told["replay"], told["reason"]) == ("REPLAY_NOT_DONE", "it took too long")


def test_hooks_that_change_gradients_are_not_taken_to_be_harmless():
    module = made()
    module.last.bias.register_hook(lambda gradient: gradient / 0)
    told = in_process(case_of(module, torch.full((3, 4), 2.0)), HOST, seconds=60)
    assert told["reason"] == "hooks on its parameters change their gradients, and are not run again"


def test_a_module_that_cannot_be_put_back_is_not_replayed():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(nn.Linear(4, 2))
    told = in_process(case_of(nn.Sequential(scripted), torch.ones(3, 4)), HOST, seconds=60)
    assert "scripted module" in told["reason"]
    with pytest.raises(NotLendableError), borrowed(scripted):
        pass


def test_an_exception_leaves_no_trace():
    module = made()
    case = case_of(module, torch.ones(3, 4))
    before = everything_of(module)

    def interrupted(*_):
        raise KeyboardInterrupt

    handle = module.last.register_forward_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        in_process(case, HOST, seconds=60)
    handle.remove()
    assert equal(before, everything_of(module))
