"""The policy file: what is read, and what is an error that says where and what is allowed."""

from __future__ import annotations

import pytest

from gradwatch.collector.policy.document import guard_setting, load_policy, policy_hash
from gradwatch.collector.policy.model import (
    DEFAULT_BUDGETS,
    Checkpoints,
    Mode,
    Otherwise,
    Policy,
    Quarantine,
    Scope,
)
from gradwatch.collector.policy.problems import PolicyError
from gradwatch.collector.policy.reload import InForce, reload
from gradwatch.collector.policy.sentences import explain
from tests.collector.policy.story import HEAD, ROLL_BACK, policy

FULL = """
mode: enforce                  # dry_run | enforce
guard:
  on_nonfinite: skip_step      # off | skip_step
  max_consecutive: 5
  max_per_1000_steps: 10
rules:
  - name: amp-overflow
    match: {cause: loss_scale}
    action: ignore
  - name: poisoned-weights
    match: {cause: parameter}
    action: rollback
  - name: same-rank-repeats
    match: {same_rank: true, count: ">=3", within_steps: 500}
    action: rollback
    exclude_node: true
  - name: burst
    match: {consecutive_bad_steps: ">=5"}
    action: rollback
checkpoints:
  root: /ckpts
  layout: auto
rollback:
  margin_steps: 0
  skip_batches: 0
  quarantine: move
budgets:
  - {scope: job, max: 5, per: 24h}
  - {scope: same_first_bad_step, max: 1}
  - {scope: no_progress, max: 3}
on_budget_exhausted: halt
on_no_good_checkpoint: halt
"""


def test_the_file_of_the_reference_loads():
    read = policy(FULL)
    assert [rule.name for rule in read.rules] == [
        "amp-overflow",
        "poisoned-weights",
        "same-rank-repeats",
        "burst",
    ]
    assert read.mode is Mode.ENFORCE
    assert read.rules[2].exclude_node
    assert read.rollback.quarantine is Quarantine.MOVE
    assert read.budgets == DEFAULT_BUDGETS
    assert [budget.scope for budget in read.budgets] == list(Scope)
    assert read.budgets[0].per == 24 * 3600


def test_what_is_left_out_has_the_safe_default():
    read = policy("")
    assert read == Policy()
    assert read.mode is Mode.DRY_RUN
    assert read.on_budget_exhausted is Otherwise.HALT
    assert read.budgets == DEFAULT_BUDGETS
    assert guard_setting(read) is None


def test_the_hash_is_of_what_the_policy_says():
    same = FULL.replace("# dry_run | enforce", "").replace("24h", "1440m").replace(" {scope", "  {scope")
    assert policy_hash(policy(same)) == policy_hash(policy(FULL))
    assert policy_hash(policy(FULL.replace("max: 3", "max: 4"))) != policy_hash(policy(FULL))
    # Pinned: it is in audit trails, and must not change with a release.
    assert policy_hash(policy(FULL)) == "dd5a57f29d238545"


def test_what_the_probe_is_told_of_the_guard():
    assert guard_setting(policy(FULL)) == {
        "on_nonfinite": "skip_step",
        "max_consecutive": 5,
        "max_per_1000_steps": 10,
    }
    # In a dry run an update that is skipped would change the training; to wait for a look does not.
    reads_out = FULL.replace("max_per_1000_steps: 10", "max_per_1000_steps: 10\n  read_out: every_step")
    assert guard_setting(policy(reads_out))["read_out"] == "every_step"
    dry = reads_out.replace("mode: enforce", "mode: dry_run")
    assert guard_setting(policy(dry)) == {"read_out": "every_step"}
    assert policy_hash(policy(reads_out)) != policy_hash(policy(FULL))
    assert guard_setting(policy(FULL.replace("mode: enforce", "mode: dry_run"))) is None


RULE = "rules:\n- {name: a, match: {%s}, action: warn}\n"

