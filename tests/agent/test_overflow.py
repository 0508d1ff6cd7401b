"""Which gradients are too large for an optimizer's second moment, and what it does with them."""

from __future__ import annotations

import math

import pytest
import torch

from gradwatch.agent.probe.overflow import could_overflow, keeps_squares, overflow_in

KEEPERS = {
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "RMSprop": torch.optim.RMSprop,
    "Adagrad": torch.optim.Adagrad,
}
MOMENTS = ("exp_avg_sq", "square_avg", "sum")


class OwnAdam(torch.optim.AdamW):
    """Derived from one that is known."""


def moment_after(optimizer, parameter):
    optimizer.step()
    state = optimizer.state[parameter]
    return next(state[name] for name in MOMENTS if name in state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("make", [*KEEPERS.values(), OwnAdam])
@pytest.mark.parametrize(("share", "over"), [(0.97, False), (1.03, True)])
def test_the_moment_overflows_where_it_is_said_to(make, dtype, share, over):
    parameter = torch.nn.Parameter(torch.ones(3, dtype=dtype))
    optimizer = make([parameter], foreach=False)
    parameter.grad = torch.tensor([0.0, math.inf, 0.0], dtype=dtype).nan_to_num(posinf=torch.finfo(dtype).max)
    known = overflow_in(optimizer)
    assert known.parameter is parameter
    parameter.grad = torch.tensor([1.0, -share * known.limit, 0.0], dtype=dtype)
    assert (overflow_in(optimizer) is not None) == over
    assert could_overflow(optimizer, share * known.limit) == over
    assert bool(moment_after(optimizer, parameter).isinf().any()) == over


def test_what_squares_nothing_has_no_limit():
    parameter = torch.nn.Parameter(torch.ones(1))
    parameter.grad = torch.full((1,), 1e38)
    for make in (torch.optim.SGD, torch.optim.Adamax):
        assert overflow_in(make([parameter])) is None
        assert not keeps_squares(make([parameter]))
    assert keeps_squares(torch.optim.Adam([parameter]))


def test_what_is_not_finite_is_another_matter():
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([math.inf, math.nan])
    assert overflow_in(torch.optim.Adam([parameter])) is None


def test_the_one_furthest_over_its_limit_is_named_and_the_scale_is_divided_by():
    small, large = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    optimizer = torch.optim.Adam([{"params": [small]}, {"params": [large], "betas": (0.9, 0.0)}])
    small.grad, large.grad = torch.full((1,), 1e22), torch.full((1,), 2e21)
    over = overflow_in(optimizer)
    assert over.parameter is large, "its limit is lower"
    assert over.limit == pytest.approx(math.sqrt(torch.finfo(torch.float32).max))
    assert over.parameters == {id(small), id(large)}
    assert overflow_in(optimizer, scale=50.0).parameters == {id(large)}
    assert overflow_in(optimizer, scale=1e6) is None
