"""A job whose weights are poisoned goes back to its last good checkpoint, or stops and says why."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch

from tests.agent.test_bitwise import same_bits
from tests.cli.command import child_of, gradwatch, processes_with, until
from tests.e2e.jobs import Job
from tests.ranks import run_ranks
from tests.recovery import STANDALONE, Gate, Place, embedded, performed, write_policy

pytestmark = pytest.mark.e2e

# Update 14 poisons the weights, and the checkpoint that follows at once; 10 is the last good one.
FAULT = ["--bad-rank", 1, "--bad-step", 14]


class Healed:
    """A job of two ranks under a policy, in a folder of its own.

    Args:
        folder: for everything of it.
        script: more arguments of the training.
        policy: of `write_policy`.
    """

    def __init__(self, folder, *script, **policy):
        self.place = Place(folder)
        self.policy = write_policy(folder / "policy.yaml", self.place.checkpoints, **policy)
        self._command = [*STANDALONE, 2, *self.place.training(*script)]
        self.job = self.start()
        self._gate = Gate("healed", self.place.gate, embedded(folder / "state"))

    def start(self):
        """Start it, or start the same command again."""
        flags = ["--job", "healed", "--policy", self.policy]
        self.job = Job(self.place.folder, self._command, *flags)
        return self.job

    def __enter__(self):
        self._gate.__enter__()
        return self

    def __exit__(self, *_):
        self._gate.__exit__()
        self.job.kill()

    def finish(self):
        """Wait for its end; nothing of it may live on then."""
        result = self.job.finish()
        # A child whose parent was killed with the launcher takes a moment to notice.
        with contextlib.suppress(AssertionError):
            until(lambda: not processes_with(str(self.place.folder)), 10)
        assert [one.cmdline() for one in processes_with(str(self.place.folder))] == []
        return result


@pytest.fixture(scope="module")
def without_fault(tmp_path_factory):
    """The weights of a run that nothing happened to, and that nobody watched."""
    folder = tmp_path_factory.mktemp("without")
    run_ranks("tests.training.resumable", 2, ["--folder", str(folder), "--weights", str(folder / "weights")])
    return torch.load(folder / "weights")


def ends_as_if_nothing_had_happened(healed, without_fault):
    result = healed.finish()
    assert result.returncode == 0, result.stderr
    assert same_bits(torch.load(healed.place.weights), without_fault)
    for path in healed.place.checkpoints.glob("*.pt"):
        weights = torch.load(path)["model"].values()
        assert all(weight.isfinite().all() for weight in weights), f"{path} may be resumed, and is poisoned"
    return result, healed.job.report


def test_it_goes_back_and_ends_as_if_nothing_had_happened(tmp_path, without_fault):
    with Healed(tmp_path, *FAULT) as healed:
        _, report = ends_as_if_nothing_had_happened(healed, without_fault)
    (decision,) = report["decisions"]
    assert (decision["action"], decision["outcome"], decision["rule"]) == ("rollback", "performed", "go-back")
    assert decision["checkpoint"] == {"path": str(healed.place.checkpoints / "step-10.pt"), "step": 10}
    assert report["generations"] == 2
    assert [step for _, step in healed.place.beginnings] == [0, 10]
    assert healed.place.strikes == 1
    set_aside = healed.place.quarantined()
    assert "step-15.pt" in [path.name for path in set_aside]
    for path in set_aside:
        assert not all(weight.isfinite().all() for weight in torch.load(path)["model"].values())
    assert decided_again(healed) == [known(decision)]


def decided_again(healed):
    """What `policy test` says of the recorded run."""
    events = gradwatch("events", "healed", "--json", "--state-dir", healed.job.state_dir)
    recorded = healed.place.folder / "events.jsonl"
    recorded.write_text(events.stdout)
    tried = gradwatch("policy", "test", healed.policy, recorded, "--json")
    return [known(json.loads(line)) for line in tried.stdout.splitlines()]


def known(decision):
    """A decision without the time, which the next tick decides, and without what only a live run has."""
    return {key: value for key, value in decision.items() if key != "at"}


def test_it_goes_back_without_a_restart_when_the_script_says_how(tmp_path, without_fault):
    with Healed(tmp_path, *FAULT, "--in-process") as healed:
        _, report = ends_as_if_nothing_had_happened(healed, without_fault)
    (decision,) = performed(report)
    assert decision["in_process"]
    assert decision["checkpoint"]["step"] == 10
    assert report["generations"] == 2
    assert report["attempts"] == 1
    # It was never stopped, and nothing was moved.
    assert [step for _, step in healed.place.beginnings] == [0, 10]
    assert healed.place.quarantined() == []


def test_it_goes_back_once_though_collector_and_sidecar_are_killed_and_a_handler_saves_the_poison(
    tmp_path, without_fault
):
    # The third bad update in a row, so that there is something to be killed in the middle of.
    with Healed(tmp_path, *FAULT, "--on-sigterm", "save", match='{consecutive_bad_steps: ">=3"}') as healed:
        until(lambda: healed.place.strikes, 150)
        for name in ("collector", "sidecar"):
            child = child_of(healed.job.process.pid, name)
            if child is not None:
                child.kill()
        _, report = ends_as_if_nothing_had_happened(healed, without_fault)
    assert len(performed(report)) == 1
    assert report["generations"] == 2
    assert [step for _, step in healed.place.beginnings] == [0, 10]
    assert any(path.stem.endswith("-at-sigterm") for path in healed.place.quarantined())


def test_it_goes_back_when_the_command_dies_of_it_by_itself(tmp_path, without_fault):
    with Healed(tmp_path, *FAULT, "--crash") as healed:
        _, report = ends_as_if_nothing_had_happened(healed, without_fault)
    (decision,) = performed(report)
    assert decision["checkpoint"]["step"] == 10
    assert report["generations"] == 2


def test_it_goes_back_when_the_launcher_is_killed_and_the_same_command_is_started_again(
    tmp_path, without_fault
):
    with Healed(tmp_path, *FAULT) as healed:
        until(lambda: healed.place.strikes, 150)
        healed.job.process.kill()
        healed.job.process.communicate(timeout=60)
        healed.start()
        _, report = ends_as_if_nothing_had_happened(healed, without_fault)
    assert len(performed(report)) <= 1
    assert [step for _, step in healed.place.beginnings] == [0, 10]


def test_a_job_that_fails_again_in_the_same_step_is_halted_by_its_budget(tmp_path):
    with Healed(tmp_path, *FAULT, "--bad-when", "always") as healed:
        result = healed.finish()
    report = healed.job.report
    assert (result.returncode, report["ended_by"]) == (93, "halted")
    assert any("same_first_bad_step" in line for line in result.ours), result.stderr
    assert len(performed(report)) == len(performed(report, "halt")) == 1
    assert healed.place.strikes == 2
    assert not healed.place.weights.exists()


def test_without_a_good_checkpoint_the_job_is_halted_with_the_reason(tmp_path):
    with Healed(tmp_path, "--bad-rank", 1, "--bad-step", 3, "--save-every", 4) as healed:
        result = healed.finish()
    assert (result.returncode, healed.job.report["ended_by"]) == (93, "halted")
    assert any("no good checkpoint" in line for line in result.ours), result.stderr
    assert performed(healed.job.report) == []
    # What is left there is still there, for people to look at.
    assert healed.place.checkpoints.joinpath("step-4.pt").exists()