WRONG = [
    # A version that this is not.
    ("apiVersion: gradwatch/v2", 1, "apiVersion: must be gradwatch/v1, not gradwatch/v2"),
    # No version at all.
    ("mode: enforce", 1, "apiVersion: is missing"),
    # A key that is not known, with the nearest one that is.
    (HEAD + "gaurd: {}", 2, "gaurd: unknown key (did you mean 'guard'?); allowed are apiVersion, budgets"),
    (HEAD + "guard:\n  max_consecutve: 3", 3, "guard.max_consecutve: unknown key (did you mean 'max_consec"),
    (HEAD + RULE % "cuase: loss", 3, "rules[0].match.cuase: unknown key (did you mean 'cause'?)"),
    # YAML's merge key is one too.
    (HEAD + "guard: {<<: {max_consecutive: 3}}", 2, "guard.<<: unknown key"),
    # A key that is there twice.
    (HEAD + "mode: enforce\n\nmode: dry_run", 4, "mode: the key is there twice; first in line 2"),
    (HEAD + RULE % "step: 1, step: 2", 3, "rules[0].match.step: the key is there twice"),
    # A word that is none of the words.
    (
        HEAD + "mode: enforced",
        2,
        "mode: must be one of dry_run, enforce, not enforced (did you mean 'enforce'?)",
    ),
    (HEAD + RULE % "cause: [loss, los]", 3, "rules[0].match.cause: must be one of input, parameter"),
    (HEAD + "rules:\n- {name: a, match: {}, action: none}", 3, "must be one of ignore, warn, rollback, halt"),
    # The wrong type.
    (HEAD + "guard: 3", 2, "guard: must be a section with keys, not 3"),
    (HEAD + "rules: {a: b}", 2, "rules: must be a list, not a section with keys"),
    (HEAD + "mode: [enforce]", 2, "mode: must be one of dry_run, enforce, not a list"),
    (HEAD + "guard: {max_consecutive: '5'}", 2, 'must be a whole number from 1 on, not "5"'),
    (HEAD + "guard: {max_consecutive: 5.5}", 2, "must be a whole number from 1 on, not 5.5"),
    (HEAD + "guard: {max_consecutive: true}", 2, "must be a whole number from 1 on, not true"),
    (HEAD + "guard: {max_consecutive: }", 2, "must be a whole number from 1 on, not nothing"),
    (HEAD + RULE % "guard_exhausted: yes", 3, "guard_exhausted: must be true or false, not yes"),
    (HEAD + RULE % "node: []", 3, "rules[0].match.node: must be a name"),
    ("- 1", 1, "must be a section that begins with apiVersion"),
    # No expressions.
    (HEAD + RULE % "count: '>=3 or <1'", 3, 'count: must be a whole number, or a comparison such as ">=3"'),
    (HEAD + RULE % "count: '>= -3'", 3, "the signs are == != >= <= > <"),
    # Out of bounds.
    (HEAD + "guard: {max_per_1000_steps: 1001}", 2, "must be a whole number from 1 to 1000, not 1001"),
    (HEAD + "rollback: {margin_steps: -1}", 2, "rollback.margin_steps: must be a whole number from 0 on"),
    (
        HEAD + "budgets:\n- {scope: job, max: -1}",
        3,
        "budgets[0].max: must be a whole number from 0 on, not -1",
    ),
    (HEAD + "budgets:\n- {scope: job}", 3, "budgets[0].max: is missing"),
    # A budget that says nothing, or twice the same.
    (HEAD + "budgets: []", 2, "budgets: must not be empty: a job that fails again and again"),
    (HEAD + "budgets:\n- {scope: job, max: 1}\n- {scope: job, max: 2}", 4, "a second budget of scope job"),
    (
        HEAD + "budgets:\n- {scope: no_progress, max: 1, per: 1h}",
        3,
        "budgets[0].per: no_progress counts since",
    ),
    # A duration of no known unit.
    (HEAD + "cooldown: 10", 2, 'cooldown: must be a duration such as "90s", "30m", "24h" or "7d", not 10'),
    (HEAD + "cooldown: 10 parsecs", 2, "not 10 parsecs"),
    (HEAD + "cooldown: 0s", 2, "not 0s"),
    # Rules that say too little.
    (HEAD + "rules:\n- {name: a, action: warn}", 3, "rules[0].match: is missing; `match: {}` matches every"),
    (HEAD + "rules:\n- {match: {}, action: warn}", 3, "rules[0].name: is missing"),
    (HEAD + RULE % "same_rank: true", 3, "same_rank: says which incidents are counted: it needs `count`"),
    (HEAD + RULE % "within_steps: 10", 3, "within_steps: says which incidents are counted: it needs `count`"),
    (
        HEAD + "rules:\n- {name: a, match: {}, action: rollback}",
        3,
        "rules[0].action: a rollback needs a section `checkpoints`",
    ),
    (
        HEAD + "rules:\n- {name: a, match: {}, action: halt, exclude_node: true}",
        3,
        "exclude_node: goes with action: rollback only",
    ),
    # One name for two rules.
    (
        HEAD + RULE % "cause: loss" + "- {name: a, match: {cause: input}, action: warn}",
        4,
        "rules[1].name: a is taken; first in line 3",
    ),
    # A root that depends on where the collector was started.
    (
        HEAD + "checkpoints: {root: ckpts}",
        2,
        "checkpoints.root: must be an absolute path, or a URL, not ckpts",
    ),
    (HEAD + "checkpoints: {layout: torch}", 2, "checkpoints.root: is missing"),
    (
        HEAD + "checkpoints: {root: 's3://b/run'}\nrollback: {quarantine: move}",
        3,
        "rollback.quarantine: checkpoints on remote storage are not moved: write ledger, or leave it out",
    ),
    # Not YAML, not text, nothing.
    (HEAD + "a: b: c", 2, "this is not YAML: mapping values are not allowed here"),
    (HEAD + "a: [", 2, "this is not YAML"),
    (HEAD + "a: \x07", 1, "this is not YAML"),
    (HEAD + "---\nb: 1", 2, "this is not YAML"),
    ("# nothing\n", 1, "the file is empty"),
    (HEAD + "? [a, b]\n: c", 2, "a key must be a word"),
    # Objects.
    (HEAD + "mode: !!python/object/apply:os.system [id]", 2, "tags are not allowed"),
    # Bombs: wide, deep, long, and one of references.
    (HEAD + "a: &a [x, x]\nb: [*a, *a]", 2, "&a: aliases are not allowed; write it out"),
    (HEAD + "b: *a", 2, "*a: aliases are not allowed"),
    (HEAD + "a: " + "[" * 30_000, 2, "nested more than 8 deep"),
    (HEAD + "a: " + "{b: " * 10_000, 2, "nested more than 8 deep"),
    (HEAD + "a: [" + "1, " * 20_000 + "]", 2, "more than 10000 values"),
    (HEAD + "#" * 70_000, 1, "at most 65536 are read"),
]


