"""Which weights are bad, since when, and whether an update has made them so."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from gradwatch.agent.probe.inspection.optimizer_evidence import evidence_in, settings_of
from gradwatch.agent.probe.inspection.taken import Taken
from tests.agent.test_guard import POLICY
from tests.ranks import run_ranks
from tests.training.updates import BAD_STEP, CASES, STEPS

NAN, INF = float("nan"), float("inf")


def journals(folder, *cases, **environment):
    """By rank, the records of each case: its name is the batch of each."""
    folder.mkdir(exist_ok=True)
    results = run_ranks("tests.training.updates", 2, cases, spool=folder, **environment)
    assert not any("gradwatch:" in one.output for one in results), results[0].output
    ranks = []
    for path in sorted(folder.glob("rank*.jsonl")):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        assert not any("fault" in record for record in records), records
        told = {case: [] for case in cases}
        for record in records:
            for kind, body in record.items():
                if kind in {"weights", "nonfinite", "skipped", "reduced"}:
                    told[json.loads(body.get("batch", json.dumps(cases[0])))].append((kind, body))
        ranks.append(told)
    assert len(ranks) == 2
    return ranks


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    return journals(tmp_path_factory.mktemp("updates") / "spool", *CASES)


def of_kind(records, kind):
    return [body for known, body in records if known == kind]


# name: (evidence, step, weights that are bad, gradients that are, what else is told)
TOLD = {
    "normalised": ("GRADIENTS", BAD_STEP, [], ["0.weight", "2.weight"], {"optimizer": "SGD"}),
    "exchanged": ("GRADIENTS", BAD_STEP, [], ["2.bias"], {"learning_rate": 0.01, "finite_step": 1}),
    "closure": ("GRADIENTS", BAD_STEP, [], ["0.bias"], {"optimizer": "SGD"}),
    "epsilon": ("EPSILON", 0, ["0.weight"], [], {"optimizer": "Adam", "eps": 1e-8, "learning_rate": 1e-3}),
    # Seen when the next gradients are bad: the update was the one before.
    "state": ("STATE", BAD_STEP + 1, ["2.weight"], [], {"optimizer": "SGD", "finite_step": 1}),
    # Nothing shows that it was an update.
    "overwritten": (None, BAD_STEP + 1, ["2.weight"], [], {"finite_step": 1}),
    "poisoned_checkpoint": (None, BAD_STEP + 1, ["2.weight"], [], {"finite_step": 1}),
    "bad_batch": (None, BAD_STEP + 1, ["0.weight", "0.bias", "2.weight", "2.bias"], [], {}),
    "uninitialised": (None, 0, ["2.bias"], [], {"initial": True}),
}


@pytest.mark.parametrize("case", TOLD)
def test_weights_that_go_bad_are_told_of_once_and_what_shows_that_an_update_did_it(told, case):
    kind, step, weights, gradients, more = TOLD[case]
    for rank in told:
        (record,) = of_kind(rank[case], "weights")
        assert record.get("evidence") == (kind and f"UPDATE_EVIDENCE_{kind}"), record
        assert record["step"] == step
        assert [one["parameter"] for one in record["weights"]][: len(weights)] == weights
        assert [one["parameter"] for one in record.get("gradients", [])] == gradients
        assert more.items() <= record.items(), record
        assert record.get("initial", False) == ("initial" in more)


def test_the_weight_that_is_bad_is_named_with_its_value_and_count(told):
    (record,) = of_kind(told[0]["uninitialised"], "weights")
    assert record["weights"] == [{"parameter": "2.bias", "value": "VALUE_NAN", "count": 1, "numel": 3}]
    first = of_kind(told[0]["uninitialised"], "nonfinite")[0]
    assert first["bad_weights"] == record["weights"]
    assert (first["weights_finite"], first["bad_weights_total"], first["model_step"]) == (False, 1, 0)


@pytest.mark.parametrize("case", ["loaded_later", "clipped"])
def test_of_weights_that_stay_finite_nothing_is_told(told, case):
    assert [rank[case] for rank in told] == [[], []]


def test_a_rank_with_finite_weights_says_so_and_one_that_was_made_bad_too(told):
    (first,) = (one for one in of_kind(told[1]["bad_batch"], "nonfinite") if one["step"] == BAD_STEP)
    assert (first["weights_finite"], first["model_step"], first["weights_finite_step"]) == (True, 3, 3)
    later = of_kind(told[0]["bad_batch"], "nonfinite")[0]
    assert (later["weights_finite"], later["model_step"], later["phase"]) == (False, 4, "PHASE_PARAMETER")


# ---------------------------------------------------------------- gradients that nobody has reduced

# name: (phase, the gradient that arrived first)
UNREDUCED = {
    "penalty": (None, "2.weight"),
    "by_hand": ("PHASE_INPUT", "2.bias"),
    "bare_head": (None, "head.bias"),
}


@pytest.mark.parametrize("case", UNREDUCED)
def test_a_gradient_that_nobody_reduces_is_the_ranks_own(told, case):
    phase, parameter = UNREDUCED[case]
    first = of_kind(told[1][case], "nonfinite")[0]
    assert (first["step"], first["model_step"], first["source"]) == (BAD_STEP, BAD_STEP, "gradient")
    assert (first.get("phase"), first["gradients"][0]["parameter"]) == (phase, parameter)
    assert first["weights_finite"]
    # Before anybody has averaged: the other rank sees it one update later, in its weights.
    others = of_kind(told[0][case], "nonfinite")
    assert all(one["model_step"] > BAD_STEP and not one["weights_finite"] for one in others)
    assert not any(record.get("evidence") for rank in told for record in of_kind(rank[case], "weights"))


def test_what_is_wrapped_later_is_watched_by_its_wrapper(told):
    (first,) = (one for one in of_kind(told[1]["wrapped_later"], "nonfinite") if one.get("weights_finite"))
    assert (first["source"], first["model_step"]) == ("ddp-bucket", BAD_STEP)


def test_two_optimizers_of_one_round_are_one_step(told):
    first = of_kind(told[1]["two_optimizers"], "nonfinite")[0]
    assert (first["step"], first["model_step"]) == (BAD_STEP, BAD_STEP)


# ---------------------------------------------------------------- the guard


def test_the_guard_skips_an_update_with_changed_gradients_if_all_ranks_see_it(tmp_path):
    ranks = journals(tmp_path / "spool", "normalised", GRADWATCH_GUARD=POLICY)
    for rank in ranks:
        assert [kind for kind, _ in rank["normalised"]] == ["weights", "skipped"]
        assert of_kind(rank["normalised"], "skipped")[0]["step"] == BAD_STEP


@pytest.mark.parametrize("case", ["one_rank_edits", "each_rank_edits_another"])
def test_it_skips_on_no_rank_if_not_all_see_it(case, tmp_path):
    ranks = journals(tmp_path / "spool", case, GRADWATCH_GUARD=POLICY)
    skipped = [sorted({one["step"] for one in of_kind(rank[case], "skipped")}) for rank in ranks]
    # The next gradients are bad on all of them, and then all skip.
    assert skipped == [list(range(BAD_STEP + 1, STEPS))] * 2


# ---------------------------------------------------------------- parts


def test_only_gradients_that_were_changed_are_looked_at_again():
    gradients = [torch.ones(2), torch.ones(2), torch.ones(2)]
    taken = Taken()
    assert taken.changed(gradients) == [0, 1, 2]
    taken.remember(gradients)
    assert taken.changed(gradients) == []
    gradients[1].mul_(2)
    gradients[2] = gradients[2] * 2
    assert taken.changed(gradients) == [1, 2]
    taken.refresh(gradients, {id(gradients[1])})
    assert taken.changed(gradients) == [1, 2], "one of them may be bad"
    taken.refresh(gradients, {id(one) for one in gradients})
    assert taken.changed(gradients) == []
    assert taken.changed(gradients[:1]) == []
    taken.forget()
    assert taken.changed(gradients[:1]) == [0]


def weight(*values, dtype=torch.float32):
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def adam(parameter, moment, **options):
    optimizer = torch.optim.Adam([parameter], **options)
    zeros = torch.zeros_like(parameter)
    optimizer.state[parameter] = {"exp_avg": zeros, "exp_avg_sq": moment, "step": torch.tensor(3.0)}
    return optimizer


HALF = torch.float16
# what it is: (weights, dtype, second moment, eps, evidence)
EVIDENCE = {
    "0 divided by 0": ((NAN, 1.0), HALF, (0.0, 1.0), 1e-8, "EPSILON"),
    "by no eps at all": ((INF, 1.0), torch.float32, (0.0, 1.0), 0.0, "EPSILON"),
    "eps is not 0 in this dtype": ((NAN, 1.0), torch.float32, (0.0, 1.0), 1e-8, None),
    "the 0 is elsewhere": ((NAN, 1.0), HALF, (1.0, 0.0), 1e-8, None),
    "the moment is bad": ((NAN, 1.0), HALF, (INF, 0.0), 1e-8, "STATE"),
}


@pytest.mark.parametrize("name", EVIDENCE)
def test_what_an_optimizers_state_shows(name):
    values, dtype, moment, eps, kind = EVIDENCE[name]
    parameter = weight(*values, dtype=dtype)
    found = evidence_in(adam(parameter, torch.tensor(moment, dtype=dtype), eps=eps), [parameter])
    assert (found and found.kind) == (kind and f"UPDATE_EVIDENCE_{kind}")


def test_an_optimizer_that_has_not_taken_it_shows_nothing():
    parameter, other = weight(NAN), weight(1.0)
    assert evidence_in(adam(other, torch.tensor([NAN])), [parameter]) is None
    assert evidence_in(torch.optim.SGD([parameter], lr=0.1), [parameter]) is None


def test_settings_are_told_as_far_as_they_are_numbers():
    parameter = weight(1.0)
    group = {"params": [parameter], "lr": torch.tensor(0.5), "eps": (1e-30, 1e-3)}
    assert settings_of(torch.optim.SGD([parameter]), group) == {"optimizer": "SGD", "learning_rate": 0.5}
