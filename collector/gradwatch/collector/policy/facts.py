"""What is known of an incident, in the words of `match`. What is not known says why. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from gradwatch.collector.evidence import first_step, made_weights_bad
from gradwatch.collector.model import Cause, Status
from gradwatch.collector.policy.dossier import bad_steps_in_a_row, past_of
from gradwatch.collector.policy.model import Action, Mode, Reflex

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gradwatch.collector.model import Incident, State
    from gradwatch.collector.observations import Phase, Value
    from gradwatch.collector.policy.dossier import Dossier
    from gradwatch.collector.policy.model import Policy


@dataclass(frozen=True, slots=True)
class Unknown:
    """Something is not known, and why."""

    why: str


_T = TypeVar("_T")
Known: TypeAlias = _T | Unknown


@dataclass(frozen=True, slots=True)
class Past:
    """An incident before this one."""

    rank: int | None
    step: int | None


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of an incident.

    Attributes:
        step: the first bad one of any origin.
        weights_bad: of an update, whether the weights are bad since.
        earlier: the job's incidents before this one that were not ignored.
        goes_on: the incident is open; numbers may yet grow.
    """

    cause: Known[Cause]
    phase: Known[Phase]
    value: Known[Value]
    step: Known[int]
    rank: Known[int]
    node: Known[str]
    parameter: Known[str]
    origins: Known[int]
    consecutive_bad_steps: Known[int]
    guard_exhausted: Known[bool]
    weights_bad: Known[bool]
    earlier: tuple[Past, ...]
    goes_on: bool

    def count(self, *, same_rank: bool, within_steps: int | None) -> Known[int]:
        """The job's incidents up to this one, it included.

        Args:
            same_rank: only those with its first rank.
            within_steps: only those at most so many steps away.
        """
        if same_rank and isinstance(self.rank, Unknown):
            return self.rank
        if within_steps is not None and isinstance(self.step, Unknown):
            return self.step
        return 1 + sum(
            (not same_rank or past.rank == self.rank)
            and (within_steps is None or _near(past.step, self.step, within_steps))
            for past in self.earlier
        )

    def as_evidence(self) -> dict[str, str | int | bool | None]:
        """The facts by match key; null for what is not known."""
        count = self.count(same_rank=False, within_steps=None)
        same_rank = self.count(same_rank=True, within_steps=None)
        return {
            "cause": None if isinstance(self.cause, Unknown) else self.cause.value,
            "phase": None if isinstance(self.phase, Unknown) else self.phase.value,
            "value": None if isinstance(self.value, Unknown) else self.value.value,
            "step": _or_none(self.step),
            "rank": _or_none(self.rank),
            "node": _or_none(self.node),
            "parameter": _or_none(self.parameter),
            "origins": _or_none(self.origins),
            "count": _or_none(count),
            "count_of_same_rank": _or_none(same_rank),
            "consecutive_bad_steps": _or_none(self.consecutive_bad_steps),
            "guard_exhausted": _or_none(self.guard_exhausted),
        }


def facts_of(state: State, dossier: Dossier, policy: Policy, incident: Incident) -> Facts:
    """What is known of an incident.

    Args:
        state: the collector's.
        dossier: of the incident's job.
        policy: its guard is asked.
        incident: one of the state's.
    """
    first = incident.verdict.first
    cause = incident.verdict.cause
    why = "it has no first rank" if cause is None else f"the cause {cause.value} has no first rank"
    nobody = Unknown(why)
    bad_steps = bad_steps_in_a_row(dossier, state, incident.attempt)
    return Facts(
        cause=Unknown("what caused it is not known") if cause is None else cause,
        phase=nobody if first is None else _said(first.phase, "where it began on the first rank"),
        value=nobody if first is None else _said(first.value, "which value it was"),
        step=first_step(incident.evidence),
        rank=nobody if first is None else first.rank,
        node=nobody if first is None else _said(first.node or None, "the first rank's node"),
        parameter=nobody if first is None else _said(first.parameter, "the first bad parameter"),
        origins=len(incident.verdict.origins) if incident.verdict.origins else nobody,
        consecutive_bad_steps=Unknown("no bad step was reported") if bad_steps is None else bad_steps,
        guard_exhausted=_guard_exhausted(dossier, policy, incident),
        weights_bad=_weights_bad(policy, incident),
        earlier=tuple(_earlier(state, dossier, incident)),
        goes_on=incident.status is not Status.CLOSED,
    )


def first_bad_step(facts: Facts) -> int | None:
    """The step that a checkpoint must be older than; None when it is not known."""
    return _or_none(facts.step)


def _guard_exhausted(dossier: Dossier, policy: Policy, incident: Incident) -> Known[bool]:
    past = past_of(dossier, incident.attempt)
    if past.exhausted_round is not None and past.exhausted_round >= incident.evidence.first_round:
        return True
    if policy.guard.on_nonfinite is Reflex.OFF:
        return False
    if past.guard_off is not None:
        return Unknown(f"the guard cannot act on some rank: {past.guard_off}")
    return False


def _weights_bad(policy: Policy, incident: Incident) -> Known[bool]:
    first = incident.verdict.first
    if incident.verdict.cause is not Cause.UPDATE or first is None:
        return Unknown("it is no update")
    known = made_weights_bad(incident.evidence, first)
    if known is not None:
        return known
    # Without a guard nothing keeps the optimizer from what it was given.
    if policy.guard.on_nonfinite is Reflex.OFF or policy.mode is Mode.DRY_RUN:
        return True
    return Unknown("whether the update was skipped is not known")


def _earlier(state: State, dossier: Dossier, incident: Incident) -> Iterator[Past]:
    """The job's incidents before this one in logical time, those left out that were ignored."""
    ignored = {one.incident for one in dossier.decisions if one.action is Action.IGNORE}
    for attempt in state.jobs[dossier.job].attempts:
        for id_ in state.attempts[attempt].incidents:
            if id_ == incident.id:
                return
            other = state.incidents[id_]
            if id_ in ignored or other.status is Status.SUSPECTED:
                continue
            first = other.verdict.first
            yield Past(None if first is None else first.rank, first_step(other.evidence))


def _near(one: int | None, other: Known[int], steps: int) -> bool:
    return one is not None and not isinstance(other, Unknown) and abs(one - other) <= steps


def _said(value: _T | None, what: str) -> Known[_T]:
    return Unknown(f"{what} is not known") if value is None else value


def _or_none(value: Known[_T]) -> _T | None:
    return None if isinstance(value, Unknown) else value
