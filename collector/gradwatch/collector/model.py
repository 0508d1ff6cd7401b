"""What the collector knows: jobs, attempts, journals, incidents.

Leaf module of frozen values. Maps are never changed in place. Annotations are evaluated
at run time, since the store derives its JSON codec from them.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from gradwatch.collector.observations import (
    Autopsy,
    BadLoss,
    BadWeight,
    Body,
    Checksum,
    DropReason,
    Exploding,
    Flight,
    Hello,
    OperatorInput,
    Phase,
    Progress,
    Rehearsal,
    Unwatched,
    UpdateEvidence,
    Value,
)


class Cause(str, enum.Enum):
    """What made the job's gradients non-finite."""

    INPUT = "input"
    PARAMETER = "parameter"
    FORWARD = "forward"
    LOSS = "loss"
    BACKWARD = "backward"
    UPDATE = "update"
    REDUCTION = "reduction"
    LOSS_SCALE = "loss_scale"
    OPTIMIZER_STATE = "optimizer_state"
    REPLICA_DIVERGENCE = "replica_divergence"


class Status(str, enum.Enum):
    """How far an incident has come."""

    SUSPECTED = "suspected"
    CONFIRMED = "confirmed"
    CLOSED = "closed"


class CloseReason(str, enum.Enum):
    """Why an incident was closed."""

    CLEAN_ROUNDS = "clean_rounds"
    ROLLBACK = "rollback"
    ATTEMPT_OVER = "attempt_over"
    JOB_ENDED = "job_ended"


class UnknownReason(str, enum.Enum):
    """Why it is not known whether a rank was clean in an incident's first round."""

    WAITING = "waiting"  # only while the incident is suspected
    PROCESS_ENDED = "process_ended"
    LAUNCH_ENDED = "launch_ended"
    ATTEMPT_OVER = "attempt_over"
    SILENT = "silent"
    NEVER_SEEN = "never_seen"
    RECORDS_LOST = "records_lost"


class RankCondition(str, enum.Enum):
    """What is known of a rank's process."""

    WATCHED = "watched"
    ENDED = "ended"
    MISSING = "missing"  # no hello yet


class AttemptId(NamedTuple):
    """An attempt's place in logical time."""

    job: str
    generation: int
    number: int


@dataclass(frozen=True, slots=True)
class RankState:
    """What is known of one rank in one attempt.

    Attributes:
        heard_at: when something new of it last arrived, in the collector's time.
        progress: the newest.
        relied: the newest of which all records that it speaks of have arrived.
        watermark: rounds below it were looked at, and all that was journalled about them is here.
        gaps: stretches of rounds (both ends included) of which something may have been lost.
        bad_rounds_seen: rounds of which at least one non-finite record has arrived.
        last_round_seen: the newest of these.
        bad_rounds_unlisted: rounds that were bad, but were only counted.
        bad_through: the newest bad round, listed or not.
    """

    hello: Hello
    attempt: AttemptId
    heard_at: float
    progress: Progress | None = None
    relied: Progress | None = None
    watermark: int = 0
    gaps: tuple[tuple[int, int], ...] = ()
    step: int | None = None
    bad_rounds_seen: int = 0
    last_round_seen: int | None = None
    bad_rounds_unlisted: int = 0
    bad_through: int | None = None
    nonfinite_events: int = 0


@dataclass(frozen=True, slots=True)
class Journal:
    """One journal, known by its incarnation.

    Attributes:
        job: None when the journal never said whose it is.
        run: the job's run when it said so.
        high_seq: records up to it have arrived; -1 for none.
        logged_seq: the newest record of it in the log of events; -1 for none.
        refused: the records of this journal do not count, for this reason.
        rank: set when it is the journal of a rank that counts.
        launch: set when it is a launcher's.
    """

    incarnation: str
    job: str | None
    run: int = 0
    high_seq: int = -1
    refused: DropReason | None = None
    rank: RankState | None = None
    launch: str | None = None
    malformed_lines: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    faults_counted: Mapping[str, int] = field(default_factory=dict)
    faults_recorded: Mapping[str, int] = field(default_factory=dict)
    logged_seq: int = -1


class Kind(str, enum.Enum):
    """What a rank saw."""

    GRADIENT = "gradient"  # of its own, before the reduction
    REDUCED = "reduced"  # after the reduction, its own having been finite
    OVERFLOW = "overflow"  # finite, and too large for the optimizer's second moment
    REPLICA = "replica"  # parameters that are not those of the other replicas
    UPDATE = "update"  # an update of which it is shown that it makes weights bad
    WEIGHTS = "weights"  # weights that were found bad


