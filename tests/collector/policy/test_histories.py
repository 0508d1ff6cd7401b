"""Whatever happens to a job, no bad checkpoint is chosen, nothing decided twice, no budget exceeded."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st

from gradwatch.collector.observations import GuardOff, Phase, Skipped
from gradwatch.collector.policy.decision import Outcome, conclude
from gradwatch.collector.policy.dossier import Dossier, with_decision
from gradwatch.collector.policy.engine import decide
from gradwatch.collector.policy.model import Action, Mode, Otherwise, Policy, Scope
from gradwatch.collector.policy.refusals import refusal_to_perform
from gradwatch.collector.policy.reload import InForce, reload
from tests.collector.history import GRADIENT_PHASES, batch, launch_ended, launch_started
from tests.collector.policy.story import HEAD, Story, checkpoint, policy

if TYPE_CHECKING:
    from gradwatch.collector.policy.decision import Decision
    from gradwatch.collector.policy.dossier import Checkpoint

TEXT = """
guard: {{on_nonfinite: skip_step, max_consecutive: 4}}
mode: {mode}
rules:
  - {{name: ignored, match: {{phase: input}}, action: ignore}}
  - name: repeats
    match: {{same_rank: true, count: ">=2", within_steps: 50}}
    action: rollback
    exclude_node: true
  - {{name: limit, match: {{guard_exhausted: true}}, action: rollback}}
  - {{name: burst, match: {{consecutive_bad_steps: ">=3"}}, action: rollback}}
  - {{name: rank-0, match: {{rank: 0}}, action: rollback}}
  - {{name: rest, match: {{}}, action: warn}}
checkpoints: {{root: /ckpts}}
rollback: {{margin_steps: {margin}}}
budgets:
  - {{scope: job, max: {most}, per: 1h}}
  - {{scope: same_first_bad_step, max: {same}}}
  - {{scope: no_progress, max: {idle}}}
