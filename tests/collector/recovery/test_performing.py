"""A rollback, step by step, and what becomes of it when somebody is killed."""

from __future__ import annotations

import pytest

from gradwatch.collector.books import Books
from gradwatch.collector.model import CloseReason
from gradwatch.collector.observations import CheckpointRoot, CommandStarted, LaunchStarted, TaskDone, TaskKind
from gradwatch.collector.policy.decision import Outcome
from gradwatch.collector.policy.model import Action
from gradwatch.collector.recovery.model import Phase
from gradwatch.collector.recovery.orders import Verb, order_for, task_for
from gradwatch.collector.recovery.perform import LAUNCHERS_SECONDS
from tests.collector.history import batch
from tests.collector.recovery.world import ROOT, World

POLICY = """
apiVersion: gradwatch/v1
mode: enforce
rules: [{name: any, match: {}, action: rollback}]
checkpoints: {root: /ckpts}
"""


def poisoned(hosts: int = 1, text: str = POLICY, *, can_load: bool | None = None) -> World:
    """A job that has a good checkpoint of step 5 and a poisoned one of step 8."""
    world = World.under(text, hosts)
    world.can_load = can_load
    for host in world.hosts:
        world.launch(host)
    world.settle()
    assert world.training == 0
    world.train(5)
    world.save(f"{ROOT}/5")
    world.look_after()
    world.train(1)
    world.train(1, bad_rank=hosts - 1)
    world.train(1)
    world.save(f"{ROOT}/8")
    return world


def test_a_job_goes_back_to_its_newest_good_checkpoint():
    world = poisoned()
    world.settle()
    (decision,) = world.decisions
    assert (decision.action, decision.outcome) == (Action.ROLLBACK, Outcome.PERFORMED)
    assert decision.checkpoint is not None
    assert (decision.checkpoint.path, decision.checkpoint.step) == (f"{ROOT}/5", 5)
    assert world.resumed == [(0, None), (1, f"{ROOT}/5")]
    assert [*world.quarantine] == [f"{ROOT}/8"]
    assert world.state.jobs["j"].generation == 1
    assert world.training == 1
    (incident,) = world.state.incidents.values()
    assert incident.close_reason is CloseReason.ROLLBACK


def controlled(no_restart: str = "") -> World:
    """A job whose workers a framework's controller starts, within a command of `gradwatch run`."""
    world = World.under(POLICY, 1)
    launcher = LaunchStarted("j", 0, "outer", "n0", 1, ("python", "train.py"), "hash")
    world.tell(batch("launch-outer", 0, launcher, CommandStarted("j", 0, "outer")))
    (controller,) = world.hosts
    controller.controls, controller.no_restart = True, no_restart
    world.launch(controller)
    world.settle()
    world.train(5)
    world.save(f"{ROOT}/5")
    world.look_after()
    world.train(1)
    world.train(1, bad_rank=0)
    world.train(1)
    world.save(f"{ROOT}/8")
    return world


def test_the_controller_of_a_framework_is_ordered_and_not_the_launcher_around_it():
    world = controlled()
    assert order_for(world.state, world.dossier, "outer") is None
    world.settle()
    assert world.resumed == [(0, None), (1, f"{ROOT}/5")]
    # Its workers fail before they save again, and the framework restarts them in any case.
    world.train(1)
    world.crash()
    world.settle()
    assert world.resumed[2:] == [(2, f"{ROOT}/5")]
    assert order_for(world.state, world.dossier, "outer") is None


def test_workers_that_a_framework_restarts_by_itself_are_not_rolled_back():
    world = World.under("apiVersion: gradwatch/v1\nrules: []\n", 1)
    world.hosts[0].controls = True
    world.launch(world.hosts[0])
    world.settle()
    world.train(2)
    world.train(1, bad_rank=0)
    world.crash()
    world.settle()
    assert world.resumed == [(0, None), (1, None)]
    (incident,) = world.state.incidents.values()
    assert incident.close_reason is CloseReason.ATTEMPT_OVER


