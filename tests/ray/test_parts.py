"""The parts of the Ray integration that need no Ray."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from gradwatch.agent.checkpoints.find import find
from gradwatch.agent.checkpoints.listing import File, Listing
from gradwatch.agent.integrations.ray import policy
from gradwatch.agent.integrations.ray.budget import Budget
from gradwatch.agent.integrations.ray.told import news
from gradwatch.agent.integrations.ray.worker import registered_name, tell_of_reports, told_as
from gradwatch.agent.probe import ray_train


class WorkerGroupError(Exception):
    def __init__(self, *failures: object) -> None:
        self.worker_failures = dict(enumerate(failures))


class ControllerError(Exception):
    pass


class RestartingState:
    def __init__(self, error: Exception) -> None:
        self.training_failed_error = error


class RunningState:
    pass


def test_a_driver_is_told_of_our_callback_beside_those_it_has():
    environ = {ray_train.VARIABLE: "theirs.Callback"}
    ray_train.announce(environ)
    ray_train.announce(environ)
    assert environ == {ray_train.VARIABLE: f"theirs.Callback,{ray_train.CALLBACK}"}


@pytest.mark.parametrize(
    "found", [None, SimpleNamespace(origin=None), SimpleNamespace(origin="/none/ray.py")]
)
def test_where_no_ray_takes_it_nothing_is_said(found, monkeypatch):
    monkeypatch.setattr(ray_train.importlib.util, "find_spec", lambda _name: found)
    environ: dict[str, str] = {}
    ray_train.announce(environ)
    assert environ == {}


@pytest.mark.parametrize(
    ("allowed", "states", "left"),
    [
        (3, [], 3),
        (3, [RunningState(), RestartingState(WorkerGroupError(RuntimeError()))], 2),
        (3, [RestartingState(ControllerError())], 3),
        (3, [RestartingState(WorkerGroupError(SimpleNamespace(preempted=True)))], 3),
        (1, [RestartingState(WorkerGroupError()), RestartingState(WorkerGroupError())], 0),
        (-1, [RestartingState(WorkerGroupError())], None),
    ],
)
def test_how_often_ray_may_still_restart_the_workers(allowed, states, left):
    budget = Budget(allowed)
    for state in states:
        budget.state_changed(state)
    assert budget.left == left


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/s/run/checkpoint_1", "checkpoint_1"),
        ("/s/run/checkpoint_1/model.pt", "checkpoint_1"),
        ("/s/run", None),
        ("/s/other/checkpoint_1", None),
        ("/s/run2/checkpoint_1", None),
    ],
)
def test_a_path_is_that_of_a_registered_checkpoint(path, name):
    assert registered_name(path, "/s/run") == name


def test_what_a_run_needs_of_the_policy_that_its_script_gives(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text(
        "apiVersion: gradwatch/v1\nmode: enforce\nguard: {on_nonfinite: skip_step}\n"
        "checkpoints: {root: /ckpts, layout: dcp}\n"
    )
    found = policy.read(path)
    assert found["text"] == path.read_text()
    told = policy.variables(found)
    assert told["GRADWATCH_POLICY_HASH"] == found["policy_hash"]
    assert json.loads(told["GRADWATCH_GUARD"])["on_nonfinite"] == "skip_step"
    assert told["GRADWATCH_CHECKPOINTS_ROOT"] == "/ckpts"
    assert policy.sidecar_flags(found) == ("--checkpoints-root", "/ckpts", "--checkpoints-layout", "dcp")


def test_a_policy_of_a_script_that_is_wrong_is_refused_with_all_that_is_wrong(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text("apiVersion: gradwatch/v1\nmode: x\ncooldown: y\n")
    with pytest.raises(ValueError, match=r":2: mode: must be one of.*\n.*:3: cooldown"):
        policy.read(path)


def test_a_url_is_that_of_a_registered_checkpoint():
    assert registered_name("s3://bucket/exp/run/one/model.pt", "bucket/exp/run") == "one"
    assert registered_name("file:///exp/run/one", "/exp/run") == "one"
    assert registered_name("s3://other/exp/run/one", "bucket/exp/run") is None


@pytest.mark.parametrize(
    ("path", "root", "told"),
    [
        ("bucket/run/one", "s3://bucket/run", "s3://bucket/run/one"),
        ("bucket/run/one", "s3://bucket/", "s3://bucket/run/one"),
        ("bucket/running/one", "s3://bucket/run", "bucket/running/one"),
        ("/exp/run/one", "/exp/run", "/exp/run/one"),
        ("/exp/run/one", None, "/exp/run/one"),
    ],
)
def test_a_report_is_told_as_the_policy_names_the_storage(path, root, told):
    assert told_as(path, root) == told


def test_verdicts_and_refusals_of_this_run_are_told_once():
    incident = {"id": "i", "run": "r", "status": "confirmed", "verdict": ["Rank 1 was first.", "Bad data."]}
    decision = {
        "id": "d",
        "run": "r",
        "action": "rollback",
        "outcome": "refused",
        "reason": "why",
        "concluded": "no",
    }
    status = {
        "run": "r",
        "incidents": [
            incident,
            incident | {"id": "j", "status": "suspected"},
            incident | {"id": "k", "run": "q"},
        ],
        "decisions": [
            decision,
            decision | {"id": "e", "outcome": "performed"},
            decision | {"id": "f", "run": "q"},
        ],
    }
    document = json.dumps(status).encode()
    told, lines = news(document, frozenset())
    assert lines == ["incident i: Rank 1 was first. Bad data.", "rollback refused: why; no"]
    assert news(document, told) == (told, [])
    assert news(b"{", told) == (told, [])


def test_in_the_folder_of_a_ray_run_each_folder_is_one_checkpoint():
    names = ["checkpoint_manager_snapshot.json", "mine/model.pt", "mine/extra/optimizer.pt", "other/note.txt"]
    listing = Listing({f"run/{name}": File(1, 1) for name in names})
    (found,) = find(listing)
    assert (found.path, found.files) == ("run/mine", {"model.pt", "extra/optimizer.pt"})


def test_a_report_with_a_checkpoint_is_told_under_the_name_that_ray_gives_it():
    class Context:
        storage_context = SimpleNamespace(experiment_fs_path="/s/run")

        def report(self, metrics, checkpoint=None, *, name):
            return self._sync_checkpoint_dir_name_across_ranks(name)

        def _sync_checkpoint_dir_name_across_ranks(self, name):
            return f"checkpoint_{name}"

    context, told = Context(), []
    for _ in range(2):
        tell_of_reports(context, lambda path: told.append(path()))
    assert context.report({}, name="1") == "checkpoint_1"
    assert context.report({}, object(), name="2") == "checkpoint_2"
    assert told == ["/s/run/checkpoint_2"]
