"""Jobs under a policy, told as what their ranks report; decisions are taken as the collector takes them."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from gradwatch.collector.fold import fold, tick
from gradwatch.collector.model import Changes, Event, FoldConfig, Incident, State, apply
from gradwatch.collector.observations import LaunchEnded
from gradwatch.collector.policy.decision import Decision, Outcome, conclude
from gradwatch.collector.policy.document import load_policy
from gradwatch.collector.policy.dossier import Checkpoint, Dossier, observe, with_checkpoint, with_decision
from gradwatch.collector.policy.engine import Answer, decide, due
from tests.collector.history import NOW, batch, hello, nonfinite, progress, report

if TYPE_CHECKING:
    from gradwatch.collector import observations as obs
    from gradwatch.collector.policy.model import Policy

HEAD = "apiVersion: gradwatch/v1\n"
ROLL_BACK = """
    mode: enforce
    rules:
      - {name: any, match: {}, action: rollback}
    checkpoints: {root: /ckpts}
"""
ONE = """
    guard: {on_nonfinite: skip_step, max_consecutive: 3}
    rules:
      - {name: it, match: {%s}, action: warn}
      - {name: else, match: {}, action: ignore}
"""
BURST = """
    mode: enforce
    rules:
      - {name: burst, match: {consecutive_bad_steps: ">=3"}, action: rollback}
      - {name: other, match: {}, action: warn}
    checkpoints: {root: /ckpts}
"""


def policy(text: str) -> Policy:
    return load_policy((HEAD + textwrap.dedent(text)).encode(), "policy.yaml")


def checkpoint(step: int | None, **changes: object) -> Checkpoint:
    known = Checkpoint(f"/ckpts/{step}", step, complete=True, finite=True, seen_at=NOW + (step or 0))
    return replace(known, **changes)


@dataclass
class Story:
    """One job, and what is decided about it."""

    policy: Policy
    world_size: int = 2
    state: State = field(default_factory=State)
    dossier: Dossier = field(default_factory=lambda: Dossier("j"))
    now: float = NOW
    generation: int = -1
    answers: dict[str, Answer] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    _sent: dict[int, int] = field(default_factory=dict)
    _bad: dict[int, set[int]] = field(default_factory=dict)
    _skipped: list[int] = field(default_factory=list)
    _attempt: int = 0

    def start(self, generation: int | None = None) -> Story:
        """All ranks say hello, in the next generation unless told which."""
        self.generation = self.generation + 1 if generation is None else generation
        self._attempt += 1
        self._sent = dict.fromkeys(range(self.world_size), 1)
        self._bad = {rank: set() for rank in range(self.world_size)}
        self._skipped = []
        for rank in range(self.world_size):
            said = hello(rank, self.world_size, generation=self.generation, attempt_key=f"k{self._attempt}")
            self._tell(batch(self._journal(rank), 0, said))
        return self

    def bad(self, round_: int, rank: int = 0, *, step: int | None = None, **changes: object) -> Story:
        """A rank is bad in a round, and all ranks pass it."""
        self._bad[rank].add(round_)
        self.say(rank, nonfinite(round_, step=round_ if step is None else step, **changes))
        return self.passed(round_)

    def say(self, rank: int, *bodies: obs.Body) -> Story:
        """A rank journals something."""
        self._tell(batch(self._journal(rank), self._sent[rank], *bodies))
        self._sent[rank] += len(bodies)
        return self

    def say_launch(self, body: obs.LaunchStarted | obs.LaunchEnded) -> Story:
        """The launcher journals something."""
        self._tell(batch("l", isinstance(body, LaunchEnded), body))
        return self

    def passed(self, round_: int, last_bad_round: int | None = None) -> Story:
        """All ranks have passed a round."""
        if last_bad_round is not None:
            self._skipped.append(last_bad_round)
        rounds = [*self._skipped, *(bad for rounds in self._bad.values() for bad in rounds)]
        self._tell(
            *(
                progress(
                    self._journal(rank),
                    round_ + 1,
                    self._sent[rank],
                    step=round_,
                    bad_rounds=len(self._bad[rank]),
                    last_bad_round=max(rounds, default=None),
                )
                for rank in range(self.world_size)
            )
        )
        return self

    def saved(self, *checkpoints: Checkpoint) -> Story:
        """Checkpoints become known."""
        for one in checkpoints:
            self.dossier = with_checkpoint(self.dossier, one)
        return self

    def wait(self, seconds: float) -> Story:
        """Time passes."""
        self.now += seconds
        self._take_in(tick(self.state, FoldConfig(), self.now))
        return self

    def perform(self) -> Story:
        """The newest pending decision is performed; what it quarantines is so from now on."""
        decision = next(one for one in reversed(self.decisions) if one.outcome is Outcome.PENDING)
        self.dossier = with_decision(self.dossier, conclude(decision, Outcome.PERFORMED, "done"))
        for one in self.dossier.checkpoints:
            if one.path in decision.quarantine:
                self.dossier = with_checkpoint(self.dossier, replace(one, quarantined=True))
        return self

    @property
    def decisions(self) -> tuple[Decision, ...]:
        return self.dossier.decisions

    @property
    def decision(self) -> Decision:
        (only,) = self.decisions
        return only

    @property
    def incidents(self) -> list[Incident]:
        return list(self.state.incidents.values())

    @property
    def answer(self) -> Answer:
        """The newest answer about the newest incident."""
        return self.answers[self.incidents[-1].id]

    def ask(self, incident: str | None = None) -> Answer:
        """What is decided about an incident, the newest unless told which, if asked for outright."""
        which = self.incidents[-1].id if incident is None else incident
        return decide(self.state, self.dossier, self.policy, which, self.now)

    def _journal(self, rank: int) -> str:
        return f"a{self._attempt}r{rank}"

    def _tell(self, *parts: obs.Batch | obs.Progress) -> None:
        self._take_in(fold(self.state, report(*parts), FoldConfig(), self.now))

    def _take_in(self, changes: Changes) -> None:
        self.events += changes.events
        self.state = apply(self.state, changes)
        self.dossier = observe(self.dossier, self.state, changes)
        while ids := due(self.state, self.dossier):
            before = self.decisions
            for id_ in ids:
                self.answers[id_] = answer = decide(self.state, self.dossier, self.policy, id_, self.now)
                if answer.decision is not None:
                    self.dossier = with_decision(self.dossier, answer.decision)
                    break
            if self.decisions == before:
                return
