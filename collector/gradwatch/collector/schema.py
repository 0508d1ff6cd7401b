"""The JSON documents that the collector gives out: these field names are a contract."""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Document(BaseModel):
    """A JSON document. What is not known is null."""

    model_config = ConfigDict(frozen=True)


class OperatorInputDocument(Document):
    """A tensor or a number that went into an operator."""

    dtype: str
    shape: list[int]
    min: float | None = Field(description="Of its finite elements.")
    max: float | None
    nonfinite: int = Field(description="Elements that are not finite.")


class ReplayDocument(Document):
    """What replaying a micro-batch told about its operator."""

    phase: str | None = Field(description="The pass in which the operator ran: forward or backward.")
    module: str | None
    module_class: str | None
    code: str | None
    inputs: list[OperatorInputDocument]
    missing: list[str] = Field(description="What is not known, and why.")


class GuessDocument(Document):
    """A likely cause, and what to do about it."""

    kind: str
    because: str
    remedy: str


class FlightStepDocument(Document):
    """One of the steps that led to an incident. Magnitudes are the largest of the local gradients."""

    step: int
    round: int
    loss: float | str | None
    loss_scale: float | str | None
    learning_rate: float | str | None
    magnitude: float | str | None
    magnitudes: list[float | str | None] = Field(description="By parameter.")


class FlightDocument(Document):
    """How it came to an incident, on its first rank."""

    parameters: list[str]
    steps: list[FlightStepDocument] = Field(description="Oldest first; the bad round is the last.")
    dtype: str


class BadWeightDocument(Document):
    """A parameter whose weight is not finite."""

    name: str
    value: Literal["nan", "+inf", "-inf"] | None
    count: int | None = Field(description="Elements that are not finite.")


class ModelDocument(Document):
    """One of several models that a job trains."""

    root: int = Field(description="Its ordinal in its process.")
    module_class: str
    ordinal: int = Field(description="Among the models with a module, from 0.")


class OriginDocument(Document):
    """One rank's first non-finite gradient."""

    rank: int
    node: str
    device: str | None
    device_id: str | None
    step: int
    round: int
    microbatch: int | None
    phase: Literal["input", "parameter", "forward", "loss", "backward", "update"] | None
    parameter: str | None = Field(description="Whose weight is bad in phase parameter; else, whose gradient.")
    module: str | None
    module_class: str | None
    value: Literal["nan", "+inf", "-inf"] | None
    count: int | None = Field(description="Non-finite elements of that gradient.")
    numel: int | None
    dtype: str | None
    backward_position: int | None = Field(description="0 is the gradient that arrives first.")
    bad_parameters: int = Field(description="Parameters of the same bucket whose gradients were not finite.")
    batch: Any = Field(description="The values given to tag(batch=...).")
    operator: str | None = Field(description="In which it originates, found by replaying the micro-batch.")
    source: str | None = Field(description="File and line of the user's code that called the operator.")
    replay: ReplayDocument | None
    look: str = Field(description="Which look found it.")
    gradient: str | None = Field(description="The parameter whose gradient arrived first.")
    bad_weights: list[BadWeightDocument] = Field(description="In the order of the model, at most 16.")
    loss: float | str | None = Field(description="On that rank, before it was scaled.")
    model_step: int | None = Field(description="Updates of that model so far, where there are several.")
    model: ModelDocument | None = Field(description="Which one, where there are several.")
    group: list[int] | None = Field(
        description="Ranks of its process group, when that is not the world; told of the first rank only."
    )
    exchanged: bool = Field(
        description="What enters its part of the model may come from another rank: tensors were exchanged."
    )


