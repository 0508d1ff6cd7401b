"""Trainings in several threads of one process end well, and are said not to be watched; one is watched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from gradwatch.agent.probe import training_thread
from gradwatch.agent.probe.training_thread import TrainingThread
from gradwatch.agent.probe.watcher import OF_ANOTHER_THREAD, OF_SEVERAL_THREADS
from tests.agent.test_bitwise import same_bits
from tests.agent.test_guard import POLICY
from tests.ranks import REPOSITORY
from tests.training.threads import BAD_STEP, STEPS


def run(folder, case, *, watched=True, **environment):
    """The states at the end, and the records."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("GRADWATCH_")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), **environment}
    spool = folder / "spool"
    spool.mkdir(parents=True)
    if watched:
        env["GRADWATCH_SPOOL"] = str(spool)
    command = [
        sys.executable,
        "-X",
        "faulthandler",
        "-m",
        "tests.training.threads",
        str(folder / "out"),
        case,
    ]
    done = subprocess.run(
        command, env=env, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "gradwatch:" not in done.stderr
    lines = [line for path in sorted(spool.glob("rank*.jsonl")) for line in path.read_text().splitlines()]
    return torch.load(folder / "out"), [json.loads(line) for line in lines]


def of(kind, records):
    return [record[kind] for record in records if kind in record]


@pytest.mark.parametrize("case", ["together", "each-its-own"])
def test_trainings_of_several_threads_end_well_and_are_said_not_to_be_watched(case, tmp_path):
    plain, _ = run(tmp_path / "plain", case, watched=False)
    for attempt in "123":
        watched, records = run(tmp_path / attempt, case)
        assert same_bits(watched, plain)
        assert [one["reason"] for one in of("unwatched", records)] == [OF_SEVERAL_THREADS]
        assert not of("nonfinite", records)
        assert not of("fault", records)


def test_a_training_that_moves_to_another_thread_is_watched(tmp_path):
    _, records = run(tmp_path, "moved")
    assert [one["step"] for one in of("nonfinite", records)[:1]] == [STEPS + BAD_STEP]
    assert not of("unwatched", records)


def test_a_wrapped_model_is_watched_while_another_thread_evaluates_it(tmp_path):
    _, records = run(tmp_path, "evaluated")
    assert [one["step"] for one in of("nonfinite", records)[:1]] == [BAD_STEP]
    assert not of("unwatched", records)


def test_a_wrapped_model_is_watched_while_another_thread_trains_its_own(tmp_path):
    plain, _ = run(tmp_path / "plain", "beside", watched=False)
    for attempt in "123":
        watched, records = run(tmp_path / attempt, "beside")
        assert same_bits(watched, plain)
        assert of("nonfinite", records)[0]["step"] == BAD_STEP
        assert {one["root"] for one in of("nonfinite", records)} == {0}
        assert [one["reason"] for one in of("unwatched", records)] == [OF_ANOTHER_THREAD]


def test_gradients_that_the_guard_holds_are_given_back_when_a_second_thread_trains(tmp_path):
    plain, _ = run(tmp_path / "plain", "held", watched=False)
    watched, records = run(tmp_path / "watched", "held", GRADWATCH_GUARD=POLICY)
    assert of("skipped", records)
    assert [one["reason"] for one in of("unwatched", records)] == [OF_SEVERAL_THREADS]
    assert all(
        watched[name].isnan().all() == plain[name].isnan().all()
        for name in plain
        if name.endswith("gradient")
    )
    assert all(watched[name].isfinite().all() for name in plain if name.endswith(".weight"))


# ---------------------------------------------------------------- whom it follows


def elsewhere(call, *args):
    """What a call gives in another thread, which has ended."""
    results = []
    thread = threading.Thread(target=lambda: results.append(call(*args)))
    thread.start()
    thread.join()
    return results[0]


@pytest.fixture
def told():
    return []


@pytest.fixture
def thread(told):
    return TrainingThread(
        lambda: True, lambda: told.append("off") or True, lambda: told.append("left"), lambda: None
    )


def test_the_second_thread_waits_for_the_look_that_is_under_way_in_the_first(thread, told):
    looking, seen = threading.Event(), threading.Event()

    def look():
        looking.set()
        seen.wait(10)
        told.append("looked")

    first = threading.Thread(target=thread.trains(look))
    first.start()
    looking.wait(10)
    others = [threading.Thread(target=thread.trains(lambda: told.append("never"))) for _ in "23"]
    for one in others:
        one.start()
    while told != ["off"]:
        time.sleep(0.001)
    time.sleep(0.02)
    assert all(one.is_alive() for one in others)
    seen.set()
    for one in [first, *others]:
        one.join()
    assert told == ["off", "looked", "left"]
    assert thread.off


def test_one_that_has_ended_makes_room(thread):
    trains, belongs = thread.trains(lambda: "told"), thread.belongs(lambda: "told")
    assert elsewhere(trains) == "told"
    assert trains() == belongs() == "told"
    # What goes with a training is none by itself.
    assert elsewhere(belongs) is None
    assert not thread.off


def test_an_update_in_another_thread_belongs_to_the_only_training(thread, told):
    trains, begins, over = (make(lambda: "told") for make in (thread.trains, thread.updates, thread.updated))
    assert trains() == elsewhere(begins) == elsewhere(over) == "told"
    assert told == []
    # A backward pass there is another training, and so are its updates.
    assert elsewhere(trains) is elsewhere(begins) is None
    assert told == ["off", "left"]


def test_where_nothing_is_watched_nobody_is_followed(told):
    thread = TrainingThread(lambda: False, lambda: told.append("off") or True, lambda: None, lambda: None)
    trains = thread.trains(lambda: "told")
    assert trains() == elsewhere(trains) == "told"
    assert told == []


def test_a_thread_of_autograds_is_no_second_one(thread, told, monkeypatch):
    trains = thread.trains(lambda: "told")
    trains()
    # A checkpoint's backward pass inside of that of a device.
    monkeypatch.setattr(
        training_thread, "in_backward", lambda: threading.main_thread() != threading.current_thread()
    )
    assert elsewhere(trains) == "told"
    assert told == []


def test_the_thread_of_a_wrapped_models_forward_pass_is_the_one_to_be_followed(thread, told):
    begun, over = threading.Event(), threading.Event()
    trains = thread.trains(lambda: "told")

    def train():
        trains()
        begun.set()
        over.wait(10)

    other = threading.Thread(target=train)
    other.start()
    begun.wait(10)
    thread.leads()
    assert trains() == "told"
    elsewhere(thread.leads)
    assert trains() == "told"
    assert told == []
    over.set()
    other.join()


def test_the_question_who_trains_costs_less_than_a_microsecond(thread):
    calls = [thread.trains(int), thread.belongs(int), thread.within(int)]
    for call in calls:
        call()

    def seconds(call):
        began = time.perf_counter()
        for _ in range(20_000):
            call()
        return time.perf_counter() - began

    # The best of several: the machine is shared.
    assert all(min(seconds(call) - seconds(int) for _ in range(10)) / 20_000 < 1e-6 for call in calls)