@dataclass(frozen=True, slots=True)
class Overflow:
    """A finite gradient that is too large for the optimizer.

    Attributes:
        magnitude: the largest, of the gradient that the optimizer got.
        limit: above it the second moment overflows.
        own: the largest of this rank's own gradient, before the reduction.
        optimizer: its class.
        skipped: the guard kept the update from being applied.
    """

    magnitude: float
    limit: float
    own: float | None
    optimizer: str
    skipped: bool


@dataclass(frozen=True, slots=True)
class Operator:
    """The operator in which a rank's bad values originate.

    Attributes:
        name: such as `aten.log.default`.
        module: path in the model.
        source: file and line of the user's code.
        code: that line.
        missing: sentences that say what is not known, and why.
    """

    name: str | None
    phase: Phase | None
    module: str | None
    module_class: str | None
    source: str | None
    code: str | None
    inputs: tuple[OperatorInput, ...]
    value: Value | None
    missing: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Update:
    """What is known of an update that made weights bad, or after which they were found so.

    Attributes:
        evidence: what shows that the update makes them so; None when they were only found bad.
        optimizer: its class.
        gradient: the first that was bad at the optimizer's entry; None when none was.
        initial: the weights were bad when the model was wrapped.
    """

    # A NaN is stored as one: JSON's null would be read as "not known".
    __pydantic_config__ = {"ser_json_inf_nan": "strings"}  # noqa: RUF012 - pydantic's own name

    evidence: UpdateEvidence | None
    optimizer: str
    eps: float | None
    learning_rate: float | None
    gradient: str | None
    gradients_total: int
    initial: bool


class KnownModel(NamedTuple):
    """A model that an attempt trains.

    Attributes:
        root: its ordinal in its process.
        module_class: "" when no module is known.
        group: global ranks of its process group; empty when that is the whole world.
    """

    root: int
    module_class: str
    group: tuple[int, ...] = ()

    def is_of(self, rank: int) -> bool:
        """Whether the rank has it."""
        return not self.group or rank in self.group


@dataclass(frozen=True, slots=True)
class WhichModel:
    """One of several models.

    Attributes:
        ordinal: among those with a module, from 0.
    """

    root: int
    module_class: str
    ordinal: int


@dataclass(frozen=True, slots=True)
class Sighting:
    """One rank's non-finite gradient, the earliest in backward order of what was reported together.

    Attributes:
        parameter: whose gradient it is; in the phase `parameter`, whose weight is bad.
        look: which look found it.
        kind: what was seen, if it is no gradient of the rank's own.
        operator: in which it originates, once the micro-batch has been replayed.
        alike_at: of a replica, the step at which it was still like the others.
        root: of the model; None when it is not known.
        model_step: update attempts of that model so far; those of one round are one.
        weights_finite: of all watched models of the process, looked at before the update.
        bad_weights: in the order of the model.
        finite_step: the newest step before which this model's weights were seen finite.
        loss: of the newest backward pass on the rank, before it was scaled.
        loss_note: a sentence on how the loss made them bad.
        exchanged: the process has sent tensors to single ranks, or all to all.
        batch_hash: of the inputs of the bad pass; "" when not taken.
        batch_value: the worst that these held, where it began in them; None when not known.
        gradient: the parameter whose gradient arrived first; None when no gradient was seen.
        update: of bad weights.
        model: which one, where there are several.
        group: ranks of the model's process group, when that is not the whole world; of the first rank only.
        group_unknown: it is not the whole world, and there were too many groups to remember it.
    """

    # A NaN is stored as one: JSON's null would be read as "not known".
    __pydantic_config__ = {"ser_json_inf_nan": "strings"}  # noqa: RUF012 - pydantic's own name

    rank: int
    node: str
    device: str
    device_id: str | None
    step: int
    round: int
    microbatch: int | None
    phase: Phase | None
    parameter: str | None
    module: str | None
    module_class: str | None
    value: Value | None
    count: int | None
    numel: int | None
    dtype: str | None
    backward_position: int | None
    gradients_total: int
    batch: str | None
    look: str
    kind: Kind = Kind.GRADIENT
    overflow: Overflow | None = None
    operator: Operator | None = None
    alike_at: int | None = None
    root: int | None = None
    model_step: int | None = None
    weights_finite: bool | None = None
    bad_weights: tuple[BadWeight, ...] = ()
    bad_weights_total: int = 0
    finite_step: int | None = None
    loss: float | None = None
    loss_note: str = ""
    exchanged: bool = False
    batch_hash: str = ""
    batch_value: Value | None = None
    gradient: str | None = None
    update: Update | None = None
    model: WhichModel | None = None
    group: tuple[int, ...] = ()
    group_unknown: bool = False


