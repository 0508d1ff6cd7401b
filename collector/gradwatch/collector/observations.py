"""What agents report, as domain values: the journal's records and the progress file.

Leaf module. An absent value is None and means "not known"; it never stands for zero.
Annotations are evaluated at run time, since the store derives its JSON codec from them.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias


class Value(str, enum.Enum):
    """The kind of non-finite number."""

    NAN = "nan"
    POSITIVE_INFINITY = "+inf"
    NEGATIVE_INFINITY = "-inf"


class Phase(str, enum.Enum):
    """Where it began on a rank, in the order in which a micro-batch passes them."""

    INPUT = "input"
    PARAMETER = "parameter"
    FORWARD = "forward"
    LOSS = "loss"
    BACKWARD = "backward"
    UPDATE = "update"  # of the weights, by the optimizer


class DropReason(str, enum.Enum):
    """Why something that was reported is not, or not wholly, part of the state."""

    UNKNOWN_INCARNATION = "unknown_incarnation"  # no hello in that journal
    WRONG_WORLD_SIZE = "wrong_world_size"
    DUPLICATE_RANK = "duplicate_rank"
    STALE_GENERATION = "stale_generation"
    REPEATED_HELLO = "repeated_hello"
    MALFORMED_LINE = "malformed_line"  # counted by the sidecar
    MALFORMED_RECORD = "malformed_record"
    UNKNOWN_RECORD = "unknown_record"  # of a kind that this version does not know
    UNKNOWN_ENUM = "unknown_enum"  # the record is kept, the value is not
    FUTURE_EVENT = "future_event"  # the record is kept, its time is not
    INTERNAL_ERROR = "internal_error"


@dataclass(frozen=True, slots=True)
class Hello:
    """The first line of a rank's journal."""

    job: str
    generation: int
    attempt_key: str | None
    rank: int
    world_size: int
    local_rank: int | None
    node: str
    pid: int
    device: str
    device_id: str | None
    device_name: str | None
    torch_version: str
    probe_version: str
    framework: str
    duplicate_claim: bool


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a wrapped model."""

    name: str
    module: str
    module_class: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class ModelSeen:
    """A model was wrapped.

    Attributes:
        group: global ranks of its process group; empty when that is the whole world.
    """

    root: int
    module_class: str
    wrapper: str
    group_size: int
    parameter_count: int
    parameters: tuple[Parameter, ...]
    group: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class BadGradient:
    """The gradient of one parameter that holds non-finite elements."""

    parameter: str
    module: str
    module_class: str
    value: Value | None
    count: int | None
    numel: int
    dtype: str
    backward_position: int | None


@dataclass(frozen=True, slots=True)
class BadWeight:
    """The weight of one parameter that holds non-finite elements."""

    parameter: str
    value: Value | None
    count: int | None
    numel: int


@dataclass(frozen=True, slots=True)
class NonFinite:
    """Non-finite local gradients in one bucket, seen before its reduction.

    Attributes:
        loss_scale_overflow: a GradScaler at work, which skips the update by itself: no fault.
        model_step: update attempts of this model so far, from 0; those of one round are one.
        weights_finite: of all watched models of the process, looked at before the update.
        bad_weights: in the order of the model.
        weights_finite_step: the newest step before which this model's weights were seen finite.
        loss: of the newest backward pass on this rank, before it was scaled.
        exchanged: the process has sent tensors to single ranks, or all to all.
        batch_hash: of the inputs of the bad pass; "" when not taken.
        batch_value: the worst that these held, where it began in them; None when not known.
        loss_note: a sentence on how the loss made them bad; "" when there is none.
    """

    # A NaN is stored as one: JSON's null would be read as "not known".
    __pydantic_config__ = {"ser_json_inf_nan": "strings"}  # noqa: RUF012 - pydantic's own name

    root: int
    round: int
    step: int
    microbatch: int | None
    phase: Phase | None
    bucket: int
    gradients: tuple[BadGradient, ...]
    gradients_total: int
    batch: str | None
    source: str
    loss_scale_overflow: bool = False
    model_step: int | None = None
    weights_finite: bool | None = None
    bad_weights: tuple[BadWeight, ...] = ()
    bad_weights_total: int = 0
    weights_finite_step: int | None = None
    loss: float | None = None
    exchanged: bool = False
    batch_hash: str = ""
    batch_value: Value | None = None
    loss_note: str = ""


class UpdateEvidence(str, enum.Enum):
    """What shows that an update made weights bad."""

    GRADIENTS = "gradients"  # finite after the reduction, bad when the optimizer took them
    STATE = "state"  # the optimizer's state is bad
    EPSILON = "epsilon"  # a second moment of 0, and an eps that is 0 in that dtype
    LEARNING_RATE = "learning_rate"  # it was not finite
    SEEN = "seen"  # the weights were finite right before the update, and bad right after it


@dataclass(frozen=True, slots=True)
class BadWeights:
    """Weights are bad, or are about to be made so by an update. Said once, until they are finite again.

    Attributes:
        round: the newest that was reduced.
        step: of the update, or the one before which they were looked at.
        weights: in the order of the model.
        evidence: what shows that the update makes them so; None when they were only found bad.
        gradients: bad at the optimizer's entry.
        optimizer: its class.
        finite_step: the newest before which they were seen finite.
        initial: they were so when the model was wrapped.
    """

    # A NaN is stored as one: JSON's null would be read as "not known".
    __pydantic_config__ = {"ser_json_inf_nan": "strings"}  # noqa: RUF012 - pydantic's own name

    root: int
    round: int
    step: int
    model_step: int | None
    weights: tuple[BadWeight, ...]
    weights_total: int
    evidence: UpdateEvidence | None
    gradients: tuple[BadGradient, ...]
    gradients_total: int
    optimizer: str
    eps: float | None
    learning_rate: float | None
    finite_step: int | None
    batch: str | None
    initial: bool


@dataclass(frozen=True, slots=True)
class BadLoss:
    """A warning: a loss that is not finite, of a round whose local gradients all are."""

    # A NaN is stored as one: JSON's null would be read as "not known".
    __pydantic_config__ = {"ser_json_inf_nan": "strings"}  # noqa: RUF012 - pydantic's own name

    root: int
    round: int
    step: int
    loss: float
    batch: str | None


@dataclass(frozen=True, slots=True)
class Reduced:
    """Reduced gradients that are non-finite though the rank's own were finite.

    Attributes:
        gradients: without a backward position.
        loss_scale_overflow: a GradScaler at work: no fault.
    """

    root: int
    round: int
    step: int
    gradients: tuple[BadGradient, ...]
    gradients_total: int
    loss_scale_overflow: bool = False


@dataclass(frozen=True, slots=True)
class OptimizerState:
    """A finite gradient whose square overflows the optimizer's second moment; every rank says so.

    Attributes:
        magnitude: the largest, of the gradient that the optimizer got.
        limit: above it the second moment overflows.
        local_magnitude: of this rank's own gradient, before the reduction.
        parameters_total: how many are over the limit; the one furthest over it is named.
        optimizer: its class.
        skipped: the guard keeps the update from being applied.
    """

    root: int
    round: int
    step: int
    parameter: str
    module: str
    module_class: str
    dtype: str
    numel: int
    magnitude: float
    limit: float
    local_magnitude: float | None
    parameters_total: int
    optimizer: str
    skipped: bool
    batch: str | None


@dataclass(frozen=True, slots=True)
class Exploding:
    """A warning: a local gradient, finite still, has grown far beyond what it usually is.

    Attributes:
        magnitude: the largest, of the local gradient.
        usual: the median of the steps before.
        parameters_total: how many have grown so far; the one that has grown most is named.
    """

    root: int
    round: int
    step: int
    parameter: str
    module: str
    module_class: str
    magnitude: float
    usual: float
    parameters_total: int


@dataclass(frozen=True, slots=True)
class FlightStep:
    """One step of a flight.

    Attributes:
        learning_rate: the largest of the optimizer's groups.
        magnitude: the largest of all local gradients.
        magnitudes: by parameter, as in `Flight.parameters`.
    """

    # A NaN is stored as one: JSON's null would be read as "not known".
    __pydantic_config__ = {"ser_json_inf_nan": "strings"}  # noqa: RUF012 - pydantic's own name

    round: int
    step: int
    loss: float | None
    loss_scale: float | None
    learning_rate: float | None
    magnitude: float | None
    magnitudes: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Flight:
    """How it came to this: the last steps before the first bad round of a stretch.

    Attributes:
        parameters: those that are told of, in the order of the model.
        steps: oldest first; the bad round is the last.
        dtype_max: of the parameters' dtype.
    """

    root: int
    round: int
    step: int
    parameters: tuple[str, ...]
    steps: tuple[FlightStep, ...]
    dtype_max: float
    dtype: str


class Replay(str, enum.Enum):
    """What became of a micro-batch that was replayed."""

    REPRODUCED = "reproduced"
    FINITE = "finite"
    RECEIVED = "received"  # by a collective in the forward pass, all being finite until then
    NOT_DONE = "not_done"


@dataclass(frozen=True, slots=True)
class OperatorInput:
    """A tensor or a number that went into an operator.

    Attributes:
        min: of its finite elements, like `max`.
        nonfinite: how many elements are not.
        empty_rows: of what is normalised, how many of its rows have no finite element.
    """

    dtype: str
    shape: tuple[int, ...]
    min: float | None
    max: float | None
    nonfinite: int
    empty_rows: int | None = None

    @property
    def is_number(self) -> bool:
        """Whether it is a constant such as an epsilon, and has no range."""
        return self.dtype in {"float", "int"} and not self.shape


@dataclass(frozen=True, slots=True)
class Autopsy:
    """A bad micro-batch has been replayed, by the rank whose it is or by another one.

    Attributes:
        of_rank: whose micro-batch it is.
        reason: why it could not be replayed; else empty.
        phase: in which pass the operator ran, forward or backward.
        operator: in which the bad output originates.
        module: path in the model of the module in which it ran.
        source: file and line of the user's code.
        code: that line.
        inputs: of the operator.
        value: what it gave.
        missing: sentences that say what is not known, and why.
        seconds: that the training waited.
        nbytes: that were kept for it.
        faithful: whether the replay is shown to have repeated the pass; None when nothing was finite to
            compare, and a `Rehearsal` decides.
        doubts: why it is not shown, in phrases.
    """

    root: int
    round: int
    step: int
    microbatch: int | None
    of_rank: int
    replay: Replay
    reason: str
    phase: Phase | None
    operator: str | None
    module: str | None
    module_class: str | None
    source: str | None
    code: str | None
    inputs: tuple[OperatorInput, ...]
    value: Value | None
    missing: tuple[str, ...]
    seconds: float
    nbytes: int
    faithful: bool | None = None
    doubts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """A clean pass of the same model was replayed once after a bad one.

    Attributes:
        round: of the clean pass.
        of_round: of the bad pass whose replay it speaks for.
        equal: it came out equal to the bit.
        doubts: why it did not, in phrases.
    """

    root: int
    round: int
    step: int
    of_round: int
    equal: bool
    doubts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Resumed:
    """Before a rank's first update: whether it has opened what the job was told to go back to."""

    path: str
    opened: bool


