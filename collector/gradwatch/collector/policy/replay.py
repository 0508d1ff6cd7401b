"""What a policy would have decided in a recorded history, when and why. Pure.

The records go through the same fold and the same engine as they did live, with the time at which
each was received, and so does how far ranks had come, of which the log holds what mattered. Between
them time passes, as it did live with each tick. Where the log tells of a sidecar that looked after the
checkpoints, all that followed is taken from it too: what scans found, that commands were stopped and
started again. What a log does not hold is assumed, and each assumption is named.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from gradwatch.collector import observations as obs
from gradwatch.collector.fold import fold, tick
from gradwatch.collector.model import FoldConfig, State, Status, apply
from gradwatch.collector.policy.decision import Outcome
from gradwatch.collector.policy.dossier import (
    Checkpoint,
    Dossier,
    observe,
    with_checkpoint,
    with_decision,
)
from gradwatch.collector.policy.engine import Answer, decide, due
from gradwatch.collector.policy.model import Action
from gradwatch.collector.recovery.perform import LAUNCHERS_SECONDS
from gradwatch.collector.recovery.think import think

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from gradwatch.collector.model import Changes, Incident
    from gradwatch.collector.policy.log import Log, Logged
    from gradwatch.collector.policy.model import Policy

PASSED = (
    "the log is an old one and does not say how far ranks had come: those that report nothing are taken "
    "to have passed a round as soon as another rank is known to have"
)
SAVED = (
    "the log does not say what a scan found: checkpoints that were saved are taken to be complete and finite"
)
ASSUMED = "the log tells of no checkpoints: a good one just before each first bad step is assumed"
# The path of a checkpoint that is only assumed.
NO_PATH = "(assumed)"

# Seconds that make up for what is lost in adding to a time.
_LATER = 0.001
# The collector lets time pass about every second.
_TICK = 1.5
_NEVER = float("inf")


@dataclass(frozen=True, slots=True)
class Row:
    """One incident, and what would have been decided about it."""

    incident: Incident
    answer: Answer


@dataclass(frozen=True, slots=True)
class Replayed:
    """All incidents in order of time, and what had to be assumed."""

    rows: tuple[Row, ...]
    assumptions: tuple[str, ...]


def replay(log: Log, policy: Policy, config: FoldConfig | None = None) -> Replayed:
    """Decide as the collector would have.

    Args:
        log: the recorded history.
        policy: the one to try; what it decides is not performed.
        config: what the fold was told.
    """
    has_checkpoints = any(isinstance(one.body, obs.CheckpointSeen) for one in log.events)
    tape = _Tape(
        log,
        policy,
        config or FoldConfig(),
        assume_checkpoints=not has_checkpoints,
        tells_all=tells_all(log),
    )
    tape.play()
    rows = sorted(
        (Row(incident, tape.answer(incident)) for incident in tape.state.incidents.values()),
        key=lambda row: (
            row.incident.opened_at if row.answer.decision is None else row.answer.decision.at,
            row.incident.attempt,
            row.incident.evidence.first_round,
        ),
    )
    return Replayed(tuple(rows), tuple(_assumptions(log, has_checkpoints=has_checkpoints)))


def lacks_progress(log: Log) -> bool:
    """Whether a log has bad rounds, but does not say how far ranks had come, as logs once did not."""
    return any(isinstance(one.body, obs.NonFinite) for one in log.events) and not any(
        isinstance(one.body, obs.Progress) for one in log.events
    )


def tells_all(log: Log) -> bool:
    """Whether a sidecar looked after the checkpoints: then the log holds what it found and did."""
    return any(isinstance(one.body, obs.CheckpointRoot) for one in log.events)


def _assumptions(log: Log, *, has_checkpoints: bool) -> Iterator[str]:
    if lacks_progress(log):
        yield PASSED
    if not tells_all(log):
        yield SAVED if has_checkpoints else ASSUMED
    if log.unknown_kinds:
        yield f"records of an unknown kind are passed over: {', '.join(log.unknown_kinds)}"


@dataclass
class _Tape:
    """The state while a log is played."""

    log: Log
    policy: Policy
    config: FoldConfig
    assume_checkpoints: bool
    tells_all: bool
    state: State = field(default_factory=State)
    dossiers: dict[str, Dossier] = field(default_factory=dict)
    answers: dict[str, Answer] = field(default_factory=dict)
    ask_again_at: list[float] = field(default_factory=list)

    def play(self) -> None:
        ahead = _Ahead(self.log.events) if lacks_progress(self.log) else None
        now = None
        for received_at, group in itertools.groupby(self.log.events, key=lambda one: one.received_at):
            if now is not None:
                self._let_pass(now, received_at)
            now = received_at if now is None else max(now, received_at)
            together = tuple(group)
            progress = tuple(one.body for one in together if isinstance(one.body, obs.Progress))
            report = obs.Report(tuple(_batches(together)), progress)
            self._take_in(fold(self.state, report, self.config, now), now)
            if len(progress) == len(together):
                # What the log has of a tick that changed something.
                self._take_in(tick(self.state, self.config, now), now)
            if not self.tells_all:
                for one in together:
                    self._see_checkpoint(one)
            assumed = () if ahead is None else ahead.progress(self.state, together)
            if assumed:
                self._take_in(fold(self.state, obs.Report(progress=assumed), self.config, now), now)
            self._decide(now)
        if now is not None:
            self._let_pass(now, _NEVER)

    def answer(self, incident: Incident) -> Answer:
        """What was decided about an incident, or why nothing was."""
        dossier = self.dossiers.get(incident.attempt.job, Dossier(incident.attempt.job))
        taken = next((one for one in dossier.decisions if one.incident == incident.id), None)
        if taken is not None:
            return Answer(taken, taken.reason)
        known = self.answers.get(incident.id)
        return known or decide(self.state, dossier, self.policy, incident.id, incident.opened_at)

    def _let_pass(self, since: float, until: float) -> None:
        """What time alone changes: a rank that is silent is named unknown, a cooldown ends."""
        now = since
        while True:
            # A tick that changed an incident is in the log, soon after the moment from which on it could.
            silences = (moment for moment in self._silences() if moment + _TICK < until)
            moments = [*silences, *self.ask_again_at]
            now = min((moment for moment in moments if now < moment < until), default=_NEVER)
            if now == _NEVER:
                break
            self._take_in(tick(self.state, self.config, now), now)
            self._decide(now)
        self.ask_again_at = [moment for moment in self.ask_again_at if moment >= until]

    def _silences(self) -> Iterator[float]:
        """The moments from which on somebody counts as silent whom an incident or a rollback waits for."""
        late = self.config.confirm_timeout + _LATER
        for incident in self.state.incidents.values():
            if incident.status is Status.CLOSED:
                continue
            yield incident.opened_at + late
            for incarnation in self.state.attempts[incident.attempt].ranks.values():
                rank = self.state.journals[incarnation].rank
                if rank is not None:
                    yield rank.heard_at + late
        for dossier in self.dossiers.values():
            if dossier.recovery is not None and dossier.recovery.waiting_since is not None:
                yield dossier.recovery.waiting_since + LAUNCHERS_SECONDS + _LATER

    def _take_in(self, changes: Changes, now: float) -> None:
        if self.tells_all:
            self._follow(changes, now)
            return
        self.state = apply(self.state, changes)
        for job in self.state.jobs:
            self.dossiers[job] = observe(self.dossiers.get(job, Dossier(job)), self.state, changes)

    def _follow(self, changes: Changes, now: float) -> None:
        """As the collector does it: decide, and perform as far as the log says that it was."""
        thought = think(
            self.state,
            self.dossiers,
            changes,
            policy_of=lambda _job: self.policy,
            config=self.config,
            now=now,
        )
        self.state = thought.state
        self.dossiers.update(thought.dossiers)
        self.answers.update(thought.answers)
        again = [answer.ask_again_at for answer in thought.answers.values()]
        self.ask_again_at += [moment for moment in again if moment is not None]

    def _decide(self, now: float) -> None:
        if self.tells_all:
            return
        for job, known in self.dossiers.items():
            dossier = known
            for id_ in due(self.state, dossier):
                asked = self._with_assumed(dossier, self.state.incidents[id_])
                answer = decide(self.state, asked, self.policy, id_, now)
                self.answers[id_] = answer
                if answer.ask_again_at is not None:
                    self.ask_again_at.append(answer.ask_again_at)
                if answer.decision is not None:
                    dossier = with_decision(dossier, answer.decision)
                    dossier = _quarantined(dossier, answer)
            self.dossiers[job] = dossier

    def _with_assumed(self, dossier: Dossier, incident: Incident) -> Dossier:
        steps = [one.step for one in incident.evidence.earliest.values()]
        step = min(steps, default=0) - 1 - self.policy.rollback.margin_steps
        if not self.assume_checkpoints or step < 0:
            return dossier
        return replace(dossier, checkpoints=(Checkpoint(NO_PATH, step, complete=True, finite=True),))

    def _see_checkpoint(self, one: Logged) -> None:
        body = one.body
        if isinstance(body, obs.CheckpointSeen) and one.job in self.dossiers:
            seen = Checkpoint(body.path, body.step, complete=True, finite=True, seen_at=one.received_at)
            self.dossiers[one.job] = with_checkpoint(self.dossiers[one.job], seen)


def _quarantined(dossier: Dossier, answer: Answer) -> Dossier:
    """The dossier as it is once the decision is performed; in a dry run nothing is."""
    decision = answer.decision
    if decision is None or decision.action is not Action.ROLLBACK or decision.outcome is Outcome.DRY_RUN:
        return dossier
    for one in dossier.checkpoints:
        if one.path in decision.quarantine:
            dossier = with_checkpoint(dossier, replace(one, quarantined=True))
    return dossier


def _batches(events: Iterable[Logged]) -> Iterator[obs.Batch]:
    records: defaultdict[str, list[obs.Record]] = defaultdict(list)
    for one in events:
        if not isinstance(one.body, obs.Progress):
            records[one.incarnation].append(obs.Record(one.seq, one.at, one.body))
    for incarnation, of_one in records.items():
        yield obs.Batch(incarnation, tuple(of_one))


class _Ahead:
    """How far ranks may have come: not past the next round that they are yet to report as bad."""

    def __init__(self, events: Sequence[Logged]) -> None:
        self._bad: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
        for one in events:
            if isinstance(one.body, obs.NonFinite):
                self._bad[one.incarnation].append((one.seq, one.body.round))

    def progress(self, state: State, events: Iterable[Logged]) -> tuple[obs.Progress, ...]:
        """The progress of all ranks of the attempts that reported a bad round."""
        newest: dict[str, obs.NonFinite | obs.Skipped] = {}
        for one in events:
            journal = state.journals.get(one.incarnation)
            if isinstance(one.body, obs.NonFinite | obs.Skipped) and journal and journal.rank:
                attempt = state.attempts[journal.rank.attempt]
                for incarnation in attempt.ranks.values():
                    known = newest.get(incarnation)
                    if known is None or one.body.round > known.round:
                        newest[incarnation] = one.body
        found = (self._of(state, incarnation, body) for incarnation, body in newest.items())
        return tuple(found)

    def _of(self, state: State, incarnation: str, body: obs.NonFinite | obs.Skipped) -> obs.Progress:
        journal = state.journals[incarnation]
        to_come = [round_ for seq, round_ in self._bad[incarnation] if seq > journal.high_seq]
        so_far = {round_ for seq, round_ in self._bad[incarnation] if seq <= journal.high_seq}
        passed = min([body.round + 1, *to_come])
        return obs.Progress(
            incarnation=incarnation,
            round=passed,
            step=body.step,
            last_bad_round=body.round if passed > body.round else None,
            bad_rounds=len(so_far),
            reduced_round=passed,
            probe_seconds=0.0,
            train_seconds=0.0,
            ended=False,
            malformed_lines=0,
            journal_records=journal.high_seq + 1,
        )