@pytest.mark.parametrize(("text", "line", "said"), WRONG)
def test_wrong(text: str, line: int, said: str):
    with pytest.raises(PolicyError) as caught:
        load_policy(text.encode(), "policy.yaml")
    found = [problem for problem in caught.value.problems if said in str(problem)]
    assert found, str(caught.value)
    assert found[0].line == line
    assert f"policy.yaml:{line}: " in str(caught.value)


def test_bytes_that_are_no_text():
    with pytest.raises(PolicyError, match=r"policy\.yaml:2: this is not UTF-8 text"):
        load_policy(HEAD.encode() + b"mode: \xff", "policy.yaml")


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(PolicyError) as caught:
        policy("mode: x\ncooldown: x\nguard: {on_nonfinite: x}")
    assert [problem.key for problem in caught.value.problems] == ["mode", "cooldown", "guard.on_nonfinite"]


@pytest.mark.parametrize("rollback", ["", "rollback: {margin_steps: 1}", "rollback: {quarantine: ledger}"])
def test_on_remote_storage_checkpoints_are_only_marked(rollback):
    found = policy(f"checkpoints: {{root: 's3://b/run'}}\n{rollback}")
    assert found.checkpoints == Checkpoints("s3://b/run")
    assert found.rollback.quarantine is Quarantine.LEDGER


def test_off_is_a_word_and_not_yamls_false():
    assert policy("guard: {on_nonfinite: off}") == Policy()


GUARD = "guard: {on_nonfinite: skip_step, max_consecutive: 3}\n"
NEVER = [
    # There is no number that is both.
    ("count: '<1'", "count is never below 1"),
    ("rank: '<0'", "rank is never below 0"),
    # Nobody was first.
    ("cause: reduction, rank: 3", "reduction has no first rank, and so no rank"),
    ("cause: [reduction, loss_scale], same_rank: true, count: 2", "has no first rank, and so no same_rank"),
    # A cause that begins in a phase begins in no other.
    ("cause: input, phase: [loss, backward]", "the cause input begins in the phase of that name"),
    # The guard is off.
    ("guard_exhausted: true", "guard_exhausted needs guard.on_nonfinite: skip_step"),
]


@pytest.mark.parametrize(("match", "said"), NEVER)
def test_conditions_that_contradict(match: str, said: str):
    with pytest.raises(PolicyError) as caught:
        policy(RULE % match)
    assert "rules[0].match: this can never match: " in str(caught.value)
    assert said in str(caught.value)


