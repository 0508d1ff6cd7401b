"""Which checkpoint is gone back to, and why it is none of the others."""

from __future__ import annotations

import pytest

from gradwatch.collector.policy.checkpoints import choose, newer_than
from gradwatch.collector.policy.decision import Target, Unfit
from gradwatch.collector.policy.dossier import Checkpoint, Dossier, with_checkpoint
from tests.collector.policy.story import checkpoint

LEDGERS = [
    # (the ledger, the step of what is chosen with 100 the first bad step, why not the others)
    ("the newest", [checkpoint(10), checkpoint(90), checkpoint(50)], 90, []),
    ("the step before is old enough", [checkpoint(99), checkpoint(10)], 99, []),
    ("the first bad step is not", [checkpoint(100), checkpoint(10)], 10, [Unfit.TOO_NEW]),
    ("a poisoned one is not good", [checkpoint(90, finite=False), checkpoint(10)], 10, [Unfit.NONFINITE]),
    (
        "one that was not scanned is not",
        [checkpoint(90, finite=None), checkpoint(10)],
        10,
        [Unfit.NOT_SCANNED],
    ),
    ("a torn one is not", [checkpoint(90, complete=False), checkpoint(10)], 10, [Unfit.INCOMPLETE]),
    ("a deleted one is not", [checkpoint(90, gone=True), checkpoint(10)], 10, [Unfit.GONE]),
    ("nor what was bad before", [checkpoint(90, quarantined=True), checkpoint(10)], 10, [Unfit.QUARANTINED]),
    ("unknown is not good", [checkpoint(None), checkpoint(10)], 10, [Unfit.STEP_UNKNOWN]),
    ("step 0 is a step", [checkpoint(0)], 0, []),
    # Buffers: an attention mask is -inf from the start; a running variance is not.
    ("as ever", [checkpoint(10, bad_buffers=("mask",)), checkpoint(90, bad_buffers=("mask",))], 90, []),
    (
        "a new one",
        [checkpoint(10, bad_buffers=("mask",)), checkpoint(90, bad_buffers=("mask", "var"))],
        10,
        [Unfit.NONFINITE_BUFFER],
    ),
    (
        "the first good one counts, though it was deleted since",
        [checkpoint(5, bad_buffers=("mask",), gone=True), checkpoint(10, bad_buffers=("mask",))],
        10,
        [],
    ),
    (
        "the first good one counts, not the first",
        [
            checkpoint(5, bad_buffers=("var",), finite=False),
            checkpoint(10),
            checkpoint(20, bad_buffers=("var",)),
        ],
        10,
        [Unfit.NONFINITE_BUFFER],
    ),
    ("nothing", [], None, []),
]


@pytest.mark.parametrize(
    ("ledger", "step", "unfit"), [row[1:] for row in LEDGERS], ids=[row[0] for row in LEDGERS]
)
def test_choice(ledger: list[Checkpoint], step: int | None, unfit: list[Unfit]):
    choice = choose(ledger, 100)
    assert choice.target == (None if step is None else Target(f"/ckpts/{step}", step))
    assert [one.unfit for one in choice.passed_over] == unfit
    # The order in which they became known does not matter.
    assert choose(ledger[::-1], 100) == choice


def test_of_a_first_bad_step_that_is_not_known_nothing_is_old_enough():
    choice = choose([checkpoint(10)], None)
    assert choice.target is None
    assert choice.why_none == "/ckpts/10 is not known to be older than the first bad step"


def test_a_margin():
    ledger = [checkpoint(90), checkpoint(95)]
    assert choose(ledger, 100, 5).target == Target("/ckpts/90", 90)
    assert "less a margin of 10" in choose(ledger, 100, 10).why_none


def test_what_must_not_be_resumed_from():
    ledger = [
        checkpoint(10),
        checkpoint(50),
        # Newer, whatever else is known of it.
        checkpoint(60),
        checkpoint(70, complete=False),
        # It cannot be told that it is older.
        checkpoint(None, path="/ckpts/last", seen_at=checkpoint(50).seen_at + 1),
        # Older, for it was found before.
        checkpoint(None, path="/ckpts/init", seen_at=checkpoint(50).seen_at - 1),
        # Of the same step: as good, and not.
        checkpoint(50, path="/ckpts/best"),
        checkpoint(50, path="/ckpts/torn", complete=False),
        # Out of the way already.
        checkpoint(80, quarantined=True),
        checkpoint(90, gone=True),
    ]
    moved = newer_than(ledger, Target("/ckpts/50", 50))
    assert moved == ("/ckpts/last", "/ckpts/70", "/ckpts/60", "/ckpts/torn")


def test_a_path_that_is_saved_again_is_a_new_checkpoint():
    dossier = with_checkpoint(Dossier("j", checkpoints=(checkpoint(10, path="/ckpts/last"),)), checkpoint(5))
    dossier = with_checkpoint(dossier, checkpoint(20, path="/ckpts/last", finite=None))
    assert [(one.path, one.step) for one in dossier.checkpoints] == [("/ckpts/5", 5), ("/ckpts/last", 20)]
    assert choose(dossier.checkpoints, 100).target == Target("/ckpts/5", 5)