def test_nothing_is_stopped_that_the_framework_would_not_start_again():
    world = controlled(no_restart="max_failures is 0")
    world.settle()
    (decision,) = world.decisions
    assert decision.outcome is Outcome.REFUSED
    assert "max_failures" in (decision.concluded or "")
    assert world.training == 0


def test_all_of_it_is_in_the_audit_trail():
    world = poisoned()
    world.settle()
    trail = [(entry.what, entry.about) for entry in world.entries]
    id_ = world.decisions[0].id
    told = ["decided", "stopping", "stopped", "quarantining", "performed"]
    assert [what for what, about in trail if about == id_] == told
    assert trail[0] == ("pinned", None)


def test_the_same_word_twice_changes_nothing():
    once, twice = poisoned(), World.under(POLICY)
    twice.twice = True
    twice.launch(twice.hosts[0])
    twice.settle()
    twice.train(5)
    twice.save(f"{ROOT}/5")
    twice.look_after()
    twice.train(1)
    twice.train(1, bad_rank=0)
    twice.train(1)
    twice.save(f"{ROOT}/8")
    once.settle()
    twice.settle()
    assert once.resumed == twice.resumed
    assert len(twice.decisions) == 1


def test_what_a_handler_of_sigterm_saves_is_looked_at_and_set_aside():
    world = poisoned()
    world.saves_when_told = True
    world.settle()
    assert world.resumed[-1] == (1, f"{ROOT}/5")
    assert f"{ROOT}/sigterm-8" in world.quarantine


def test_every_launcher_is_waited_for():
    world = poisoned(hosts=2)
    first, second = world.hosts
    world.obey(first)
    assert world.dossier.recovery is not None
    assert world.dossier.recovery.phase is Phase.STOPPING
    assert world.obey(first) is None
    world.obey(second)
    assert world.dossier.recovery.phase is Phase.SCANNING
    world.settle()
    assert world.training == 1


def test_a_launcher_that_was_killed_takes_part_once_it_is_started_again():
    world = poisoned(hosts=2)
    first, second = world.hosts
    world.obey(first)
    world.kill_launcher(second)
    world.settle()
    assert world.training is None
    world.wait(30)
    world.launch(second)
    world.settle()
    assert world.training == 1
    assert [path for _, path in world.resumed[-2:]] == [f"{ROOT}/5"] * 2
    assert len(world.performed()) == 1


def test_a_launcher_that_never_comes_back_halts_the_job():
    world = poisoned(hosts=2)
    first, second = world.hosts
    world.obey(first)
    world.kill_launcher(second)
    world.wait(LAUNCHERS_SECONDS - 5)
    world.settle()
    assert world.hosts[0].command == "stopped"
    world.wait(10)
    world.settle()
    assert first.ended_with == 93
    (decision,) = world.decisions
    assert decision.outcome is Outcome.FAILED
    assert "n1" in (decision.concluded or "")


@pytest.mark.parametrize("after", range(5))
def test_a_collector_that_is_killed_at_any_point_goes_on(after: int):
    world = poisoned()
    for _ in range(after):
        world.obey(world.hosts[0])
        world.kill_collector()
        world.look_after()
        world.kill_collector()
    world.settle()
    assert world.resumed == [(0, None), (1, f"{ROOT}/5")]
    assert len(world.performed()) == 1


@pytest.mark.parametrize("after", range(4))
def test_a_launcher_that_is_killed_at_any_point_and_started_again_starts_from_the_pin(after: int):
    world = poisoned()
    for _ in range(after):
        world.obey(world.hosts[0])
        world.look_after()
    world.kill_launcher(world.hosts[0])
    world.launch(world.hosts[0])
    world.settle()
    assert world.resumed[-1] == (1, f"{ROOT}/5")
    assert len(world.performed()) == 1
    assert world.training == 1