class Replayed(NamedTuple):
    """What became of a micro-batch that a rank has replayed."""

    by_rank: int
    autopsy: Autopsy


class Rehearsed(NamedTuple):
    """What became of a clean pass that a rank has replayed."""

    rank: int
    rehearsal: Rehearsal


class Flown(NamedTuple):
    """How it came to a rank's sighting."""

    rank: int
    flight: Flight


class Checked(NamedTuple):
    """A rank's checksum, and where in its journal it is.

    Attributes:
        logged: whether the log of events has it.
    """

    rank: int
    seq: int
    checksum: Checksum
    logged: bool = False


class Own(NamedTuple):
    """A round in which a rank's own gradients were bad while all its weights were finite.

    Attributes:
        given: what entered the model was bad.
    """

    round: int
    rank: int
    step: int
    root: int
    model_step: int
    given: bool
    batch_hash: str


class Skips(NamedTuple):
    """Updates in a row that the guard kept from changing the weights.

    Attributes:
        first_round: the first bad one of the first of them.
        last_round: the first bad one of the last of them.
    """

    first_round: int
    first_step: int
    last_round: int
    last_step: int


@dataclass(frozen=True, slots=True)
class Evidence:
    """Sightings that belong together, reduced to what a verdict needs.

    Attributes:
        last_step: of the newest sighting or skipped update.
        earliest: by rank, its earliest sighting, for the ranks that may be origins.
        contaminated: ranks that were first bad after an update had been applied.
        skips: the newest updates of these rounds that are known to have been skipped.
        reduced: the first round in which some rank saw bad reduced gradients, its own being finite.
        replayed: replays of micro-batches of these rounds, but for those of `received`.
        received: rank and round, where a collective of the forward pass had brought it in from another rank.
        flown: how it came to the earliest sightings.
        weights: by rank, its earliest sighting of bad weights.
        later: by rank, the earliest sightings of the contaminated, where the steps of models are told.
        own: the first rounds in which ranks were bad by themselves.
        rehearsed: replays of clean passes, that speak for replays of these rounds.
    """

    first_round: int
    last_round: int
    earliest: Mapping[int, Sighting]
    contaminated: frozenset[int] = frozenset()
    last_step: int = 0
    skips: Skips | None = None
    reduced: Sighting | None = None
    replayed: tuple[Replayed, ...] = ()
    received: frozenset[tuple[int, int]] = frozenset()
    flown: tuple[Flown, ...] = ()
    weights: Mapping[int, Sighting] = field(default_factory=dict)
    later: Mapping[int, Sighting] = field(default_factory=dict)
    own: tuple[Own, ...] = ()
    rehearsed: tuple[Rehearsed, ...] = ()


class Judgement(str, enum.Enum):
    """What replaying the first rank's micro-batch says of where the fault is."""

    DETERMINISTIC = "deterministic"  # it went bad on another rank too: data or software
    ONLY_THERE = "only_there"  # it went bad again on that rank; another repeated the pass, and it did not
    REPEATED_THERE = "repeated_there"  # it went bad again on that rank; no other one has repeated the pass
    TRANSIENT = "transient"  # nowhere again, though the pass was repeated
    NOT_REPRODUCED = "not_reproduced"  # not again, and the pass is not shown to have been repeated


class LikelyKind(str, enum.Enum):
    """What is likely to be behind an incident."""

    BAD_DATA = "bad_data"
    DEVICE = "device"
    DOMAIN = "domain"
    SATURATION = "saturation"
    PRECISION = "precision"
    HYPERPARAMETERS = "hyperparameters"
    EXPLODING_GRADIENTS = "exploding_gradients"
    INITIALISATION = "initialisation"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Guess:
    """A likely cause.

    Attributes:
        because: the evidence, a sentence.
        remedy: what to do about it, a sentence.
    """

    kind: LikelyKind
    because: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """Who was first, as far as it is known.

    Attributes:
        likely: the likeliest first; empty while it is suspected only.
        doubts: why a replay is not shown to have repeated the pass.
        before: steps of the attempt's incidents before this one with the same first rank.
    """

    cause: Cause | None
    first: Sighting | None
    origins: tuple[Sighting, ...]
    tie: bool
    clean_ranks: tuple[int, ...]
    unknown_ranks: Mapping[int, UnknownReason]
    contaminated_ranks: tuple[int, ...]
    sentences: tuple[str, ...]
    judgement: Judgement | None = None
    likely: tuple[Guess, ...] = ()
    doubts: tuple[str, ...] = ()
    before: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Incident:
    """A stretch of rounds with non-finite gradients, and its verdict."""

    id: str
    attempt: AttemptId
    run: int
    status: Status
    evidence: Evidence
    verdict: Verdict
    opened_at: float
    confirmed_at: float | None = None
    closed_at: float | None = None
    close_reason: CloseReason | None = None