@dataclass(frozen=True, slots=True)
class Checksum:
    """A checksum of the parameters before a step, which replicas have in common.

    Attributes:
        parameters: how many, in the order of the model's record.
        sums: of all parameters, then for each bit of a parameter's ordinal of those that have it set.
    """

    root: int
    round: int
    step: int
    parameters: int
    sums: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CheckpointSeen:
    """A checkpoint is being saved, or was by the script's own word.

    Attributes:
        path: absolute; empty when it goes into a buffer.
        step: of the update attempt under way when the save began.
        declared: by `checkpoint_saved`.
    """

    path: str
    step: int | None
    declared: bool = False


@dataclass(frozen=True, slots=True)
class Fault:
    """A part of the probe failed and switched itself off."""

    part: str
    error: str


@dataclass(frozen=True, slots=True)
class Unwatched:
    """A process of the job trains, but nothing in it is watched."""

    job: str
    generation: int
    node: str
    pid: int
    rank: int | None
    world_size: int | None
    reason: str


@dataclass(frozen=True, slots=True)
class LaunchStarted:
    """A launcher has begun on a node.

    Attributes:
        policy_hash: set when it was given a policy; then it starts the command at an order only, and obeys.
        whole_job: it starts and stops the workers of every host.
    """

    job: str
    generation: int
    launch: str
    node: str
    pid: int
    command: tuple[str, ...]
    policy_hash: str | None = None
    whole_job: bool = False