def test_the_pin_survives_a_second_crash_before_the_first_new_checkpoint():
    world = poisoned()
    world.settle()
    world.train(1)
    world.crash()
    world.settle()
    assert world.hosts[0].ended_with == 1
    world.launch(world.hosts[0])
    world.settle()
    assert world.resumed[-1] == (1, f"{ROOT}/5")


def test_a_command_that_dies_of_it_is_rolled_back_too():
    world = World.under(POLICY)
    world.launch(world.hosts[0])
    world.settle()
    world.train(5)
    world.save(f"{ROOT}/5")
    world.look_after()
    world.train(1)
    world.crash(at_a_nan=True)
    world.settle()
    assert world.resumed[-1] == (1, f"{ROOT}/5")


def test_a_command_that_dies_of_something_else_is_released():
    world = World.under(POLICY)
    world.launch(world.hosts[0])
    world.settle()
    world.train(5)
    world.crash()
    order = order_for(world.state, world.dossier, world.hosts[0].launch)
    assert order is not None
    assert order.verb is Verb.RELEASE
    world.settle()
    assert world.hosts[0].ended_with == 1


def test_without_a_good_checkpoint_the_job_halts():
    world = World.under(POLICY)
    world.launch(world.hosts[0])
    world.settle()
    world.train(2, bad_rank=0)
    world.settle()
    assert world.hosts[0].ended_with == 93
    (decision,) = world.decisions
    assert (decision.action, decision.outcome) == (Action.ROLLBACK, Outcome.FAILED)
    assert "no checkpoint is known" in (decision.concluded or "")


def test_a_checkpoint_that_was_not_looked_at_yet_is_found_once_the_job_is_stopped():
    world = World.under(POLICY)
    world.launch(world.hosts[0])
    world.settle()
    world.train(5)
    world.save(f"{ROOT}/5")
    world.train(1)
    world.train(1, bad_rank=0)
    world.settle()
    assert world.resumed[-1] == (1, f"{ROOT}/5")


def test_a_good_checkpoint_that_was_deleted_meanwhile_is_not_gone_back_to():
    world = poisoned()
    del world.disk[f"{ROOT}/5"]
    world.settle()
    assert world.hosts[0].ended_with == 93
    (decision,) = world.decisions
    assert decision.outcome is Outcome.FAILED
    assert "there is no good checkpoint" in (decision.concluded or "")


def test_a_root_that_nobody_can_read_halts_the_job():
    world = poisoned()
    host = world.hosts[0]
    world._sidecar_says(host, CheckpointRoot("j", 0, "n0", ROOT, "Permission denied", host.launch))
    world.settle()
    assert host.ended_with == 93
    assert "Permission denied" in (world.decisions[0].concluded or "")


@pytest.mark.parametrize(
    ("errors", "warned"),
    [
        (("Permission denied", "Permission denied"), True),
        # Another sidecar can.
        (("Permission denied", ""), False),
        # Before the first save.
        (("No such file or directory", "No such file or directory"), False),
    ],
)
def test_a_root_that_no_sidecar_can_read_is_said_before_it_is_needed(errors, warned):
    world = World.under(POLICY, 2)
    for host, error in zip(world.hosts, errors, strict=True):
        world.launch(host)
        world._sidecar_says(host, CheckpointRoot("j", 0, host.name, ROOT, error, host.launch))
    warnings = Books(world.dossiers).of_job(world.state.jobs["j"])["warnings"]
    told = "a rollback has nowhere to go: Permission denied, on n0; Permission denied, on n1"
    assert warnings == ([told] if warned else [])


def test_a_quarantine_that_fails_halts_the_job():
    world = poisoned()
    host = world.hosts[0]
    world.obey(host)
    world.look_after()
    (id_,) = [one.id for one in world.decisions]
    assert world.dossier.recovery is not None
    assert world.dossier.recovery.phase is Phase.QUARANTINING
    world._sidecar_says(host, TaskDone(id_, TaskKind.QUARANTINE, "No space left on device", ()))
    world.settle()
    assert host.ended_with == 93
    assert "No space left on device" in (world.decisions[0].concluded or "")
    assert world.quarantine == {}


