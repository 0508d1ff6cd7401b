"""All settings of a policy file, with what they take and their defaults."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from gradwatch.collector.policy.model import (
    API_VERSION,
    DEFAULT_BUDGETS,
    Action,
    Checkpoints,
    Guard,
    Layout,
    Mode,
    Otherwise,
    Policy,
    Quarantine,
    ReadOut,
    Reflex,
    Rollback,
    Scope,
)

if TYPE_CHECKING:
    import enum
    from collections.abc import Collection


class Setting(NamedTuple):
    """A key of the file; `[]` after a key of a list."""

    name: str
    takes: str
    default: str
    meaning: str


def _words(kind: type[enum.Enum], without: Collection[enum.Enum] = ()) -> str:
    return ", ".join(f"`{member.value}`" for member in kind if member not in without)


def _word(default: enum.Enum) -> str:
    return f"`{default.value}`"


def _number(default: int | None) -> str:
    return "no limit" if default is None else str(default)


REQUIRED = "required"
_DEFAULTS = Policy()

SETTINGS = (
    Setting("apiVersion", f"`{API_VERSION}`", REQUIRED, "the version of these keys"),
    Setting(
        "mode",
        _words(Mode),
        _word(_DEFAULTS.mode),
        "in a dry run nothing is done, the guard is off, and decisions say what would be",
    ),
    Setting("guard", "a section", "the defaults below", "what each rank does at once"),
    Setting(
        "guard.on_nonfinite",
        _words(Reflex),
        _word(Guard().on_nonfinite),
        "skip an update whose reduced gradients are not finite",
    ),
    Setting(
        "guard.max_consecutive",
        "from 1 on",
        _number(Guard().max_consecutive),
        "skips in a row at which `guard_exhausted` is reported; it goes on skipping",
    ),
    Setting(
        "guard.max_per_1000_steps",
        "1 to 1000",
        _number(Guard().max_per_1000_steps),
        "skips in 1,000 steps, likewise",
    ),
    Setting(
        "guard.read_out",
        _words(ReadOut),
        _word(Guard().read_out),
        "on a device: when a rank knows what it has seen. With `every_step` each update attempt waits for it, so that "
        "a bad pass can be replayed also without a guard; also in a dry run",
    ),
    Setting("rules", "a list of sections", "none", "the first that matches decides; see below"),
    Setting("rules[].name", "a text, another for each rule", REQUIRED, "what decisions call the rule"),
    Setting("rules[].match", "a section", REQUIRED, "conditions that must all hold; see below"),
    Setting("rules[].action", _words(Action, {Action.NONE}), REQUIRED, "what is decided; see below"),
    Setting(
        "rules[].exclude_node",
        "`true`, `false`",
        "`false`",
        "a rollback goes on without the node of the first rank",
    ),
    Setting("checkpoints", "a section", "none; required for a rollback", "where there is a way back to"),
    Setting(
        "checkpoints.root",
        "an absolute path, or a URL (`s3://…`)",
        REQUIRED,
        "where checkpoints are looked for",
    ),
    Setting("checkpoints.layout", _words(Layout), _word(Checkpoints("/").layout), "how they lie there"),
    Setting("rollback", "a section", "the defaults below", "how one goes back"),
    Setting(
        "rollback.margin_steps",
        "from 0 on",
        _number(Rollback().margin_steps),
        "so many steps before the first bad one are not trusted either",
    ),
    Setting(
        "rollback.skip_batches",
        "from 0 on",
        _number(Rollback().skip_batches),
        "passed on as `GRADWATCH_SKIP_BATCHES`",
    ),
    Setting(
        "rollback.quarantine",
        _words(Quarantine),
        f"{_word(Rollback().quarantine)}; {_word(Quarantine.LEDGER)} for a URL, and under Ray Train",
        "checkpoints newer than the target are moved out of the root, or remembered as bad; never deleted",
    ),
    Setting(
        "budgets",
        "a list of sections",
        ", ".join(
            f"{budget.max} of `{budget.scope.value}`"
            + ("" if budget.per is None else f" per {budget.per // 3600}h")
            for budget in DEFAULT_BUDGETS
        ),
        "all must allow a rollback; see below",
    ),
    Setting("budgets[].scope", _words(Scope), REQUIRED, "which rollbacks are counted"),
    Setting("budgets[].max", "from 0 on", REQUIRED, "so many there may be"),
    Setting("budgets[].per", "a duration", "for ever", "the time over which is counted"),
    Setting("cooldown", "a duration", "none", "from one rollback to the next at least so long"),
    Setting(
        "on_budget_exhausted",
        _words(Otherwise),
        _word(_DEFAULTS.on_budget_exhausted),
        "instead of a rollback that a budget forbids",
    ),
    Setting(
        "on_no_good_checkpoint",
        _words(Otherwise),
        _word(_DEFAULTS.on_no_good_checkpoint),
        "instead of a rollback to nowhere",
    ),
)
