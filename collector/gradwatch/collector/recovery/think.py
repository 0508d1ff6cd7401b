"""All that follows from a change: decide, perform, keep the books. Pure.

The collector's engine and the replay of a recorded history both call this, so that a replay decides
as the live run did.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeAlias

from gradwatch.collector.fold import tick
from gradwatch.collector.model import Changes, apply, merged
from gradwatch.collector.policy.checkpoints import newest_good
from gradwatch.collector.policy.decision import Outcome
from gradwatch.collector.policy.dossier import Dossier, observe, with_decision
from gradwatch.collector.policy.engine import decide, due
from gradwatch.collector.recovery import ledger, perform
from gradwatch.collector.recovery.model import Entry
from gradwatch.collector.recovery.notes import note

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from gradwatch.collector.model import FoldConfig, State
    from gradwatch.collector.policy.decision import Decision
    from gradwatch.collector.policy.engine import Answer
    from gradwatch.collector.policy.model import Policy

PolicyOf: TypeAlias = "Callable[[str], Policy | None]"


@dataclass(frozen=True, slots=True)
class Thought:
    """What follows from a change.

    Attributes:
        changes: the changes, and what follows from them in the state.
        state: after them.
        dossiers: those that are different now.
        entries: for the audit trail.
        answers: by incident, why nothing is decided about it yet.
    """

    changes: Changes
    state: State
    dossiers: Mapping[str, Dossier] = field(default_factory=dict)
    entries: tuple[Entry, ...] = ()
    answers: Mapping[str, Answer] = field(default_factory=dict)


def think(
    before: State,
    dossiers: Mapping[str, Dossier],
    changes: Changes,
    *,
    policy_of: PolicyOf,
    config: FoldConfig,
    now: float,
    asked: Iterable[Decision] = (),
) -> Thought:
    """Decide and perform as far as is due.

    Args:
        before: the state before the changes.
        dossiers: by job; a job without one has a new one.
        changes: of a report or a tick.
        policy_of: the policy in force for a job.
        config: the fold's.
        now: in seconds since the epoch.
        asked: decisions of an operator.
    """
    state = apply(before, changes)
    new: dict[str, Dossier] = {}
    entries: list[Entry] = []
    answers: dict[str, Answer] = {}
    for name in sorted(_jobs(state, changes, dossiers)):
        mind = _Mind(state, dossiers.get(name, Dossier(name)), policy_of(name), config, now)
        mind.observe(changes)
        for decision in asked:
            if decision.job == name:
                mind.take(decision, None)
        mind.decide_and_perform()
        state, changes = mind.state, merged(changes, mind.followed)
        if mind.dossier != dossiers.get(name):
            new[name] = mind.dossier
        entries += mind.entries
        answers.update(mind.answers)
    return Thought(changes, state, new, tuple(entries), answers)


def _jobs(state: State, changes: Changes, dossiers: Mapping[str, Dossier]) -> set[str]:
    """The jobs that something may follow for."""
    touched = {
        *changes.jobs,
        *(attempt.job for attempt in changes.attempts),
        *(event.job for event in changes.events),
        *(incident.attempt.job for incident in changes.incidents.values()),
        *(journal.job for journal in changes.journals.values() if journal.job is not None),
        # Time alone moves these on.
        *(name for name, known in dossiers.items() if _is_under_way(state, known)),
    }
    return touched & state.jobs.keys()


def _is_under_way(state: State, dossier: Dossier) -> bool:
    pending = any(one.outcome is Outcome.PENDING for one in dossier.decisions)
    return dossier.recovery is not None or pending or bool(due(state, dossier))


class _Mind:
    """One job while it is thought about."""

    def __init__(
        self, state: State, dossier: Dossier, policy: Policy | None, config: FoldConfig, now: float
    ) -> None:
        self.state = state
        self.dossier = dossier
        self.followed = Changes()
        self.entries: list[Entry] = []
        self.answers: dict[str, Answer] = {}
        self._policy = policy
        self._config = config
        self._now = now

    def observe(self, changes: Changes) -> None:
        """Keep the books."""
        dossier = before = observe(self.dossier, self.state, changes)
        for event in changes.events:
            if event.job == dossier.job:
                dossier = note(ledger.see(dossier, event), event)
        self.dossier = dossier
        if dossier.checkpoints == before.checkpoints:
            return
        pin = newest_good(before.checkpoints)
        now_pinned = newest_good(dossier.checkpoints)
        if now_pinned == pin:
            return
        if now_pinned is not None:
            self._say("pinned", f"{now_pinned.path} of step {now_pinned.step} is the newest good checkpoint")
        if pin is not None and any(one.path == pin.path and one.gone for one in dossier.checkpoints):
            self._say("lost", f"{pin.path} of step {pin.step}, the newest good checkpoint, was deleted")

    def take(self, decision: Decision, incident: str | None) -> None:
        """Enter a decision into the books."""
        self.dossier = with_decision(self.dossier, decision)
        about = "" if incident is None else f" about incident {incident}"
        text = f"{decision.action.value}{about}: {decision.reason}; {decision.effect}"
        self.entries.append(Entry(self.dossier.job, self._now, "decided", decision.id, text))

    def decide_and_perform(self) -> None:
        """Until nothing more is due."""
        while True:
            decided = self._decide()
            stepped = self._step()
            if not (decided or stepped):
                return

    def _decide(self) -> bool:
        if self._policy is None:
            return False
        any_ = False
        for id_ in due(self.state, self.dossier):
            answer = decide(self.state, self.dossier, self._policy, id_, self._now)
            self.answers[id_] = answer
            if answer.decision is not None:
                self.take(answer.decision, id_)
                any_ = True
        return any_

    def _step(self) -> bool:
        step = perform.step(self.state, self.dossier, self._policy, self._now)
        if step is None:
            return False
        self.dossier = step.dossier
        self.entries += step.entries
        job = self.state.jobs[self.dossier.job]
        if step.generation != job.generation:
            raised = Changes(jobs={job.name: replace(job, generation=step.generation)})
            self._follow(raised)
            # Incidents of the generation before are over now.
            self._follow(tick(self.state, self._config, self._now))
        return True

    def _follow(self, changes: Changes) -> None:
        self.state = apply(self.state, changes)
        self.followed = merged(self.followed, changes)

    def _say(self, what: str, text: str) -> None:
        self.entries.append(Entry(self.dossier.job, self._now, what, None, text))
