"""The parameters around the place where a backward pass went bad."""

from __future__ import annotations

from types import SimpleNamespace

from gradwatch.collector.boundary import boundary, boundary_of


def parameter(name):
    return {"name": name, "module": name.rpartition(".")[0], "module_class": "Linear"}


MODEL = [parameter(f"layers.{layer}.weight") for layer in range(10)]


def bad(layer, position):
    return parameter(f"layers.{layer}.weight") | {
        "parameter": f"layers.{layer}.weight",
        "value": "nan",
        "count": 3,
        "numel": 9,
        "backward_position": position,
    }


def report(*gradients, total=None):
    return {"gradients": list(gradients), "gradients_total": len(gradients) if total is None else total}


def test_bad_gradients_are_in_the_order_of_their_arrival_after_their_clean_neighbours():
    found = boundary(2, [report(bad(4, 5), bad(6, 3)), report(bad(5, 4))], MODEL)
    assert [(one.name, one.state, one.backward_position) for one in found.parameters] == [
        ("layers.9.weight", "clean", None),
        ("layers.8.weight", "clean", None),
        ("layers.7.weight", "clean", None),
        ("layers.6.weight", "bad", 3),
        ("layers.5.weight", "bad", 4),
        ("layers.4.weight", "bad", 5),
    ]
    assert [one.first for one in found.parameters] == [False] * 3 + [True] + [False] * 2
    assert (found.rank, found.clean_before, found.bad, found.total) == (2, 3, 3, 10)
    (said,) = found.missing
    assert "in the order of the model" in said


def test_only_the_nearest_clean_ones_are_shown():
    found = boundary(0, [report(bad(1, 8))], MODEL)
    assert [one.name for one in found.parameters] == [f"layers.{layer}.weight" for layer in (5, 4, 3, 2, 1)]


def test_what_was_counted_and_not_listed_is_said():
    found = boundary(0, [report(bad(9, 0), total=40)], MODEL)
    assert found.bad == 40
    assert found.missing[0].startswith("39 more bad gradients")


def test_what_is_not_known_is_said():
    assert boundary(None, [], MODEL).missing == ["No rank is known to have been first."]
    assert "no gradient of its own" in boundary(1, [], MODEL).missing[0]
    found = boundary(0, [report(bad(9, None))], [])
    assert found.clean_before is None
    assert len(found.missing) == 2


def test_before_the_gradient_that_arrived_first_nothing_is_shown_as_clean():
    # Of a model whose order is not that of its backward pass.
    found = boundary(0, [report(bad(4, 0))], MODEL)
    assert [(one.name, one.state) for one in found.parameters] == [("layers.4.weight", "bad")]
    found = boundary(0, [report(bad(4, 1))], MODEL)
    assert [one.state for one in found.parameters] == ["clean", "bad"]


def test_nobody_is_called_clean_while_bad_ones_are_not_listed():
    found = boundary(0, [report(bad(4, 5), total=3)], MODEL)
    assert {one.state for one in found.parameters[:-1]} == {"unknown"}
    assert found.missing[0].startswith("2 more bad gradients")


def test_only_that_round_and_that_model_count():
    first = SimpleNamespace(rank=1, round=7, microbatch=0)
    said = [
        {"root": "gan.d", "round": round_, "microbatch": microbatch} | report(bad(layer, 0))
        for round_, microbatch, layer in ((6, 0, 2), (7, 0, 4), (7, 1, 5))
    ]
    models = [{"root": "gan.d", "parameters": MODEL}, {"root": "gan.g", "parameters": [parameter("other")]}]
    found = boundary_of(first, said, models)
    assert [one.name for one in found.parameters if one.state == "bad"] == ["layers.4.weight"]
    assert (found.rank, found.total) == (1, len(MODEL))
    assert boundary_of(None, [], models).missing == ["No rank is known to have been first."]