@dataclass(frozen=True, slots=True)
class LaunchEnded:
    """A launcher's command ended."""

    job: str
    generation: int
    launch: str
    exit_code: int
    ended_by: str


@dataclass(frozen=True, slots=True)
class Skipped:
    """The guard kept an update from changing the weights; every rank says so.

    Attributes:
        round: the first whose reduced gradients were non-finite.
        consecutive: update attempts skipped in a row, this one included.
        in_last_1000: of the last 1,000 attempts.
        exhausted: a limit of the policy is reached.
    """

    step: int
    round: int
    consecutive: int
    in_last_1000: int
    exhausted: bool


@dataclass(frozen=True, slots=True)
class GuardOff:
    """The policy asks for the guard, and on this rank it cannot act."""

    reason: str


@dataclass(frozen=True, slots=True)
class CommandStarted:
    """A launcher has started its command.

    Attributes:
        no_restart: why it cannot be stopped and started again; "" when it can.
    """

    job: str
    generation: int
    launch: str
    no_restart: str = ""


@dataclass(frozen=True, slots=True)
class CommandStopped:
    """A launcher's command does not run, nothing it started lives, and the launcher waits for an order.

    Attributes:
        order: that it was stopped for; empty if it ended by itself.
        exit_code: when it ended by itself.
        restarts: it is started again whatever is ordered.
    """

    job: str
    generation: int
    launch: str
    order: str
    exit_code: int | None
    restarts: bool = False