@dataclass(frozen=True, slots=True)
class Attempt:
    """The ranks that share one rendezvous.

    Attributes:
        ranks: by rank, the incarnation of its journal.
        pending: evidence apart from the open incident's, in logical order.
        reduced_round: rounds below it had their reduced gradients looked at by some rank.
        last_bad_round: the newest round whose reduced gradients were non-finite.
        step: the newest update attempt that some rank was seen in.
        skips: the newest updates that the guard skipped, in logical order.
        progress_logged: how many rows of the log say how far a rank had come.
        replayed: replays whose sighting is not known yet.
        checksums: of replicas, by model and round, by rank; until all ranks' are here.
        alike_at: by model, the step at which all replicas were last alike.
        diverged: models of which some replica differs.
        growths: first and last step of each stretch in which gradients grew far beyond what they usually are.
        bad_losses: first and last step of each stretch in which a loss was bad, and no gradient.
        models: in order; of one that several groups hold, one for each.
    """

    id: AttemptId
    run: int
    key: str | None
    world_size: int
    ranks: Mapping[int, str] = field(default_factory=dict)
    incidents: tuple[str, ...] = ()
    pending: tuple[Evidence, ...] = ()
    reduced_round: int = 0
    last_bad_round: int | None = None
    step: int = 0
    skips: tuple[Skips, ...] = ()
    progress_logged: int = 0
    replayed: tuple[Replayed, ...] = ()
    checksums: tuple[Checked, ...] = ()
    alike_at: Mapping[str, int] = field(default_factory=dict)
    diverged: frozenset[int] = frozenset()
    growths: tuple[tuple[int, int], ...] = ()
    bad_losses: tuple[tuple[int, int], ...] = ()
    models: tuple[KnownModel, ...] = ()


class Resume(NamedTuple):
    """What ranks say of the checkpoint that they were told to go back to.

    Attributes:
        opened: some rank has opened it.
        ranks: those that have not.
    """

    generation: int
    run: int
    path: str
    opened: bool
    ranks: frozenset[int]


class CommandState(str, enum.Enum):
    """Whether a launcher's command runs."""

    WAITING = "waiting"  # for an order to start it
    RUNNING = "running"
    STOPPED = "stopped"  # and waits for an order
    ENDED = "ended"  # and so has its launcher


@dataclass(frozen=True, slots=True)
class Launch:
    """One `gradwatch run` on one node, or the controller of a framework.

    Attributes:
        generation: the newest in which its command ran.
        policy_hash: of the policy it was given; without one it obeys no order.
        whole_job: it starts and stops the workers of every host.
        stopped_for: the order that its command was stopped for; empty if it ended by itself.
        stopped_code: the exit code of a command that ended by itself.
        restarts: a command that ended by itself is started again whatever is ordered.
        no_restart: why it cannot be stopped and started again; "" when it can.
        by_itself: the newest generation that a framework began without an order; None for none.
    """

    id: str
    generation: int
    node: str | None
    pid: int | None
    started_at: float | None
    ended_at: float | None = None
    exit_code: int | None = None
    ended_by: str | None = None
    command: CommandState = CommandState.RUNNING
    policy_hash: str | None = None
    stopped_for: str | None = None
    stopped_code: int | None = None
    whole_job: bool = False
    restarts: bool = False
    no_restart: str = ""
    by_itself: int | None = None

    @property
    def obeys(self) -> bool:
        """Whether it waits for orders."""
        return self.policy_hash is not None


