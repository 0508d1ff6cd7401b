"""Frameworks' own scripts with their ordinary resume recover under the same policy file."""

from __future__ import annotations

import pytest
import torch

from tests.agent.test_bitwise import same_bits
from tests.cli.command import processes_with
from tests.e2e.jobs import Job
from tests.recovery import STANDALONE, Gate, Place, embedded, performed, write_policy

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

# Both save every 4 updates: update 11 poisons the checkpoint of step 12.
FAULT = ["--bad-rank", 1, "--bad-step", 11]


@pytest.mark.parametrize(
    ("module", "resume", "good", "poisoned", "operator"),
    [
        ("with_lightning", ["--ckpt", "{resume}"], "epoch=1-step=8.ckpt", "epoch=2-step=12.ckpt", None),
        # It looks for its latest checkpoint itself: what is poisoned must be out of its sight.
        ("with_trainer", [], "checkpoint-8", "checkpoint-12", None),
        ("with_fsdp2", ["--resume", "{resume}"], "step-8", "step-12", "aten.log.default"),
    ],
)
def test_it_recovers_from_a_poisoned_step(module, resume, good, poisoned, operator, tmp_path):
    place, reference = Place(tmp_path), Place(tmp_path / "reference")
    policy = write_policy(tmp_path / "policy.yaml", place.checkpoints)

    def job(where, *script):
        command = [*STANDALONE, 2, "-m", f"tests.training.{module}", *where.arguments(*resume, *script)]
        return Job(where.folder, command, "--job", "healed", "--policy", policy)

    healed = job(place, *FAULT)
    with Gate("healed", place.gate, embedded(healed.state_dir)):
        try:
            result = healed.finish()
        finally:
            healed.kill()
    assert result.returncode == 0, result.stderr
    assert not processes_with(str(tmp_path))
    (decision,) = performed(healed.report)
    assert decision["checkpoint"] == {"path": str(place.checkpoints / good), "step": 8}
    assert healed.report["generations"] == 2
    assert [one["first"]["operator"] for one in healed.report["incidents"]] == [operator]
    assert place.strikes == 1
    assert any(poisoned in str(path) for path in place.quarantined())

    undisturbed = job(reference)
    assert undisturbed.finish().returncode == 0
    assert undisturbed.report["decisions"] == []
    assert same_bits(torch.load(place.weights), torch.load(reference.weights))
