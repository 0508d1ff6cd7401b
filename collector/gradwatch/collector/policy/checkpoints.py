"""Which checkpoint to go back to, and which then must not be resumed from. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradwatch.collector.policy.decision import PassedOver, Target, Unfit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradwatch.collector.policy.dossier import Checkpoint


# Where no step is known to be bad: above every step.
ANY_STEP = 1 << 62


@dataclass(frozen=True, slots=True)
class Choice:
    """The newest good checkpoint, if there is one, and why it is not another."""

    target: Target | None
    passed_over: tuple[PassedOver, ...]

    @property
    def why_none(self) -> str:
        """Why there is no target, as part of a sentence."""
        if not self.passed_over:
            return "no checkpoint is known"
        newest = self.passed_over[0]
        others = len(self.passed_over) - 1
        return f"{newest.path} {newest.why}" + (f", and {others} more are not good either" if others else "")


def choose(ledger: Sequence[Checkpoint], first_bad_step: int | None, margin_steps: int = 0) -> Choice:
    """The newest good checkpoint that is older than the first bad step less the margin.

    Good is complete, scanned and finite, not quarantined, and of a known step. What is not known is
    not good. A buffer that is not finite counts unless it was so in the first good checkpoint.

    Args:
        ledger: what is known of the job's checkpoints.
        first_bad_step: None when it is not known; then none is old enough.
        margin_steps: so many steps before it are not trusted either.
    """
    usual = _usual_buffers(ledger)
    passed_over: list[PassedOver] = []
    for checkpoint in _newest_first(ledger):
        unfit = _unfit(checkpoint, usual, first_bad_step, margin_steps)
        if unfit is None and checkpoint.step is not None:
            return Choice(Target(checkpoint.path, checkpoint.step), tuple(passed_over))
        if unfit is not None:
            passed_over.append(PassedOver(checkpoint.path, checkpoint.step, *unfit))
    return Choice(None, tuple(passed_over))


def newest_good(ledger: Sequence[Checkpoint]) -> Target | None:
    """The newest good checkpoint of all: what a job starts from when nothing is wrong."""
    return choose(ledger, ANY_STEP).target


def unfitness(
    ledger: Sequence[Checkpoint], first_bad_step: int | None
) -> list[tuple[Checkpoint, Unfit | None]]:
    """Each checkpoint with what keeps it from being good, the newest first."""
    usual = _usual_buffers(ledger)
    judged = ((one, _unfit(one, usual, first_bad_step, 0)) for one in _newest_first(ledger))
    return [(one, None if unfit is None else unfit[0]) for one, unfit in judged]


def newer_than(ledger: Sequence[Checkpoint], target: Target) -> tuple[str, ...]:
    """Paths of what a resume from the latest might take instead of the target, newest first.

    Of a checkpoint whose step is not known, when it was found tells which is newer.
    """
    found_at = next((one.seen_at for one in ledger if one.path == target.path), 0.0)
    usual = _usual_buffers(ledger)

    def is_newer(one: Checkpoint) -> bool:
        if one.quarantined or one.gone or one.path == target.path:
            return False
        if one.step is None:
            return one.seen_at >= found_at
        if one.step == target.step:
            return _unfit(one, usual, target.step + 1, 0) is not None
        return one.step > target.step

    return tuple(one.path for one in _newest_first(ledger) if is_newer(one))


def _newest_first(ledger: Sequence[Checkpoint]) -> list[Checkpoint]:
    """By step; those whose step is not known first, since they may be newer than all."""
    return sorted(
        ledger,
        key=lambda one: (one.step is None, -1 if one.step is None else one.step, one.seen_at, one.path),
        reverse=True,
    )


def _usual_buffers(ledger: Sequence[Checkpoint]) -> frozenset[str]:
    """The buffers that were not finite in the first checkpoint with nothing else against it."""
    known = [
        (one.step, one.seen_at, one.bad_buffers)
        for one in ledger
        if one.complete and one.finite and one.step is not None
    ]
    return frozenset(min(known)[2]) if known else frozenset()


def _unfit(
    checkpoint: Checkpoint, usual: frozenset[str], first_bad_step: int | None, margin_steps: int
) -> tuple[Unfit, str] | None:
    """Why the checkpoint is not good, if it is not."""
    strange = sorted(set(checkpoint.bad_buffers) - usual)
    step = checkpoint.step
    found: tuple[Unfit, str] | None = None
    if checkpoint.quarantined:
        found = Unfit.QUARANTINED, "is quarantined"
    elif checkpoint.gone:
        found = Unfit.GONE, "is no longer there"
    elif not checkpoint.complete:
        found = Unfit.INCOMPLETE, "is not complete"
    elif step is None:
        found = Unfit.STEP_UNKNOWN, "is of an unknown step"
    elif checkpoint.finite is None:
        found = Unfit.NOT_SCANNED, "is not scanned yet"
    elif not checkpoint.finite:
        found = Unfit.NONFINITE, "holds non-finite parameters or optimizer state"
    elif strange:
        found = Unfit.NONFINITE_BUFFER, f"holds a non-finite buffer, {strange[0]}, that was finite before"
    elif first_bad_step is None:
        found = Unfit.TOO_NEW, "is not known to be older than the first bad step"
    elif step >= first_bad_step - margin_steps:
        margin = f" less a margin of {margin_steps}" if margin_steps else ""
        found = (
            Unfit.TOO_NEW,
            f"is of step {step}, not older than the first bad step {first_bad_step}{margin}",
        )
    return found
