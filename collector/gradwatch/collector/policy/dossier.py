"""What deciding about a job rests on besides the collector's state: its past, kept up. Pure.

Leaf module of frozen values, kept by the store in the transaction of the changes they come from.
Annotations are evaluated at run time, since the store derives its JSON codec from them.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

from gradwatch.collector.model import AttemptId, Changes, RankState, State
from gradwatch.collector.observations import GuardOff, NonFinite, Skipped
from gradwatch.collector.policy.decision import Decision
from gradwatch.collector.recovery.model import Halt, Loaders, Recovery, Root, Save

# Older runs of bad steps and older attempts are forgotten: nothing asks for them.
_RUNS = 16
_ATTEMPTS = 16


class Moment(NamedTuple):
    """A round and its step."""

    round: int
    step: int


@dataclass(frozen=True, slots=True)
class Run:
    """Bad steps in a row."""

    first: Moment
    last: Moment

    @property
    def steps(self) -> int:
        """How many."""
        return self.last.step - self.first.step + 1


@dataclass(frozen=True, slots=True)
class AttemptPast:
    """What one attempt has been through.

    Attributes:
        runs: in logical order, the newest last.
        exhausted_round: the newest round in which the guard said that a limit is reached.
        guard_off: why the guard cannot act on some rank.
    """

    attempt: AttemptId
    runs: tuple[Run, ...] = ()
    exhausted_round: int | None = None
    guard_off: str | None = None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One line of the ledger.

    Attributes:
        path: the same path saved again is a new line, in the old one's place.
        step: update attempts before the save began; None when it is not known.
        complete: all of it is on disk.
        finite: parameters and optimizer state; None when they were not scanned.
        bad_buffers: names of buffers that are not finite.
        seen_at: when it was found, in seconds since the epoch.
        quarantined: no more to be resumed from.
        gone: it is no longer where it was.
        modified_at: newest modification time of its files, in seconds since the epoch.
        found: what is wrong with it, in words; empty when nothing is.
    """

    path: str
    step: int | None
    complete: bool
    finite: bool | None
    bad_buffers: tuple[str, ...] = ()
    seen_at: float = 0.0
    quarantined: bool = False
    gone: bool = False
    modified_at: float = 0.0
    found: str = ""


@dataclass(frozen=True, slots=True)
class Dossier:
    """All that deciding about one job needs to remember.

    Attributes:
        decisions: all there ever were, in the order in which they were taken.
        checkpoints: the ledger.
        attempts: the newest, in logical order.
        saves: that ranks told of, oldest first.
        roots: sidecars that can look after the checkpoints.
        recovery: the rollback that is being performed.
        halt: set when the job is stopped for good.
        loaders: of the newest attempt that can load in process.
    """

    job: str
    decisions: tuple[Decision, ...] = ()
    checkpoints: tuple[Checkpoint, ...] = ()
    attempts: tuple[AttemptPast, ...] = ()
    saves: tuple[Save, ...] = ()
    roots: tuple[Root, ...] = ()
    recovery: Recovery | None = None
    halt: Halt | None = None
    loaders: Loaders | None = None


def with_decision(dossier: Dossier, decision: Decision) -> Dossier:
    """The dossier with a new decision, or with what became of a known one."""
    others = [known for known in dossier.decisions if known.id != decision.id]
    if len(others) == len(dossier.decisions):
        return replace(dossier, decisions=(*others, decision))
    return replace(
        dossier,
        decisions=tuple(decision if known.id == decision.id else known for known in dossier.decisions),
    )


def with_checkpoint(dossier: Dossier, checkpoint: Checkpoint) -> Dossier:
    """The dossier with a new line in the ledger, or with what has become known of that path."""
    others = [known for known in dossier.checkpoints if known.path != checkpoint.path]
    return replace(dossier, checkpoints=(*others, checkpoint))


