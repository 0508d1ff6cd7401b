"""The step counts update attempts, as a person would."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gradwatch.agent.probe.steps import Attempts, StepClock
from tests.ranks import run_ranks
from tests.training.dry_steps import STEPS
from tests.training.own_optimizer import BAD_STEP


class FakeAttempt:
    """An optimizer, as far as the clock looks at one."""

    def __init__(self, *parameters):
        self.param_groups = [{"params": list(parameters)}]
        self.state = {}


@pytest.fixture
def weight():
    return torch.nn.Parameter(torch.zeros(2))


def attempt(clock, optimizer, inside=()):
    clock.enter(optimizer, optimizer)
    for other in inside:
        attempt(clock, other)
    clock.leave(optimizer, optimizer)


def test_only_the_optimizer_of_the_watched_model_counts(weight):
    clock = StepClock()
    clock.follow([weight])
    attempt(clock, FakeAttempt(torch.nn.Parameter(torch.zeros(1))))
    assert clock.step == 0
    attempt(clock, FakeAttempt(weight))
    assert clock.step == 1


def test_nested_steps_count_once(weight):
    # A ZeroRedundancyOptimizer fires the hooks of its inner optimizer as well.
    clock = StepClock()
    clock.follow([weight])
    attempt(clock, FakeAttempt(weight), inside=[FakeAttempt(weight), FakeAttempt(weight)])
    assert clock.step == 1


def test_a_gradscaler_that_skips_is_an_attempt(weight):
    # It never calls the optimizer's step then.
    clock = StepClock()
    clock.follow([weight])
    scaler, optimizer = object(), FakeAttempt(weight)
    clock.enter(scaler, optimizer)
    clock.leave(scaler, optimizer)
    assert clock.step == 1


def test_a_step_left_by_an_exception_does_not_stop_the_count(weight):
    clock = StepClock()
    clock.follow([weight])
    optimizer = FakeAttempt(weight)
    clock.enter(optimizer, optimizer)  # and never left
    attempt(clock, optimizer)
    attempt(clock, optimizer)
    assert clock.step == 2


# name: (attempts by optimizer, "-" for a new round; how many updates that is)
UPDATES = {
    "one optimizer, each round": ("a-a-a", 3),
    "two optimizers of each round": ("ab-ab-ab", 3),
    "in any order": ("ab-ba-b-a", 4),
    "one of them only every second round": ("ab-a-ab-a", 4),
    "the same again without a round": ("aaa", 3),
    "both again without a round": ("abab", 2),
    "rounds without an update": ("a---a", 2),
}


@pytest.mark.parametrize("name", UPDATES)
def test_what_several_optimizers_do_in_one_round_is_one_update(weight, name):
    history, updates = UPDATES[name]
    clock, attempts = StepClock(), Attempts()
    clock.follow([weight])
    optimizers = {letter: FakeAttempt(weight) for letter in "ab"}
    for letter in history:
        if letter == "-":
            clock.new_round()
            attempts.new_round()
        else:
            attempt(clock, optimizers[letter])
            attempts.add(optimizers[letter])
    assert (clock.step, attempts.count) == (updates, updates)


def test_a_job_that_has_not_opened_its_checkpoint_counts_from_0(weight):
    clock = StepClock(resume_step=100)
    clock.follow([weight])
    clock.resumes(False)
    assert clock.step == 0
    clock.resumes(True)
    assert clock.step == 100


def test_or_from_the_step_that_its_optimizer_has_loaded(weight):
    clock, optimizer = StepClock(resume_step=100), loaded(weight, 40)
    clock.follow([weight])
    clock.state_loaded(optimizer)
    clock.resumes(False)
    assert clock.step == 40


def test_the_users_own_step_stands_over_that_too(weight):
    clock = StepClock(resume_step=100)
    clock.set_step(7)
    clock.resumes(False)
    assert clock.step == 7


def loaded(weight, step):
    optimizer = FakeAttempt(weight)
    optimizer.state = {weight: {"step": torch.tensor(float(step))}}
    return optimizer


def test_a_loaded_optimizer_state_says_where_the_count_stands(weight):
    clock = StepClock()
    clock.follow([weight])
    clock.state_loaded(loaded(weight, 40))
    assert clock.step == 40


def test_also_when_it_was_loaded_before_the_model_was_wrapped(weight):
    clock = StepClock()
    optimizer = loaded(weight, 40)
    clock.state_loaded(optimizer)
    clock.follow([weight])
    assert clock.step == 40


def test_the_launchers_resume_step_stands_over_the_optimizers(weight):
    clock = StepClock(resume_step=100)
    clock.follow([weight])
    clock.state_loaded(loaded(weight, 40))
    assert clock.step == 100


def test_the_users_own_step_stands_over_all(weight):
    clock = StepClock(resume_step=100)
    clock.set_step(7)
    optimizer = FakeAttempt(weight)
    clock.follow_optimizer(optimizer)
    attempt(clock, optimizer)
    assert clock.step == 8


def test_an_optimizer_that_the_user_has_chosen_counts_whatever_it_updates(weight):
    clock, chosen = StepClock(), FakeAttempt(torch.nn.Parameter(torch.zeros(1)))
    clock.follow([weight])
    clock.follow_optimizer(chosen)
    for optimizer in (chosen, FakeAttempt(weight), chosen):
        attempt(clock, optimizer)
    assert clock.step == 3


def test_a_step_that_only_makes_an_optimizers_state_is_none(tmp_path):
    # torch.distributed.checkpoint takes one before the model has run, and at every save with plain SGD.
    spool = tmp_path / "spool"
    spool.mkdir()
    results = run_ranks("tests.training.dry_steps", 2, [str(tmp_path)], spool=spool)
    assert not any("gradwatch:" in result.output for result in results), results[0].output
    journals = sorted(spool.glob("rank*.jsonl"))
    assert len(journals) == 2
    records = [json.loads(line) for journal in journals for line in journal.read_text().splitlines()]
    assert not any("unwatched" in record for record in records)
    saves = [record["checkpoint"] for record in records if "checkpoint" in record]
    assert {(Path(save["path"]).name, save["step"]) for save in saves} == {
        (f"step-{step}", step) for step in range(1, STEPS + 1)
    }


def test_updates_by_an_optimizer_that_is_none_of_torchs_show_by_the_weights(tmp_path):
    spool = tmp_path / "spool"
    spool.mkdir()
    results = run_ranks("tests.training.own_optimizer", 2, spool=spool)
    assert not any("gradwatch:" in result.output for result in results), results[0].output
    journals = sorted(spool.glob("rank*.jsonl"))
    records = [[json.loads(line) for line in journal.read_text().splitlines()] for journal in journals]
    found = [[record["nonfinite"] for record in rank if "nonfinite" in record] for rank in records]
    first = next(one for one in found[1] if one["source"] == "ddp-bucket")
    assert (first["step"], first["model_step"], first["round"]) == (BAD_STEP, BAD_STEP, 2 * BAD_STEP)
    # The other rank's second pass adds to what the first one's reduction gave.
    assert (found[0][0]["step"], found[0][0]["round"]) == (BAD_STEP, 2 * BAD_STEP + 1)
