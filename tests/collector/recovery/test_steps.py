"""Which step a checkpoint is of."""

from __future__ import annotations

import pytest

from gradwatch.collector.observations import CheckpointStep, StepSource
from gradwatch.collector.policy.dossier import Checkpoint
from gradwatch.collector.recovery.model import Save
from gradwatch.collector.recovery.steps import step_of

NAME, INNER = StepSource.NAME, StepSource.OPTIMIZER


def told(*steps: tuple[StepSource, int]) -> list[CheckpointStep]:
    return [CheckpointStep(source, step) for source, step in steps]


def line(path: str, step: int | None) -> Checkpoint:
    return Checkpoint(path, step, complete=True, finite=True)


CASES = [
    # A rank saved just there; the newest word counts.
    ("/c/last.pt", [], [Save("/c/last.pt", 10), Save("/c/last.pt", 20)], [], 20),
    # A file in the folder.
    ("/c/checkpoint-7", [(NAME, 7)], [Save("/c/checkpoint-7/model.safetensors", 8)], [], 8),
    # One whose name only begins alike is another.
    ("/c/step-1", [], [Save("/c/step-10/model.pt", 10)], [], None),
    # Saved into a buffer at the step that its name, or its content, tells.
    ("/c/epoch=0-step=30.ckpt", [(NAME, 30)], [Save("", 30)], [], 30),
    ("/c/a.ckpt", [(INNER, 30)], [Save("", 29), Save("", 30)], [], 30),
    # Saved under another name, and renamed.
    ("/c/step-30.pt", [(NAME, 30)], [Save("/c/step-30.pt.tmp", 30)], [], 30),
    # But what was saved into another checkpoint says nothing of this one.
    ("/c/b-30.pt", [(NAME, 30)], [Save("/c/a-1.pt", 30)], [line("/c/a-1.pt", 30)], None),
    # Name and content agree.
    ("/c/step-30.pt", [(INNER, 30), (NAME, 30)], [], [], 30),
    ("/c/epoch-3.pt", [(INNER, 30), (NAME, 3)], [], [], None),
    # A number alone proves nothing, unless it is the step in one that is named alike.
    ("/c/step-30.pt", [(NAME, 30)], [], [], None),
    ("/c/step-30.pt", [(NAME, 30)], [], [line("/c/step-20.pt", 20)], 30),
    ("/c/epoch-3.pt", [(NAME, 3)], [], [line("/c/epoch-2.pt", 200)], None),
]


@pytest.mark.parametrize(("path", "says", "saves", "ledger", "step"), CASES)
def test_a_step_is_known_for_a_reason(path, says, saves, ledger, step):
    assert step_of(path, told(*says), saves, ledger) == step
