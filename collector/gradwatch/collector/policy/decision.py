"""A decision, what it rests on, and what can become of it. Pure.

Leaf module of frozen values. Annotations are evaluated at run time, since the store and the API
derive their JSON from them.
"""

import enum
import hashlib
from dataclasses import dataclass, replace

from gradwatch.collector.errors import IllegalTransitionError
from gradwatch.collector.policy.model import Action, Scope


class Outcome(str, enum.Enum):
    """What has become of a decision."""

    RECORDED = "recorded"  # there is nothing to perform
    DRY_RUN = "dry_run"
    PENDING = "pending"
    PERFORMED = "performed"
    FAILED = "failed"
    REFUSED = "refused"  # by whoever was to perform it: it came too late


# Everything that is not in here is final.
TRANSITIONS: dict[Outcome, frozenset[Outcome]] = {
    Outcome.PENDING: frozenset({Outcome.PERFORMED, Outcome.FAILED, Outcome.REFUSED}),
}


class Unfit(str, enum.Enum):
    """Why a checkpoint is not one to go back to."""

    QUARANTINED = "quarantined"
    GONE = "gone"
    INCOMPLETE = "incomplete"
    NOT_SCANNED = "not_scanned"
    NONFINITE = "nonfinite"
    NONFINITE_BUFFER = "nonfinite_buffer"
    STEP_UNKNOWN = "step_unknown"
    TOO_NEW = "too_new"


class Verdict(str, enum.Enum):
    """What came of holding a rule against an incident."""

    MATCHES = "matches"
    DIFFERS = "differs"
    UNKNOWN = "unknown"  # something that it asks for is not known
    NOT_YET = "not_yet"  # it may match while the incident goes on


@dataclass(frozen=True, slots=True)
class Looked:
    """One rule, held against the incident."""

    rule: str
    verdict: Verdict
    why: str


@dataclass(frozen=True, slots=True)
class PassedOver:
    """A checkpoint that was not chosen."""

    path: str
    step: int | None
    unfit: Unfit
    why: str


@dataclass(frozen=True, slots=True)
class Spent:
    """Where a budget stands before the decision."""

    scope: Scope
    used: int
    max: int
    per: int | None

    @property
    def exhausted(self) -> bool:
        """Whether it allows no more."""
        return self.used >= self.max


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a decision rests on.

    Attributes:
        facts: what was known of the incident, by match key; null for what was not.
        rules: all that were looked at, in order.
    """

    facts: dict[str, str | int | bool | None]
    rules: tuple[Looked, ...] = ()
    passed_over: tuple[PassedOver, ...] = ()
    budgets: tuple[Spent, ...] = ()


@dataclass(frozen=True, slots=True)
class Target:
    """The checkpoint that a rollback goes back to."""

    path: str
    step: int


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided about an incident.

    Attributes:
        id: the same whenever it is decided from the same incident, rule and generation.
        incident: None when an operator asked for it.
        reason: a sentence.
        effect: what is, or in a dry run would be, done; a sentence.
        first_bad_step: the checkpoint must be older.
        quarantine: paths of the checkpoints that are to be kept from being resumed from.
        exclude_node: a node that the job is to go on without.
        at: in seconds since the epoch.
        in_process: the ranks went back themselves, without a restart.
        concluded: why it has its outcome, once it is no longer pending.
    """

    id: str
    job: str
    run: int
    generation: int
    incident: str | None
    action: Action
    outcome: Outcome
    rule: str | None
    reason: str
    effect: str
    policy_hash: str
    at: float
    evidence: Evidence
    checkpoint: Target | None = None
    first_bad_step: int | None = None
    quarantine: tuple[str, ...] = ()
    skip_batches: int = 0
    exclude_node: str | None = None
    in_process: bool = False
    concluded: str | None = None


def decision_id(incident: str, rule: str | None, generation: int) -> str:
    """The id of a decision: twelve hexadecimal digits."""
    place = "\0".join([incident, rule or "", str(generation)])
    return hashlib.sha256(place.encode()).hexdigest()[:12]


def conclude(decision: Decision, outcome: Outcome, why: str) -> Decision:
    """The decision with what became of it.

    Raises:
        IllegalTransitionError: it is not pending, or cannot become that.
    """
    if outcome not in TRANSITIONS.get(decision.outcome, frozenset()):
        raise IllegalTransitionError(
            f"decision {decision.id} is {decision.outcome.value}; it cannot become {outcome.value}"
        )
    return replace(decision, outcome=outcome, concluded=why)
