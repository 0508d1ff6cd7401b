"""What is under way for a job: a rollback, a halt, who looks after its checkpoints.

Leaf module of frozen values. Annotations are evaluated at run time, since the store derives its
JSON codec from them.
"""

import enum
from dataclasses import dataclass

from gradwatch.collector.model import AttemptId


class Phase(str, enum.Enum):
    """How far a rollback has come."""

    STOPPING = "stopping"
    SCANNING = "scanning"
    QUARANTINING = "quarantining"
    LOADING = "loading"  # in process: nothing is stopped


@dataclass(frozen=True, slots=True)
class Recovery:
    """A rollback that is being performed.

    Attributes:
        decision: its id; orders and tasks carry it.
        generation: the one that is stopped.
        hosts: all that must have stopped.
        waiting_since: when the first of them had, and then when all had, in seconds since the epoch.
        scanned: the sidecar has looked at everything since.
        set_aside: the sidecar has moved what was to be moved.
        error: what a task, or a rank that loads, failed of.
        in_process: the ranks load the checkpoint themselves; when that fails, they are stopped.
        loaded: ranks that have.
    """

    decision: str
    generation: int
    hosts: tuple[str, ...]
    phase: Phase = Phase.STOPPING
    waiting_since: float | None = None
    scanned: bool = False
    set_aside: bool = False
    error: str | None = None
    in_process: bool = False
    loaded: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Loaders:
    """The ranks of an attempt that can load a checkpoint in process."""

    attempt: AttemptId
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Halt:
    """A job that is stopped for good, in one run.

    Attributes:
        decision: its id.
        why: a sentence.
    """

    decision: str
    run: int
    why: str


@dataclass(frozen=True, slots=True)
class Root:
    """A sidecar that can look after a job's checkpoints.

    Attributes:
        launch: whose sidecar it is.
        error: why it cannot read the root; empty when it can.
    """

    launch: str
    node: str
    root: str
    error: str


@dataclass(frozen=True, slots=True)
class Save:
    """A save that a rank told of.

    Attributes:
        path: absolute; empty for one into a buffer.
        step: update attempts before it began.
    """

    path: str
    step: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the audit trail.

    Attributes:
        what: in a word: decided, stopping, quarantined, ...
        about: the decision; None when it is about none.
        text: a sentence.
    """

    job: str
    at: float
    what: str
    about: str | None
    text: str