class IncidentDocument(Document):
    """A stretch of rounds with non-finite gradients, and who was first."""

    id: str
    title: str = Field(description="What happened and where, in one line; more exact as more is known.")
    job: str
    generation: int
    attempt: int
    run: int = Field(description="Ordinal of the job's run.")
    status: Literal["suspected", "confirmed", "closed"]
    cause: str | None
    step: int | None
    round: int
    last_round: int
    first: OriginDocument | None
    origins: list[OriginDocument]
    tie: bool
    clean_ranks: list[int] = Field(description="Ranks that were clean in the first round.")
    unknown_ranks: list[int]
    unknown_reasons: dict[str, str] = Field(description="By unknown rank, why.")
    contaminated_ranks: list[int] = Field(description="Ranks that were first bad after an update.")
    verdict: list[str] = Field(description="The same, in sentences.")
    judgement: str | None = Field(description="What replays say of where the fault is.")
    doubts: list[str] = Field(description="Why a replay is not shown to have repeated the pass.")
    likely: list[GuessDocument] = Field(description="What is likely to be behind it, the likeliest first.")
    flight: FlightDocument | None
    opened_at: datetime
    confirmed_at: datetime | None
    closed_at: datetime | None
    close_reason: str | None
    decisions: list[dict[str, Any]]


class LaunchDocument(Document):
    """One `gradwatch run` on one node."""

    id: str
    generation: int
    node: str | None
    pid: int | None
    started_at: datetime | None
    ended_at: datetime | None
    exit_code: int | None
    ended_by: str | None
    command: str = Field(description="waiting, running, stopped or ended.")


class CheckpointDocument(Document):
    """A checkpoint that can be gone back to."""

    path: str
    step: int


class ResumeDocument(Document):
    """What the ranks of a job say of the checkpoint that they were told to go back to."""

    path: str
    generation: int
    honoured: bool | None = Field(description="Whether a rank has opened it; null while that may come.")


class RecoveryDocument(Document):
    """A rollback that is being performed."""

    decision: str
    phase: str
    hosts: list[str]


class PolicyDocument(Document):
    """The policy in force for a job."""

    hash: str | None
    mode: str | None
    problems: list[str] = Field(description="Why the newest text of the file does not load.")


class UnwatchedDocument(Document):
    """A process that trains unwatched."""

    node: str
    pid: int
    rank: int | None
    reason: str


class RanksDocument(Document):
    """How many ranks of the world are in which state."""

    watched: int
    ended: int
    missing: int


class OverheadDocument(Document):
    """The probe's own time on the rank where it is the largest share."""

    ratio: float | None
    rank: int | None
    probe_seconds: float | None
    train_seconds: float | None


class JobDocument(Document):
    """One job as it is now."""

    job: str
    generation: int
    attempt: int | None = Field(description="The attempt that trains now; numbered within the generation.")
    attempts: int = Field(description="Attempts of this run in the present generation.")
    run: int = Field(description="Ordinal of the run that all of this but `incidents` is about.")
    status: Literal["running", "ended"]
    world_size: int | None
    ranks_watched: int
    ranks: RanksDocument
    step: int | None
    round: int | None
    slowest_step: int | None
    exit_code: int | None
    ended_by: str | None
    launches: list[LaunchDocument]
    overhead: OverheadDocument
    incidents: list[IncidentDocument] = Field(description="All of the job, oldest first.")
    incidents_left_out: int = Field(description="Oldest ones that are not listed, for the document's size.")
    decisions: list[dict[str, Any]] = Field(description="Of this run, oldest first.")
    policy: PolicyDocument | None
    last_good_checkpoint: CheckpointDocument | None
    recovery: RecoveryDocument | None
    resume: ResumeDocument | None
    halted: str | None = Field(description="Why policy stopped this run for good.")
    warnings: list[str]
    dropped: dict[str, int]
    faults: dict[str, int]
    unwatched: list[UnwatchedDocument]
    first_seen: datetime
    last_seen: datetime


class RollbackRequest(Document):
    """What an operator asks for."""

    to: Literal["last-good"]


class AuditDocument(Document):
    """A line of the audit trail."""

    id: int
    job: str
    at: datetime
    what: str
    about: str | None = Field(description="The decision.")
    text: str


class EventDocument(Document):
    """An accepted record of a journal.

    `body` is the record in the words of the incident's document: `value` is nan, +inf or -inf.
    """

    id: int
    job: str
    generation: int | None
    attempt: int | None
    rank: int | None
    incarnation: str
    seq: int
    kind: str
    at: datetime | None
    received_at: datetime
    body: dict[str, Any]
