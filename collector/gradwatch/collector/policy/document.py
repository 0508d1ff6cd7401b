"""The policy file's schema: from text to a policy, or to all that is wrong with it. Pure."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from gradwatch.collector.model import Cause
from gradwatch.collector.observations import Phase, Value
from gradwatch.collector.policy import model, reachable
from gradwatch.collector.policy.fields import Fields
from gradwatch.collector.policy.keys import MATCH_KEYS
from gradwatch.collector.policy.model import Action, Policy
from gradwatch.collector.policy.problems import PolicyError, Problem
from gradwatch.collector.policy.text import Section, parse

if TYPE_CHECKING:
    from collections.abc import Sequence

# As the sidecar knows one.
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")

_TAKES = {key.name: key.takes for key in MATCH_KEYS}


def load_policy(source: bytes, file: str) -> Policy:
    """Read a policy file.

    Args:
        source: its content.
        file: its name, for messages.

    Raises:
        PolicyError: with everything that is wrong, each with line, key and what is allowed.
    """
    problems: list[Problem] = []
    tree = parse(source, file)
    if not isinstance(tree, Section):
        raise PolicyError([Problem(file, tree.line, "", "must be a section that begins with apiVersion")])
    policy = _policy(Fields(file, "", tree, 1, problems))
    if problems:
        raise PolicyError(sorted(problems, key=lambda problem: problem.line))
    return policy


def policy_hash(policy: Policy) -> str:
    """What a policy says, as 16 hexadecimal digits: comments, order of keys and layout do not matter."""
    said = asdict(policy)
    if policy.guard.read_out is model.ReadOut.WHEN_READY:
        # This key came later: policies without it keep their hashes, which are in audit trails.
        del said["guard"]["read_out"]
    text = json.dumps(said, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def guard_setting(policy: Policy) -> dict[str, Any] | None:
    """What GRADWATCH_GUARD tells a watched process, as JSON; None when there is nothing to tell.

    In a dry run nothing is skipped: that would change the training. To read out does not.
    """
    guard = policy.guard
    setting: dict[str, Any] = {}
    if guard.on_nonfinite is not model.Reflex.OFF and policy.mode is not model.Mode.DRY_RUN:
        setting = {
            "on_nonfinite": guard.on_nonfinite.value,
            "max_consecutive": guard.max_consecutive,
            "max_per_1000_steps": guard.max_per_1000_steps,
        }
    if guard.read_out is not model.ReadOut.WHEN_READY:
        setting["read_out"] = guard.read_out.value
    return setting or None


# ---------------------------------------------------------------- sections


def _policy(top: Fields) -> Policy:
    version = top.text("apiVersion", required=True)
    if version not in {None, model.API_VERSION}:
        top.note(top.line_of("apiVersion"), "apiVersion", f"must be {model.API_VERSION}, not {version}")
    defaults = Policy()
    guard = _guard(top.section("guard"))
    rules_at, rules = _rules(top.sections("rules"))
    checkpoints = _checkpoints(top.section("checkpoints"))
    policy = Policy(
        mode=top.word("mode", model.Mode, defaults.mode),
        guard=guard,
        rules=rules,
        checkpoints=checkpoints,
        rollback=_rollback(top.section("rollback"), remote=checkpoints is not None and checkpoints.is_remote),
        budgets=_budgets(top, top.sections("budgets")),
        cooldown=top.duration("cooldown") or 0,
        on_budget_exhausted=top.word("on_budget_exhausted", model.Otherwise, defaults.on_budget_exhausted),
        on_no_good_checkpoint=top.word(
            "on_no_good_checkpoint", model.Otherwise, defaults.on_no_good_checkpoint
        ),
    )
    top.finish()
    for index, (at, rule) in enumerate(zip(rules_at, rules, strict=True)):
        if rule.action is Action.ROLLBACK and not top.has("checkpoints"):
            at.note(at.line_of("action"), "action", "a rollback needs a section `checkpoints` with its root")
        never = reachable.never(rule.match, guard)
        if never is not None:
            at.note(at.line_of("match"), "match", f"this can never match: {never}")
            continue
        shadows = reachable.shadowed_by(rules[:index], rule)
        if shadows:
            match = "matches" if len(shadows) == 1 else "match"
            names = f"{' and '.join(shadows)} {match}"
            at.note(at.line, "", f"this rule can never decide: {names} first all that it matches")
    return policy


def _guard(fields: Fields | None) -> model.Guard:
    if fields is None:
        return model.Guard()
    guard = model.Guard(
        on_nonfinite=fields.word("on_nonfinite", model.Reflex, model.Reflex.OFF),
        max_consecutive=fields.integer("max_consecutive", 1),
        max_per_1000_steps=fields.integer("max_per_1000_steps", 1, most=1000),
        read_out=fields.word("read_out", model.ReadOut, model.ReadOut.WHEN_READY),
    )
    fields.finish()
    return guard


def _rules(sections: Sequence[Fields] | None) -> tuple[list[Fields], tuple[model.Rule, ...]]:
    read: list[tuple[Fields, model.Rule]] = []
    lines: dict[str, int] = {}
    for fields in sections or []:
        name = fields.text("name", required=True)
        if name is not None and name in lines:
            fields.note(fields.line_of("name"), "name", f"{name} is taken; first in line {lines[name]}")
        if name is not None:
            lines.setdefault(name, fields.line_of("name"))
        section = fields.section("match")
        if section is None:
            fields.note(fields.line, "match", "is missing; `match: {}` matches every incident")
        match = None if section is None else _match(section)
        action = fields.required_word("action", Action, without=[Action.NONE])
        exclude_node = fields.boolean("exclude_node") or False
        if exclude_node and action not in {None, Action.ROLLBACK}:
            fields.note(fields.line_of("exclude_node"), "exclude_node", "goes with action: rollback only")
        fields.finish()
        if name is not None and match is not None and action is not None:
            read.append((fields, model.Rule(name, match, action, exclude_node)))
    return [fields for fields, _ in read], tuple(rule for _, rule in read)


def _match(fields: Fields) -> model.Match | None:
    before = len(fields.problems)
    match = model.Match(
        cause=fields.words("cause", Cause),
        phase=fields.words("phase", Phase),
        value=fields.words("value", Value),
        step=fields.comparison("step"),
        rank=fields.comparison("rank"),
        node=fields.texts("node", _TAKES["node"]),
        parameter=fields.texts("parameter", _TAKES["parameter"]),
        origins=fields.comparison("origins"),
        count=fields.comparison("count"),
        same_rank=fields.boolean("same_rank") or False,
        within_steps=fields.integer("within_steps", 1),
        consecutive_bad_steps=fields.comparison("consecutive_bad_steps"),
        guard_exhausted=fields.boolean("guard_exhausted"),
    )
    fields.finish()
    for key in ("same_rank", "within_steps"):
        if fields.has(key) and not fields.has("count"):
            fields.note(
                fields.line_of(key), key, 'says which incidents are counted: it needs `count`, as ">=3"'
            )
    return match if len(fields.problems) == before else None


def _checkpoints(fields: Fields | None) -> model.Checkpoints | None:
    if fields is None:
        return None
    root = fields.text("root", required=True)
    if root is not None and not root.startswith("/") and not _URL.match(root):
        fields.note(fields.line_of("root"), "root", f"must be an absolute path, or a URL, not {root}")
    layout = fields.word("layout", model.Layout, model.Layout.AUTO)
    fields.finish()
    return None if root is None else model.Checkpoints(root, layout)


def _rollback(fields: Fields | None, *, remote: bool) -> model.Rollback:
    # Remote storage knows no renaming in one step.
    default = model.Quarantine.LEDGER if remote else model.Quarantine.MOVE
    if fields is None:
        return model.Rollback(quarantine=default)
    rollback = model.Rollback(
        margin_steps=fields.integer("margin_steps", 0) or 0,
        skip_batches=fields.integer("skip_batches", 0) or 0,
        quarantine=fields.word("quarantine", model.Quarantine, default),
    )
    if remote and rollback.quarantine is model.Quarantine.MOVE:
        fields.note(
            fields.line_of("quarantine"),
            "quarantine",
            "checkpoints on remote storage are not moved: write ledger, or leave it out",
        )
    fields.finish()
    return rollback


def _budgets(top: Fields, sections: Sequence[Fields] | None) -> tuple[model.Budget, ...]:
    if sections is None:
        return model.DEFAULT_BUDGETS
    budgets: list[model.Budget] = []
    for fields in sections:
        scope = fields.required_word("scope", model.Scope)
        max_ = fields.integer("max", 0, required=True)
        per = fields.duration("per")
        if per is not None and scope is model.Scope.NO_PROGRESS:
            fields.note(
                fields.line_of("per"), "per", "no_progress counts since the last progress; leave it out"
            )
        fields.finish()
        if scope is None or max_ is None:
            continue
        if any((known.scope, known.per) == (scope, per) for known in budgets):
            fields.note(fields.line, "", f"a second budget of scope {scope.value} over the same time")
        budgets.append(model.Budget(scope, max_, per))
    if not sections and not any(problem.key == "budgets" for problem in top.problems):
        top.note(
            top.line_of("budgets"),
            "budgets",
            "must not be empty: a job that fails again and again would be rolled back for ever",
        )
    return tuple(budgets)