def past_of(dossier: Dossier, attempt: AttemptId) -> AttemptPast:
    """What an attempt has been through."""
    return next((past for past in dossier.attempts if past.attempt == attempt), AttemptPast(attempt))


def observe(dossier: Dossier, state: State, changes: Changes) -> Dossier:
    """The dossier with what a report brought.

    Args:
        dossier: the job's.
        state: after the changes.
        changes: what the report changed; other jobs' are passed over.
    """
    pasts = {past.attempt: past for past in dossier.attempts}
    for event in changes.events:
        attempt, body = event.attempt, event.body
        if attempt is None or event.job != dossier.job:
            continue
        past = pasts.get(attempt, AttemptPast(attempt))
        if isinstance(body, Skipped) or (isinstance(body, NonFinite) and not body.loss_scale_overflow):
            past = replace(past, runs=_with(past.runs, _single(body)))
        if isinstance(body, Skipped) and body.exhausted:
            past = replace(past, exhausted_round=max(body.round, past.exhausted_round or 0))
        elif isinstance(body, GuardOff):
            past = replace(past, guard_off=body.reason)
        pasts[attempt] = past
    for journal in changes.journals.values():
        rank = journal.rank
        if rank is not None and rank.attempt in pasts:
            past = pasts[rank.attempt]
            pasts[rank.attempt] = replace(past, runs=_stretched(past.runs, rank))
    order = {attempt: place for place, attempt in enumerate(state.jobs[dossier.job].attempts)}
    known = sorted(
        (past for past in pasts.values() if past.attempt in order), key=lambda past: order[past.attempt]
    )
    return replace(dossier, attempts=tuple(known[-_ATTEMPTS:]))


def bad_steps_in_a_row(dossier: Dossier, state: State, attempt: AttemptId) -> int | None:
    """How many bad steps the attempt's newest run has; None when no bad step of it is known.

    Where an attempt is bad from its first round on, it goes on with the run its predecessor ended in.
    """
    past = past_of(dossier, attempt)
    if not past.runs:
        return None
    newest = past.runs[-1]
    steps = newest.steps
    if newest.first.round > 0:
        return steps
    attempts = state.jobs[dossier.job].attempts
    before = attempts[: attempts.index(attempt)] if attempt in attempts else ()
    if not before:
        return steps
    earlier = past_of(dossier, before[-1]).runs
    # A clean round after the last bad one ended that run.
    if not earlier or state.attempts[before[-1]].reduced_round > earlier[-1].last.round + 1:
        return steps
    return steps + (bad_steps_in_a_row(dossier, state, before[-1]) or 0)


def _single(body: NonFinite | Skipped) -> Run:
    moment = Moment(body.round, body.step)
    return Run(moment, moment)


def _with(runs: tuple[Run, ...], more: Run) -> tuple[Run, ...]:
    """The runs with more bad steps, whatever the order in which they become known."""
    merged: list[Run] = []
    for run in sorted((*runs, more), key=lambda run: (run.first, run.last)):
        before = merged[-1] if merged else None
        if before is not None and before.first.step <= run.first.step <= before.last.step + 1:
            merged[-1] = Run(before.first, max(before.last, run.last))
        else:
            merged.append(run)
    return tuple(merged[-_RUNS:])


def _stretched(runs: tuple[Run, ...], rank: RankState) -> tuple[Run, ...]:
    """The runs with the rounds that were bad too, but were only counted.

    Their steps are known where the job has one round per step; else they are left out, and the
    number of bad steps is a lower bound.
    """
    progress, through, seen = rank.relied, rank.bad_through, rank.last_round_seen
    if progress is None or through is None or seen is None:
        return runs
    for run in runs:
        last = run.last
        if run.first.round <= seen <= last.round < through:
            one_to_one = progress.step - last.step >= progress.round - 1 - last.round
            more = Run(last, Moment(through, last.step + through - last.round))
            return _with(runs, more) if one_to_one else runs
    return runs