@dataclass(frozen=True, slots=True)
class JobState:
    """One job, through all its runs, generations and attempts.

    Attributes:
        run: ordinal of the job's runs: a launch after all known launches ended begins the next.
        launches: of this run, by id.
        current: the attempt that trains now; None before a run's first hello.
        dropped_earlier: what of `dropped` was counted before this run.
        incidents_confirmed: by cause, counted when an incident is confirmed.
        warned: by kind, how many warnings there were.
        warnings: the newest of gradients that grow, one of each stretch, with the rank that gave it.
        bad_losses: likewise, of losses that are not finite where gradients are.
        resumes: the newest of each generation that was told to go back to a checkpoint.
    """

    name: str
    generation: int
    first_seen: float
    last_seen: float
    run: int = 0
    current: AttemptId | None = None
    attempts: tuple[AttemptId, ...] = ()
    launches: Mapping[str, Launch] = field(default_factory=dict)
    unwatched: tuple[Unwatched, ...] = ()
    dropped: Mapping[str, int] = field(default_factory=dict)
    dropped_earlier: Mapping[str, int] = field(default_factory=dict)
    nonfinite_events: Mapping[str, int] = field(default_factory=dict)
    incidents_confirmed: Mapping[str, int] = field(default_factory=dict)
    warned: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[tuple[int, Exploding], ...] = ()
    bad_losses: tuple[tuple[int, BadLoss], ...] = ()
    resumes: tuple[Resume, ...] = ()


@dataclass(frozen=True, slots=True)
class State:
    """Everything the collector knows.

    Attributes:
        strays: drops that belong to no known job, by reason.
        parameters: names of a model's parameters, by attempt and model. Not stored: they only name a
            replica's parameter, and are told again in the next attempt.
    """

    jobs: Mapping[str, JobState] = field(default_factory=dict)
    attempts: Mapping[AttemptId, Attempt] = field(default_factory=dict)
    journals: Mapping[str, Journal] = field(default_factory=dict)
    incidents: Mapping[str, Incident] = field(default_factory=dict)
    strays: Mapping[str, int] = field(default_factory=dict)
    parameters: Mapping[tuple[AttemptId, int], tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Event:
    """An accepted record, for the append-only log.

    Attributes:
        seq: of the record; below 0, and no record's, for a progress.
        at: the agent's own time, for people; None when it is not believed.
    """

    job: str
    attempt: AttemptId | None
    rank: int | None
    incarnation: str
    seq: int
    at: float | None
    received_at: float
    body: Body | Progress


class Move(NamedTuple):
    """A change of an incident's status, with what it rests on."""

    incident: str
    job: str
    status: Status
    because: str


@dataclass(frozen=True, slots=True)
class Changes:
    """What a report changed: whole new values, by key, to be stored in one transaction."""

    jobs: Mapping[str, JobState] = field(default_factory=dict)
    attempts: Mapping[AttemptId, Attempt] = field(default_factory=dict)
    journals: Mapping[str, Journal] = field(default_factory=dict)
    incidents: Mapping[str, Incident] = field(default_factory=dict)
    strays: Mapping[str, int] = field(default_factory=dict)
    parameters: Mapping[tuple[AttemptId, int], tuple[str, ...]] = field(default_factory=dict)
    events: tuple[Event, ...] = ()
    moves: tuple[Move, ...] = ()

    def __bool__(self) -> bool:
        """Whether there is anything to store."""
        return bool(
            self.jobs or self.attempts or self.journals or self.incidents or self.strays or self.events
        )


@dataclass(frozen=True, slots=True)
class FoldConfig:
    """What the pure part can be told.

    Attributes:
        confirm_timeout: seconds of silence after which a rank is named unknown.
        clock_skew: seconds by which an agent's clock may be ahead before its time is not believed.
    """

    confirm_timeout: float = 30.0
    clock_skew: float = 300.0


def cause_label(cause: Cause | None) -> str:
    """The word for a cause where null cannot stand."""
    return "unknown" if cause is None else cause.value


def apply(state: State, changes: Changes) -> State:
    """The state after the changes."""
    return State(
        jobs={**state.jobs, **changes.jobs},
        attempts={**state.attempts, **changes.attempts},
        journals={**state.journals, **changes.journals},
        incidents={**state.incidents, **changes.incidents},
        strays={**state.strays, **changes.strays},
        parameters={**state.parameters, **changes.parameters},
    )


def merged(one: Changes, other: Changes) -> Changes:
    """The changes of one, and then of the other."""
    return Changes(
        jobs={**one.jobs, **other.jobs},
        attempts={**one.attempts, **other.attempts},
        journals={**one.journals, **other.journals},
        incidents={**one.incidents, **other.incidents},
        strays={**one.strays, **other.strays},
        parameters={**one.parameters, **other.parameters},
        events=(*one.events, *other.events),
        moves=(*one.moves, *other.moves),
    )


def faults_of(journal: Journal) -> dict[str, int]:
    """Failures inside a process's probe, by part.

    A failure is journalled and counted in the progress file; whichever has come further is right.
    """
    parts = {**journal.faults_counted, **journal.faults_recorded}
    return {
        part: max(journal.faults_counted.get(part, 0), journal.faults_recorded.get(part, 0)) for part in parts
    }