def test_a_guard_without_limits_is_never_exhausted():
    with pytest.raises(PolicyError, match=r"needs guard\.max_consecutive"):
        policy("guard: {on_nonfinite: skip_step}\n" + RULE % "guard_exhausted: true")
    policy(GUARD + RULE % "guard_exhausted: true")


SHADOWED = [
    # Everything is matched before.
    ("", "cause: loss", True),
    ("cause: loss", "cause: loss", True),
    ("cause: [loss, input]", "cause: loss, rank: 3", True),
    ("cause: loss", "cause: [loss, input]", False),
    ("cause: loss", "", False),
    # Numbers.
    ("rank: '>=3'", "rank: '>5'", True),
    ("rank: '>=3'", "rank: '>=2'", False),
    ("rank: '!=3'", "rank: '<3'", True),
    ("rank: '!=3'", "rank: '>2'", False),
    ("rank: '>=0'", "rank: 7", True),
    ("rank: '>=0'", "cause: loss", False),  # the rank may not be known
    ("consecutive_bad_steps: '>=1'", "consecutive_bad_steps: '>=5'", True),
    # Counts: where more is counted, a lower bound is reached too.
    ("count: '>=2'", "same_rank: true, count: '>=3', within_steps: 10", True),
    ("count: '>=2', within_steps: 500", "count: '>=2', within_steps: 100", True),
    ("count: '>=2', within_steps: 100", "count: '>=2', within_steps: 500", False),
    ("same_rank: true, count: '>=2'", "count: '>=2'", False),
    ("count: '<5'", "same_rank: true, count: '<5'", False),
    ("count: '<5', within_steps: 9", "count: '<4', within_steps: 9", True),
    # Patterns, where it is plain.
    ("node: 'gpu-*'", "node: gpu-7", True),
    ("node: [a, b]", "node: b", True),
    ("node: a", "node: [a, b]", False),
    # An update that was skipped is no `parameter`.
    ("cause: parameter", "cause: update", False),
    ("cause: parameter", "cause: parameter, step: 3", True),
    ("parameter: '*'", "parameter: '*.bias'", True),
    ("parameter: '*s'", "parameter: '*.bias'", False),  # true, but not plain
]


@pytest.mark.parametrize(("first", "second", "never"), SHADOWED)
def test_rules_that_an_earlier_one_leaves_nothing_to(first: str, second: str, never: bool):
    text = RULE % first + f"- {{name: b, match: {{{second}}}, action: halt}}"
    if not never:
        policy(text)
        return
    with pytest.raises(PolicyError, match=r"rules\[1\]: this rule can never decide: a matches first"):
        policy(text)


def test_two_rules_between_them_leave_nothing():
    text = RULE % "cause: loss" + "- {name: b, match: {cause: input}, action: warn}\n"
    with pytest.raises(PolicyError, match="a and b match first all that it matches"):
        policy(text + "- {name: c, match: {cause: [input, loss]}, action: halt}")
    policy(text + "- {name: c, match: {cause: [input, loss, forward]}, action: halt}")


def test_a_text_that_does_not_load_leaves_the_policy_as_it_is():
    first = reload(InForce(), (HEAD + "mode: enforce").encode(), "p.yaml")
    assert first.last_reload_successful
    second = reload(first, (HEAD + "mode: enforced").encode(), "p.yaml")
    assert not second.last_reload_successful
    assert (second.policy, second.hash) == (first.policy, first.hash)
    assert [problem.key for problem in second.problems] == ["mode"]
    assert reload(second, (HEAD + "mode: enforce").encode(), "p.yaml") == first


def test_the_policy_is_told_in_sentences():
    lines = explain(policy(FULL + "cooldown: 10m"))
    assert lines[0] == "enforced: decisions are performed"
    assert any(
        "rule 3, burst: when the number of bad steps in a row is >=5, go back" in line for line in lines
    )
    assert any("5 rollbacks in 24 hours of the job" in line for line in lines)
    assert any("at least 10 minutes from one rollback to the next" in line for line in lines)
    assert explain(policy(ROLL_BACK.replace("enforce", "dry_run")))[0].startswith("dry run: nothing is done")


def test_that_a_device_is_waited_for_is_said_in_a_dry_run_too():
    waits = "on a device: every update attempt waits for the look at its gradients, in a dry run too"
    for mode in ("enforce", "dry_run"):
        for guard, said in (("{read_out: every_step}", True), ("{on_nonfinite: skip_step}", False)):
            assert (waits in explain(policy(f"mode: {mode}\nguard: {guard}"))) == said
