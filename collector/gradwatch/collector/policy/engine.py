"""What to do about an incident: `(state, dossier, policy, now)` gives a decision, or why there is none. Pure.

The first rule that matches decides, once per incident. A rule that only ignores or warns can wait:
while an earlier rule may yet match as the incident goes on, it leaves the decision open.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from gradwatch.collector.model import Status
from gradwatch.collector.policy import budgets
from gradwatch.collector.policy.checkpoints import choose, newer_than
from gradwatch.collector.policy.decision import (
    Decision,
    Evidence,
    Looked,
    Outcome,
    Verdict,
    decision_id,
)
from gradwatch.collector.policy.document import policy_hash
from gradwatch.collector.policy.effects import effect_of
from gradwatch.collector.policy.facts import Unknown, facts_of, first_bad_step
from gradwatch.collector.policy.match import look
from gradwatch.collector.policy.model import Action, Mode, Otherwise
from gradwatch.collector.policy.refusals import Silence, refusal
from gradwatch.collector.policy.sentences import duration

if TYPE_CHECKING:
    from gradwatch.collector.model import Incident, State
    from gradwatch.collector.policy.checkpoints import Choice
    from gradwatch.collector.policy.decision import Spent
    from gradwatch.collector.policy.dossier import Dossier
    from gradwatch.collector.policy.facts import Facts
    from gradwatch.collector.policy.model import Policy, Rule

_CAN_WAIT = {Action.IGNORE, Action.WARN}


@dataclass(frozen=True, slots=True)
class Answer:
    """A decision, or why there is none.

    Attributes:
        ask_again_at: when time alone will change the answer, in seconds since the epoch.
    """

    decision: Decision | None
    reason: str
    silence: Silence | None = None
    looked: tuple[Looked, ...] = ()
    ask_again_at: float | None = None


def due(state: State, dossier: Dossier) -> tuple[str, ...]:
    """The incidents to decide about now, in logical order: ask with every change and every tick."""
    job = state.jobs.get(dossier.job)
    if job is None or job.current is None:
        return ()
    decided = {one.incident for one in dossier.decisions}
    return tuple(
        id_
        for id_ in state.attempts[job.current].incidents
        # Asked with every change: of those that are decided, `refusal` would look through all decisions.
        if id_ not in decided
        and state.incidents[id_].status is not Status.SUSPECTED
        and refusal(job, dossier, state.incidents[id_]) is None
    )


def decide(state: State, dossier: Dossier, policy: Policy, incident_id: str, now: float) -> Answer:
    """What to do about an incident.

    Args:
        state: the collector's.
        dossier: of the incident's job, with all decisions so far.
        policy: that is in force.
        incident_id: one of the state's.
        now: in seconds since the epoch.
    """
    incident = state.incidents[incident_id]
    refused = refusal(state.jobs[dossier.job], dossier, incident)
    if refused is not None:
        return Answer(None, refused.why, refused.silence)
    if incident.status is Status.SUSPECTED:
        return Answer(None, "some rank may still say that it was first", Silence.NOT_CONFIRMED)
    case = _Case(dossier, policy, incident, facts_of(state, dossier, policy, incident), now)
    return case.answer()


# ---------------------------------------------------------------- what is decided


class _Grounds(NamedTuple):
    """What a rollback would rest on."""

    choice: Choice
    spent: tuple[Spent, ...]


@dataclass(frozen=True)
class _Case:
    """One incident under one policy at one time."""

    dossier: Dossier
    policy: Policy
    incident: Incident
    facts: Facts
    now: float

    def answer(self) -> Answer:
        looked: list[Looked] = []
        for rule in self.policy.rules:
            looked.append(look(rule, self.facts))
            if looked[-1].verdict is Verdict.MATCHES:
                return self._decided(rule, tuple(looked))
        tried = tuple(looked)
        reason = "no rule matches"
        if tried:
            reason += ": " + "; ".join(f"{one.rule}: {one.why}" for one in tried)
        if self.facts.goes_on:
            return Answer(None, reason, Silence.NO_MATCH, tried)
        return self._answer(Action.NONE, None, reason, tried)

    def _decided(self, rule: Rule, looked: tuple[Looked, ...]) -> Answer:
        reason = f"{rule.name}: {looked[-1].why}"
        if rule.action is Action.ROLLBACK:
            return self._roll_back(rule, reason, looked)
        waits_for = next((one for one in looked if one.verdict is Verdict.NOT_YET), None)
        if rule.action in _CAN_WAIT and waits_for is not None:
            why = f"{rule.name} matches, but {waits_for.rule} may yet: {waits_for.why}"
            return Answer(None, why, Silence.MAY_YET_MATCH, looked)
        return self._answer(rule.action, rule, reason, looked)

    def _roll_back(self, rule: Rule, reason: str, looked: tuple[Looked, ...]) -> Answer:
        policy, ledger = self.policy, self.dossier.checkpoints
        choice = choose(ledger, first_bad_step(self.facts), policy.rollback.margin_steps)
        spent = budgets.spent(
            policy, self.dossier.decisions, first_bad_step(self.facts), choice.target, self.now
        )
        grounds = _Grounds(choice, spent)
        exhausted = next((one for one in spent if one.exhausted), None)
        if exhausted is not None:
            why = f"{reason}; {budgets.said(exhausted)}"
            return self._instead(policy.on_budget_exhausted, rule, why, looked, grounds)
        waits_until = self._cooling_until()
        if waits_until is not None:
            rest = duration(max(1.0, waits_until - self.now))
            why = f"{reason}; the next rollback is due in {rest}, after the cooldown"
            if self.facts.goes_on:
                return Answer(None, why, Silence.COOLDOWN, looked, waits_until)
            return self._answer(Action.NONE, None, f"{why}, and by now the incident is over", looked)
        if choice.target is None and self._looks_first:
            reason += f"; no good checkpoint is known yet ({choice.why_none}): they are looked at once more"
        elif choice.target is None:
            why = f"{reason}; there is no good checkpoint: {choice.why_none}"
            return self._instead(policy.on_no_good_checkpoint, rule, why, looked, grounds)
        return self._answer(Action.ROLLBACK, rule, reason, looked, grounds)

    @property
    def _looks_first(self) -> bool:
        """Whether the job is stopped without a good checkpoint too: then one may yet be found."""
        enforced = self.policy.mode is Mode.ENFORCE
        return enforced and self.policy.on_no_good_checkpoint is Otherwise.HALT

    def _cooling_until(self) -> float | None:
        past = budgets.rollbacks(self.dossier.decisions, self.policy.mode)
        if not past or not self.policy.cooldown:
            return None
        until = max(one.at for one in past) + self.policy.cooldown
        return until if until > self.now else None

    def _instead(
        self,
        otherwise: Otherwise,
        rule: Rule,
        reason: str,
        looked: tuple[Looked, ...],
        grounds: _Grounds,
    ) -> Answer:
        action = Action.HALT if otherwise is Otherwise.HALT else Action.WARN
        return self._answer(action, rule, reason, looked, grounds)

    def _answer(
        self,
        action: Action,
        rule: Rule | None,
        reason: str,
        looked: tuple[Looked, ...],
        grounds: _Grounds | None = None,
    ) -> Answer:
        dry = self.policy.mode is Mode.DRY_RUN
        acts = action in {Action.ROLLBACK, Action.HALT}
        outcome = (Outcome.DRY_RUN if dry else Outcome.PENDING) if acts else Outcome.RECORDED
        target = grounds.choice.target if grounds is not None and action is Action.ROLLBACK else None
        quarantine = () if target is None else newer_than(self.dossier.checkpoints, target)
        exclude = rule is not None and rule.exclude_node and action is Action.ROLLBACK
        node = None if isinstance(self.facts.node, Unknown) else self.facts.node
        if exclude and node is None:
            reason += "; which node to go on without is not known"
        incident = self.incident
        decision = Decision(
            id=decision_id(incident.id, None if rule is None else rule.name, incident.attempt.generation),
            job=self.dossier.job,
            run=incident.run,
            generation=incident.attempt.generation,
            incident=incident.id,
            action=action,
            outcome=outcome,
            rule=None if rule is None else rule.name,
            reason=reason,
            effect=effect_of(action, target, quarantine, self.policy.rollback.quarantine, dry=dry),
            policy_hash=policy_hash(self.policy),
            at=self.now,
            evidence=Evidence(
                self.facts.as_evidence(),
                looked,
                () if grounds is None else grounds.choice.passed_over,
                () if grounds is None else grounds.spent,
            ),
            checkpoint=target,
            first_bad_step=first_bad_step(self.facts),
            quarantine=quarantine,
            skip_batches=self.policy.rollback.skip_batches if action is Action.ROLLBACK else 0,
            exclude_node=node if exclude else None,
        )
        return Answer(decision, reason, None, looked)
