"""How many rollbacks there were, as each budget counts them. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradwatch.collector.policy.decision import Outcome, Spent
from gradwatch.collector.policy.model import Action, Mode, Scope
from gradwatch.collector.policy.sentences import duration, times

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradwatch.collector.policy.decision import Decision, Target
    from gradwatch.collector.policy.model import Budget, Policy


def rollbacks(decisions: Sequence[Decision], mode: Mode) -> list[Decision]:
    """The rollbacks that count: in a dry run those too that only would have been."""
    return [
        one
        for one in decisions
        if one.action is Action.ROLLBACK
        and one.outcome is not Outcome.REFUSED
        and (one.outcome is not Outcome.DRY_RUN or mode is Mode.DRY_RUN)
    ]


def spent(
    policy: Policy,
    decisions: Sequence[Decision],
    first_bad_step: int | None,
    target: Target | None,
    now: float,
) -> tuple[Spent, ...]:
    """Where each budget stands.

    Args:
        policy: holds the budgets.
        decisions: all of the job.
        first_bad_step: of the incident for which a rollback is due.
        target: where it would go back to.
        now: in seconds since the epoch.
    """
    past = rollbacks(decisions, policy.mode)
    return tuple(
        Spent(budget.scope, _used(budget, past, first_bad_step, target, now), budget.max, budget.per)
        for budget in policy.budgets
    )


def said(spent: Spent) -> str:
    """Why an exhausted budget allows no more: a sentence without its end."""
    what = {
        Scope.JOB: "of this job",
        Scope.SAME_FIRST_BAD_STEP: "for the same first bad step",
        Scope.NO_PROGRESS: "without a newer good checkpoint in between",
    }[spent.scope]
    window = "" if spent.per is None else f" in {duration(spent.per)}"
    return (
        f"the budget {spent.scope.value} is used up: "
        f"{times(spent.used, 'rollback')} {what}{window}, and {spent.max} allowed"
    )


def _used(
    budget: Budget, past: Sequence[Decision], first_bad_step: int | None, target: Target | None, now: float
) -> int:
    counted = [one for one in past if budget.per is None or one.at > now - budget.per]
    if budget.scope is Scope.SAME_FIRST_BAD_STEP:
        return sum(one.first_bad_step == first_bad_step for one in counted)
    return _since_progress(counted, target) if budget.scope is Scope.NO_PROGRESS else len(counted)


def _since_progress(past: Sequence[Decision], target: Target | None) -> int:
    """The rollbacks since the job first was sent back to its newest good checkpoint so far.

    There is progress when it can be sent back to a newer one than ever; a job that falls from one
    checkpoint to an older and comes back to the first has made none.
    """
    steps = [-1 if one.checkpoint is None else one.checkpoint.step for one in past]
    if not steps or (target is not None and target.step > max(steps)):
        return 0
    return len(steps) - steps.index(max(steps))