@dataclass(frozen=True, slots=True)
class CheckpointRoot:
    """A sidecar can look after the checkpoints below this root.

    Attributes:
        error: why it cannot be read; empty when it can.
    """

    job: str
    generation: int
    node: str
    root: str
    error: str
    launch: str = ""


class Completeness(str, enum.Enum):
    """Whether all of a checkpoint is on disk."""

    COMPLETE = "complete"
    IN_FLIGHT = "in_flight"
    TORN = "torn"


class StepSource(str, enum.Enum):
    """Where in a checkpoint a step was found."""

    CHECKPOINT = "checkpoint"  # a key of the saved object
    TRAINER_STATE = "trainer_state"
    OPTIMIZER = "optimizer"
    NAME = "name"


@dataclass(frozen=True, slots=True)
class CheckpointStep:
    """A step that a checkpoint tells itself."""

    source: StepSource
    step: int


@dataclass(frozen=True, slots=True)
class CheckpointScanned:
    """What a scan found; the same path again takes the old one's place.

    Attributes:
        path: absolute.
        completeness: None when that could not be found out.
        reason: completeness in words.
        finite: parameters and optimizer state; None when not known.
        bad_buffers: names of buffers that are not finite.
        modified_at: newest modification time of its files, in seconds since the epoch.
        error: why it could not be scanned; empty when it could.
        found: one bad tensor in words.
        seconds: that the scan took.
    """

    path: str
    layout: str
    completeness: Completeness | None
    reason: str
    finite: bool | None
    bad_buffers: tuple[str, ...]
    steps: tuple[CheckpointStep, ...]
    modified_at: float
    error: str
    found: str
    nbytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class CheckpointGone:
    """A checkpoint that was scanned is no longer there, and not by us."""

    path: str


