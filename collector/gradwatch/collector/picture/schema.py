"""The JSON document of a job's picture: these field names are a contract."""

from datetime import datetime
from typing import Literal

from pydantic import Field

from gradwatch.collector.schema import Document


class SegmentDocument(Document):
    """One attempt: columns beside each other, in the order of its steps."""

    generation: int
    attempt: int
    first_step: int
    last_step: int
    stride: int = Field(description="Steps in a column.")
    first_column: int
    columns: int


class RowDocument(Document):
    """A rank, or several in a large world."""

    rank: int = Field(description="The first of those that share the row.")
    last_rank: int
    node: str = Field(description="Of the newest attempt.")
    states: str = Field(
        description="A letter for each column, the worst of its steps: b bad, s an update that the guard "
        "skipped, c clean, x the process has ended, . nothing heard."
    )
    magnitudes: list[float | None] = Field(
        description="For each column the logarithm to base 10 of the largest local gradient, as sampled."
    )


class IncidentMarkDocument(Document):
    """Where an incident is."""

    id: str
    status: str
    cause: str | None
    step: int | None
    column: int | None
    last_column: int | None
    first_rank: int | None


class CheckpointMarkDocument(Document):
    """Where a checkpoint is."""

    path: str
    step: int | None
    verdict: Literal["good", "bad", "unknown", "quarantined"]
    column: int | None = Field(description="Null for one of an unknown step, or of before what is shown.")


class DecisionMarkDocument(Document):
    """Where a decision was taken."""

    id: str
    action: str
    outcome: str
    column: int | None
    at: datetime


class PictureDocument(Document):
    """Ranks by steps, and what happened on the same axis."""

    job: str
    columns: int
    segments: list[SegmentDocument]
    ranks: list[RowDocument]
    incidents: list[IncidentMarkDocument]
    checkpoints: list[CheckpointMarkDocument]
    decisions: list[DecisionMarkDocument]
