"""A policy in plain sentences. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradwatch.collector.policy.model import (
    Action,
    Layout,
    Mode,
    Otherwise,
    Quarantine,
    ReadOut,
    Reflex,
    Scope,
)

if TYPE_CHECKING:
    import enum
    from collections.abc import Sequence

    from gradwatch.collector.policy.model import Budget, Guard, Match, Policy, Rule

_UNITS = ((86400, "day"), (3600, "hour"), (60, "minute"), (1, "second"))


def duration(seconds: float) -> str:
    """A duration in its largest whole unit."""
    whole = round(seconds)
    size, unit = next(
        ((size, unit) for size, unit in _UNITS if whole % size == 0 and whole >= size), _UNITS[-1]
    )
    # What a person writes as 24h is not read as 1 day.
    if (size, whole) == (86400, 86400):
        size, unit = 3600, "hour"
    return times(whole // size, unit)


def times(count: int, noun: str) -> str:
    """A number with its noun."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def conditions(match: Match) -> str:
    """What an incident must be like to match, to follow the word "when"."""
    parts: list[str] = []
    for name, words in (("cause", match.cause), ("phase", match.phase), ("value", match.value)):
        if words is not None:
            parts.append(f"the {name} is {_either([_word(word) for word in words])}")
    for name, patterns in (("node", match.node), ("parameter", match.parameter)):
        if patterns is not None:
            parts.append(f"the first {name} is {_either(patterns)}")
    numbers = {
        "the first bad step": match.step,
        "the first rank": match.rank,
        "the number of ranks that were first": match.origins,
        "the number of bad steps in a row": match.consecutive_bad_steps,
    }
    parts += [f"{what} is {comparison}" for what, comparison in numbers.items() if comparison is not None]
    if match.count is not None:
        within = "" if match.within_steps is None else f" within {times(match.within_steps, 'step')}"
        same = " of the same first rank" if match.same_rank else ""
        parts.append(f"the number of incidents{same}{within} is {match.count}")
    if match.guard_exhausted is not None:
        parts.append(f"the guard has {'' if match.guard_exhausted else 'not '}reached a limit")
    return " and ".join(parts) or "there is an incident"


def explain(policy: Policy) -> list[str]:
    """What the policy will do, a sentence a line."""
    dry = policy.mode is Mode.DRY_RUN
    lines = [
        "dry run: nothing is done; decisions say what would be"
        if dry
        else "enforced: decisions are performed",
        f"guard: {_guard(policy.guard, dry=dry)}",
        *_read_out(policy.guard),
        *(f"rule {index}, {rule.name}: {_rule(rule)}" for index, rule in enumerate(policy.rules)),
        "otherwise: nothing is done" if policy.rules else "there are no rules: nothing is ever decided",
    ]
    if any(rule.action is Action.ROLLBACK for rule in policy.rules):
        lines += _rollback(policy)
    return lines


def _guard(guard: Guard, *, dry: bool) -> str:
    if guard.on_nonfinite is Reflex.OFF:
        return "off"
    limits = [
        limit
        for count, limit in (
            (guard.max_consecutive, f"{guard.max_consecutive} in a row"),
            (guard.max_per_1000_steps, f"{guard.max_per_1000_steps} in 1000 steps"),
        )
        if count is not None
    ]
    reports = f"; after {' or '.join(limits)} it reports guard_exhausted" if limits else ""
    text = f"an update with non-finite gradients is skipped on every rank{reports}"
    return f"off in a dry run; enforced, {text}" if dry else text


def _read_out(guard: Guard) -> list[str]:
    if guard.read_out is ReadOut.WHEN_READY:
        return []
    return ["on a device: every update attempt waits for the look at its gradients, in a dry run too"]


def _rule(rule: Rule) -> str:
    does = {
        Action.IGNORE: "do nothing, and do not count the incident",
        Action.WARN: "say so, and let the job go on",
        Action.ROLLBACK: "go back to the newest good checkpoint",
        Action.HALT: "stop the job with exit code 93",
        Action.NONE: "do nothing",
    }[rule.action]
    without = ", without the node of the first rank" if rule.exclude_node else ""
    return f"when {conditions(rule.match)}, {does}{without}"


def _rollback(policy: Policy) -> list[str]:
    rollback = policy.rollback
    margin = f" less {times(rollback.margin_steps, 'step')}" if rollback.margin_steps else ""
    first_bad = f"the first bad step{margin}"
    layout = "" if policy.checkpoints is None else _layout(policy.checkpoints.layout)
    root = "" if policy.checkpoints is None else f" below {policy.checkpoints.root}{layout}"
    newer = {
        Quarantine.MOVE: "moved out of the way, never deleted",
        Quarantine.LEDGER: "left where they are, and remembered as bad",
    }[rollback.quarantine]
    skip = f"; the job is told to skip {_batches(rollback.skip_batches)}" if rollback.skip_batches else ""
    lines = [
        f"a rollback goes to the newest good checkpoint{root} that is older than {first_bad}",
        f"newer ones are {newer}{skip}",
        f"budgets, which must all allow it: {'; '.join(_budget(budget) for budget in policy.budgets)}",
        f"with a budget used up: {_otherwise(policy.on_budget_exhausted)}",
        f"with no good checkpoint: {_otherwise(policy.on_no_good_checkpoint)}",
    ]
    if policy.cooldown:
        lines.insert(2, f"cooldown: at least {duration(policy.cooldown)} from one rollback to the next")
    return lines


def _layout(layout: Layout) -> str:
    return "" if layout is Layout.AUTO else f" (layout {layout.value})"


def _budget(budget: Budget) -> str:
    window = "" if budget.per is None else f" in {duration(budget.per)}"
    what = {
        Scope.JOB: "of the job",
        Scope.SAME_FIRST_BAD_STEP: "for the same first bad step",
        Scope.NO_PROGRESS: "without a newer good checkpoint in between",
    }[budget.scope]
    return f"{times(budget.max, 'rollback')}{window} {what}"


def _otherwise(otherwise: Otherwise) -> str:
    return {
        Otherwise.HALT: "the job is stopped with exit code 93",
        Otherwise.WARN: "it is said, and the job goes on",
    }[otherwise]


def _either(words: Sequence[str]) -> str:
    return " or ".join(words)


def _word(word: enum.Enum) -> str:
    return str(word.value)


def _batches(count: int) -> str:
    return "1 batch" if count == 1 else f"{count} batches"