class TaskKind(str, enum.Enum):
    """What a sidecar can be asked to do with a job's checkpoints."""

    WATCH = "watch"
    SCAN = "scan"
    QUARANTINE = "quarantine"


@dataclass(frozen=True, slots=True)
class TaskDone:
    """A sidecar has done what a task asked for, or could not.

    Attributes:
        error: empty when it was done.
        paths: that were moved.
    """

    id: str
    kind: TaskKind
    error: str
    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CanLoad:
    """The script has said how this rank loads a checkpoint in process."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """In process: this rank has loaded a checkpoint, or could not.

    Attributes:
        error: empty when it did.
    """

    order: str
    path: str
    step: int
    error: str


Body: TypeAlias = (
    Hello
    | ModelSeen
    | NonFinite
    | CheckpointSeen
    | Fault
    | Unwatched
    | LaunchStarted
    | LaunchEnded
    | Skipped
    | GuardOff
    | CommandStarted
    | CommandStopped
    | CheckpointRoot
    | CheckpointScanned
    | CheckpointGone
    | TaskDone
    | Loaded
    | CanLoad
    | Reduced
    | OptimizerState
    | Exploding
    | Flight
    | Autopsy
    | Checksum
    | BadWeights
    | BadLoss
    | Rehearsal
    | Resumed
)


@dataclass(frozen=True, slots=True)
class Record:
    """One journal line.

    `body` is None when the line is of no use; `drops` then says why. A line can also be
    kept and have drops, for the values in it that were not understood.
    """

    seq: int
    at: float | None
    body: Body | None
    drops: tuple[DropReason, ...] = ()


@dataclass(frozen=True, slots=True)
class Batch:
    """Consecutive lines of one journal."""

    incarnation: str
    records: tuple[Record, ...]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a process has come; all in it only ever grows, but for `step`, `magnitude` and the weights.

    Attributes:
        magnitude: the largest of the newest round's local gradients; None when not known or not finite.
        weights_finite: of all watched models, when they were last looked at; None before.
        weights_step: before which update that was.
    """

    incarnation: str
    round: int
    step: int
    last_bad_round: int | None
    bad_rounds: int
    reduced_round: int
    probe_seconds: float
    train_seconds: float
    ended: bool
    malformed_lines: int
    journal_records: int
    dropped: Mapping[str, int] = field(default_factory=dict)
    faults: Mapping[str, int] = field(default_factory=dict)
    magnitude: float | None = None
    weights_finite: bool | None = None
    weights_step: int | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What a sidecar sent at once."""

    batches: tuple[Batch, ...] = ()
    progress: tuple[Progress, ...] = ()


# What the event log calls each; a progress is no record of a journal: see `progress_log`.
KINDS: Mapping[str, type] = {
    "hello": Hello,
    "model": ModelSeen,
    "nonfinite": NonFinite,
    "checkpoint": CheckpointSeen,
    "fault": Fault,
    "unwatched": Unwatched,
    "launch_started": LaunchStarted,
    "launch_ended": LaunchEnded,
    "skipped": Skipped,
    "guard_off": GuardOff,
    "command_started": CommandStarted,
    "command_stopped": CommandStopped,
    "checkpoint_root": CheckpointRoot,
    "checkpoint_scanned": CheckpointScanned,
    "checkpoint_gone": CheckpointGone,
    "task_done": TaskDone,
    "loaded": Loaded,
    "can_load": CanLoad,
    "reduced": Reduced,
    "optimizer_state": OptimizerState,
    "exploding": Exploding,
    "flight": Flight,
    "autopsy": Autopsy,
    "checksum": Checksum,
    "weights": BadWeights,
    "loss": BadLoss,
    "rehearsal": Rehearsal,
    "resumed": Resumed,
    "progress": Progress,
}