cooldown: {cooldown}
on_budget_exhausted: {otherwise}
on_no_good_checkpoint: {otherwise}
"""

texts = st.builds(
    TEXT.format,
    mode=st.sampled_from(["enforce", "enforce", "dry_run"]),
    margin=st.sampled_from([0, 0, 3]),
    most=st.integers(0, 6),
    same=st.integers(1, 2),
    idle=st.integers(1, 4),
    cooldown=st.sampled_from(["1s", "1s", "5m"]),
    otherwise=st.sampled_from(["halt", "warn", "warn"]),
)
GOOD = {"complete": True, "finite": True, "bad_buffers": (), "gone": False}
ledgers = st.one_of(
    st.just(GOOD),
    st.just(GOOD),
    st.fixed_dictionaries(
        {
            "complete": st.sampled_from([True, True, False]),
            "finite": st.sampled_from([True, True, False, None]),
            "bad_buffers": st.sampled_from([(), (), ("norm.var",)]),
            "gone": st.sampled_from([False, False, False, True]),
        }
    ),
)
bad = st.tuples(st.just("bad"), st.integers(0, 1), st.sampled_from([*GRADIENT_PHASES, None]), st.booleans())
happenings = st.one_of(
    st.tuples(st.just("save"), ledgers, st.sampled_from([True, True, False])),
    st.tuples(st.just("save"), st.just(GOOD), st.just(True)),
    bad,
    bad,
    st.tuples(st.just("train"), st.integers(1, 25)),
    st.tuples(st.just("wait"), st.sampled_from([1, 40, 600, 4000])),
    st.tuples(st.just("restart"), st.sampled_from(["perform", "perform", "perform", "fail", "crash"])),
    st.tuples(st.just("restart"), st.sampled_from(["perform", "perform", "relaunch"])),
    st.tuples(st.just("guard"), st.sampled_from(["exhausted", "off"])),
    st.tuples(st.just("reload"), st.one_of(texts, st.just("mode: nonsense"))),
)


@dataclass
class Job:
    """A job that lives through what happens, and is checked at every decision."""

    text: str
    story: Story = field(init=False)
    in_force: InForce = field(init=False)
    round: int = 0
    step: int = 0
    launches: int = 0
    checked: int = 0

    def __post_init__(self) -> None:
        self.in_force = reload(InForce(), (HEAD + self.text).encode(), "p.yaml")
        assert self.in_force.policy is not None
        self.story = Story(self.in_force.policy)
        self.launch()
        self.story.start()
        self.save(GOOD, True)
        self.train(10)
        self.save(GOOD, True)
        self.train(2)

    def happens(self, what: str, *how: object) -> None:
        ledger = self.story.dossier
        getattr(self, what)(*how)
        self.check(ledger)

    # ------------------------------------------------------------ what happens

    def save(self, ledger: dict, known: bool) -> None:
        path = f"/ckpts/{self.step}"
        one = checkpoint(self.step if known else None, path=path, seen_at=self.story.now, **ledger)
        self.story.saved(one)

    def bad(self, rank: int, phase: Phase | None, both: bool) -> None:
        if both:
            self.story.bad(self.round, 1 - rank, step=self.step)
        self.story.bad(self.round, rank, step=self.step, phase=phase)
        self.train(1)

    def train(self, rounds: int) -> None:
        self.round += rounds
        self.step += rounds
        self.story.passed(self.round - 1)

    def wait(self, seconds: float) -> None:
        self.story.wait(seconds)

    def restart(self, how: str) -> None:
        pending = [one for one in self.story.decisions if one.outcome is Outcome.PENDING]
        if how == "relaunch":
            self.story._tell(batch(f"l{self.launches}", 1, launch_ended(f"l{self.launches}")))
            self.launch()
        state, dossier = self.story.state, self.story.dossier
        if how == "perform" and pending and refusal_to_perform(state, dossier, pending[-1]) is None:
            if pending[-1].checkpoint is not None:
                self.story.perform()
                self.step = pending[-1].checkpoint.step
        elif how == "fail" and pending:
            failed = conclude(pending[-1], Outcome.FAILED, "disk full")
            self.story.dossier = with_decision(self.story.dossier, failed)
        self.round = 0
        self.story.start(self.story.generation if how == "crash" else None)

    def launch(self) -> None:
        self.launches += 1
        self.story._tell(batch(f"l{self.launches}", 0, launch_started(f"l{self.launches}")))

    def guard(self, what: str) -> None:
        skipped = Skipped(self.step, self.round, consecutive=4, in_last_1000=4, exhausted=True)
        self.story.say(0, skipped if what == "exhausted" else GuardOff("PowerSGD"))

    def reload(self, text: str) -> None:
        before = self.in_force
        self.in_force = reload(before, (HEAD + text).encode(), "p.yaml")
        if not self.in_force.last_reload_successful:
            assert self.in_force.policy is before.policy
        self.story.policy = self.in_force.policy

    # ------------------------------------------------------------ what must hold

    def check(self, before: Dossier) -> None:
        decisions = self.story.decisions
        # Never about one incident twice, never one decision twice.
        assert len({one.incident for one in decisions}) == len(decisions)
        assert len({one.id for one in decisions}) == len(decisions)
        # What was decided once is there, in its place.
        known = [one.id for one in before.decisions]
        assert [one.id for one in decisions[: len(known)]] == known
        for place in range(self.checked, len(decisions)):
            self.check_decision(decisions[place], decisions[:place])
        self.checked = len(decisions)
        for one in decisions:
            assert self.story.ask(one.incident).decision is None

    def check_decision(self, decision: Decision, earlier: tuple[Decision, ...]) -> None:
        assert decision.policy_hash == self.in_force.hash
        assert (decision.outcome is Outcome.DRY_RUN) == (
            self.story.policy.mode is Mode.DRY_RUN and decision.action in {Action.ROLLBACK, Action.HALT}
        )
        if decision.action is Action.ROLLBACK:
            self.check_target(decision)
            check_budgets(self.story.policy, decision, earlier)
            if decision.outcome is Outcome.PENDING:
                self.check_nothing_else_stands(decision, earlier)

    def check_target(self, decision: Decision) -> None:
        target = decision.checkpoint
        if target is None:
            self.check_that_none_is_good(decision)
            return
        ledger = {one.path: one for one in self.story.dossier.checkpoints}
        chosen = ledger[target.path]
        assert chosen.complete
        assert chosen.finite is True
        assert not chosen.quarantined
        assert not chosen.gone
        assert chosen.step == target.step
        assert chosen.step < decision.first_bad_step - self.story.policy.rollback.margin_steps
        # Whatever a resume from the latest could take instead is moved.
        newer = {
            path
            for path, one in ledger.items()
            if not (one.quarantined or one.gone) and one.step is not None and one.step > target.step
        }
        assert newer <= set(decision.quarantine)
        assert target.path not in decision.quarantine

    def check_that_none_is_good(self, decision: Decision) -> None:
        """The job is stopped to look once more, since it would be stopped for good otherwise."""
        by = self.story.policy
        assert (by.mode, by.on_no_good_checkpoint) == (Mode.ENFORCE, Otherwise.HALT)
        assert decision.quarantine == ()
        candidates = [one for one in self.story.dossier.checkpoints if sound(one)]
        candidates.sort(key=lambda one: (one.step, one.seen_at, one.bad_buffers))
        assert not any(
            not (one.quarantined or one.gone)
            and set(one.bad_buffers) <= set(candidates[0].bad_buffers)
            and one.step < decision.first_bad_step - by.rollback.margin_steps
            for one in candidates
        )

    def check_nothing_else_stands(self, decision: Decision, earlier: tuple[Decision, ...]) -> None:
        for one in earlier:
            if one.outcome in {Outcome.PENDING, Outcome.PERFORMED} and one.run == decision.run:
                assert one.action is not Action.HALT
                assert one.action is not Action.ROLLBACK or one.generation < decision.generation


def sound(one: Checkpoint) -> bool:
    return bool(one.complete and one.finite) and one.step is not None


def check_budgets(by: Policy, decision: Decision, earlier: tuple[Decision, ...]) -> None:
    """As a person would count, with the decision included."""
    dry = by.mode is Mode.DRY_RUN
    done = [
        one
        for one in (*earlier, decision)
        if one.action is Action.ROLLBACK and (dry or one.outcome is not Outcome.DRY_RUN)
    ]
    for budget in by.budgets:
        counted = [one for one in done if budget.per is None or one.at > decision.at - budget.per]
        if budget.scope is Scope.SAME_FIRST_BAD_STEP:
            counted = [one for one in counted if one.first_bad_step == decision.first_bad_step]
        if budget.scope is Scope.NO_PROGRESS:
            steps = [-1 if one.checkpoint is None else one.checkpoint.step for one in counted]
            best = max(steps[:-1], default=-1)
            counted = counted[:1] if steps[-1] > best else counted[steps.index(best) :]
            if steps[-1] > best:
                continue
        assert len(counted) <= budget.max
    times = [one.at for one in done]
    assert all(later - sooner >= by.cooldown for sooner, later in zip(times[-2:-1], times[-1:], strict=False))


@settings(max_examples=200, deadline=None)
@given(texts, st.lists(happenings, min_size=20, max_size=60))
def test_random_histories(text: str, history: list):
    job = Job(text)
    for what, *how in history:
        job.happens(what, *how)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 60), st.booleans(), st.integers(1, 3000)), min_size=30, max_size=30))
def test_a_flapping_job_ends_in_a_halt_that_names_the_budget(lives: list):
    # Each life trains a while, may save a good checkpoint, and goes bad.
    text = "mode: enforce\nrules: [{name: any, match: {}, action: rollback}]\ncheckpoints: {root: /ckpts}\n"
    story = Story(policy(text)).saved(checkpoint(0))
    step = 0
    for rounds, saves, seconds in lives:
        story.start().passed(rounds)
        step += rounds
        if saves:
            story.saved(checkpoint(step - 1) if step > 1 else checkpoint(0))
        story.bad(rounds + 1, step=step)
        if story.decisions[-1].action is Action.HALT:
            break
        story.perform().wait(seconds)
        step = story.decisions[-1].checkpoint.step
    # 30 lives of at most 50 minutes are 25 hours.
    assert story.decisions[-1].action is Action.HALT
    assert len(story.decisions) <= 6
    assert "the budget " in story.decisions[-1].reason
    # And it stays halted, whatever else is seen of it.
    assert story.bad(rounds + 40, step=step + 40).decisions[-1].action is Action.HALT


@settings(max_examples=50, deadline=None)
@given(texts, st.lists(happenings, min_size=5, max_size=25))
def test_the_same_history_gives_the_same_decisions(text: str, history: list):
    jobs = Job(text), Job(text)
    for what, *how in history:
        for job in jobs:
            job.happens(what, *how)
    assert jobs[0].story.decisions == jobs[1].story.decisions


def test_a_decision_leaves_what_it_was_given_as_it_was():
    story = Story(policy("rules: []")).start().bad(5)
    story.policy = policy("rules: [{name: a, match: {}, action: halt}]")
    before = replace(story.dossier)
    assert decide(story.state, story.dossier, story.policy, story.incidents[0].id, story.now).decision
    assert story.dossier == before