def test_an_answer_to_another_task_is_passed_over():
    world = poisoned()
    host = world.hosts[0]
    world.obey(host)
    world._sidecar_says(host, TaskDone("another", TaskKind.SCAN, "", ()))
    world._sidecar_says(host, TaskDone(world.decisions[0].id, TaskKind.QUARANTINE, "", ()))
    assert world.dossier.recovery is not None
    assert world.dossier.recovery.phase is Phase.SCANNING


def test_a_launcher_without_a_policy_is_left_alone():
    world = poisoned()
    launch = world.hosts[0].launch
    job = world.state.jobs["j"]
    assert job.launches[launch].obeys
    assert order_for(world.state, world.dossier, "nobody") is None
    assert task_for(world.state, world.dossier, "nobody") is None


def test_a_dry_run_orders_nothing():
    world = poisoned(text=POLICY.replace("enforce", "dry_run"))
    world.settle()
    assert world.training == 0
    assert [one.outcome for one in world.decisions] == [Outcome.DRY_RUN]
    assert world.quarantine == {}


def test_a_flapping_job_halts_and_names_the_budget():
    world = poisoned()
    for _ in range(8):
        world.settle()
        if world.training is None:
            break
        world.train(1)
        world.train(2, bad_rank=0)
    assert world.hosts[0].ended_with == 93
    assert "the budget" in world.decisions[-1].reason
    assert len(world.performed()) >= 2


def test_ranks_that_can_load_go_back_without_a_restart():
    world = poisoned(hosts=2, can_load=True)
    world.settle()
    assert [host.command for host in world.hosts] == ["running", "running"]
    assert [host.generation for host in world.hosts] == [0, 0]
    assert world.training == 1
    (decision,) = world.decisions
    assert (decision.outcome, decision.in_process) == (Outcome.PERFORMED, True)
    assert world.state.jobs["j"].generation == 1
    # Nothing is moved while the command runs, but what is bad is known.
    assert f"{ROOT}/8" in world.disk
    assert world.quarantine == {}


def test_a_rank_that_cannot_load_has_the_job_restarted():
    world = poisoned(hosts=2, can_load=False)
    world.settle()
    assert world.resumed[-1] == (1, f"{ROOT}/5")
    assert [*world.quarantine] == [f"{ROOT}/8"]
    (decision,) = world.decisions
    assert (decision.outcome, decision.in_process) == (Outcome.PERFORMED, False)
    assert "disk on fire" in next(entry.text for entry in world.entries if entry.what == "not loaded")


def test_ranks_that_do_not_answer_are_restarted():
    world = poisoned(hosts=2, can_load=True)
    world.look_after()
    assert world.dossier.recovery is not None
    assert world.dossier.recovery.phase is Phase.LOADING
    world.wait(LAUNCHERS_SECONDS + 1)
    world.settle()
    assert world.resumed[-1] == (1, f"{ROOT}/5")
    assert not world.decisions[0].in_process


def test_a_job_that_went_back_in_process_is_restarted_the_next_time_if_it_must_be():
    world = poisoned(hosts=2, can_load=True)
    world.settle()
    world.train(3)
    world.can_load = False
    world.train(1, bad_rank=0)
    world.settle()
    assert world.resumed[-1] == (2, f"{ROOT}/5")
    assert [host.generation for host in world.hosts] == [2, 2]
    # Marked while the command ran, and moved now.
    assert [*world.quarantine] == [f"{ROOT}/8"]


def test_a_crash_after_a_load_in_process_is_a_crash():
    world = poisoned(can_load=True)
    world.settle()
    world.train(1)
    world.crash()
    world.settle()
    assert world.hosts[0].ended_with == 1
