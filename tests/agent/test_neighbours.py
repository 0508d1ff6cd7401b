"""All that DistributedDataParallel is used with: the fault is named, and nothing breaks."""

from __future__ import annotations

import json

import pytest
import torch

from gradwatch.agent.probe.fuses import Fuses
from gradwatch.agent.probe.look import HostLook
from gradwatch.agent.probe.outputs import Outputs
from gradwatch.agent.probe.passes import Pass, Passes, origin_of
from tests.agent.test_guard import POLICY
from tests.ranks import run_ranks
from tests.training.neighbours import CASES

T, F, U = True, False, None


@pytest.fixture(scope="module", params=["host", "device"])
def told(request, tmp_path_factory):
    """What each rank journalled of each case in the order of rounds; and what rank 0 noted."""
    folder = tmp_path_factory.mktemp("neighbours")
    spool = folder / "spool"
    spool.mkdir()
    notes = folder / "notes"
    results = run_ranks(
        "tests.training.neighbours", 2, [str(notes), request.param], spool=spool, GRADWATCH_GUARD=POLICY
    )
    assert not any("gradwatch:" in result.output for result in results), results[1].output
    ranks = [{}, {}]
    for journal in spool.glob("rank*.jsonl"):
        records = [json.loads(line) for line in journal.read_text().splitlines()]
        hello = records[0]["hello"]
        if hello["framework"] == "single":
            # Both were alone for a step; one of them was that first.
            assert (hello["rank"], hello["world_size"]) == (0, 1)
            continue
        assert (hello["world_size"], hello["duplicate_claim"]) == (2, False)
        bad = [record["nonfinite"] for record in records if "nonfinite" in record]
        for one in sorted(bad, key=lambda one: one["round"]):
            ranks[hello["rank"]].setdefault(json.loads(one["batch"]), []).append(one)
        skips = [record["skipped"] for record in records if "skipped" in record]
        ranks[hello["rank"]]["skipped"] = [skip["round"] for skip in skips]
        # A skip is of a step of which something was told.
        if hello["rank"] == 1:
            assert {skip["step"] for skip in skips} <= {one["step"] for one in bad}
    return ranks, json.loads(notes.read_text())


@pytest.mark.parametrize("name", CASES)
def test_the_fault_is_named(told, name):
    ranks, notes = told
    _, *expected = CASES[name]
    for records, said in zip(ranks, reversed(expected), strict=True):
        if said is None:
            assert name not in records
            continue
        first = records[name][0]
        phase, parameter = said
        assert first.get("phase") == phase
        assert {record["microbatch"] for record in records[name]} == {0}
        assert parameter in {None, first["gradients"][0]["parameter"]}
    assert "doesn't have any parameter that requires a gradient" in notes["untrainable"]


def test_the_guard_reaches_a_sharded_optimizer(told):
    assert told[1]["zero_equal"] is True


def test_ranks_skip_together(told):
    (zero, one), _ = told
    # Under join() rank 0 had no update to skip.
    assert set(zero["skipped"]) == set(one["skipped"]) - {one_["round"] for one_ in one["joined"]}


def test_two_models_in_one_backward_pass_have_rounds_of_their_own(told):
    (_, one), _ = told
    for name in ("together", "chain-input"):
        of = {record["round"]: record["root"] for record in one[name]}
        assert len(of) == len(set(of.values())) == 2
        assert max(of) == min(of) + 1


# ---------------------------------------------------------------- what another model has made


def test_what_a_model_made_is_known_by_its_memory():
    outputs, one, other = Outputs(), Pass(), Pass()
    made, more = torch.ones(3, 2), torch.ones(2)
    outputs.made(one, [made])
    outputs.made(other, [more])
    assert outputs.maker(made.detach()[0]) == (True, one)
    assert outputs.maker(more) == (True, other)
    assert outputs.maker(made + 1) == (False, None)
    made.detach()[0] = 2.0
    assert outputs.maker(made) == (True, None), "the script has written to it"
    assert outputs.maker(torch.ones(2, 2).to_sparse()) == (False, None)


def test_what_a_model_made_is_forgotten_with_its_memory():
    outputs, one = Outputs(), Pass()
    for _ in range(1000):
        outputs.made(one, [torch.ones(2)])
    assert len(outputs._made) <= 2
    kept = [torch.ones(1) for _ in range(1000)]
    outputs.made(one, kept)
    assert len(outputs._made) == 256
    assert (outputs.maker(kept[0]), outputs.maker(kept[-1])) == ((False, None), (True, one))


@pytest.mark.parametrize(
    ("makers", "phase"),
    [
        # inputs, output, the model's own parameters
        ([(F, F, T)], "PHASE_INPUT"),
        ([(F, F, U)], "PHASE_INPUT"),
        ([(T, F, F)], "PHASE_PARAMETER"),
        ([(T, F, T)], "PHASE_FORWARD"),
        ([(T, F, U)], None),
        # The script has made it so, or another model of several.
        ([(T, T, T)], None),
        ([], None),
        ([(T, T, T), (T, F, T)], "PHASE_FORWARD"),
        ([(F, F, T), (T, F, T)], None),
    ],
)
def test_a_bad_input_began_where_it_was_made(makers, phase):
    known = tuple(Pass(None, inputs, output, own=own) for inputs, output, own in makers)
    one = Pass(None, T, F, F, backward=0, handed=F, makers=known)
    assert origin_of([one], parameters=True).phase == phase
    further = Pass(None, T, F, F, backward=0, handed=F, makers=(one,))
    assert origin_of([further], parameters=True).phase == phase
    given = Pass(None, F, F, F, backward=0, handed=F, makers=known)
    assert origin_of([given], parameters=True).phase == "PHASE_INPUT"


def test_a_chain_of_passes_has_an_end():
    outputs = Outputs()
    passes = Passes(HostLook().fact, lambda: 0, Fuses(), [].append, list)
    hidden = torch.full((1,), float("nan"))
    for _ in range(100):
        one = passes.entered((hidden,), {}, None, outputs, lambda: True)
        hidden = hidden + 1
        passes.left(one, hidden, outputs)
        assert one.chain <= 8
