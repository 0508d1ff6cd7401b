"""What a look at a checkpoint gives: plain values, and their JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Completeness(str, Enum):
    """Whether all of a checkpoint is on disk."""

    COMPLETE = "complete"
    IN_FLIGHT = "in_flight"
    TORN = "torn"


class Layout(str, Enum):
    """How a checkpoint is laid out; AUTO where that is asked for and all will do."""

    AUTO = "auto"
    TORCH = "torch"
    DCP = "dcp"
    HF = "hf"
    LIGHTNING = "lightning"
    SAFETENSORS = "safetensors"


class Section(str, Enum):
    """What part of the training's state a tensor belongs to."""

    PARAMETERS = "parameters"
    BUFFERS = "buffers"
    OPTIMIZER = "optimizer"


class StepSource(str, Enum):
    """Where a step was found."""

    CHECKPOINT = "checkpoint"  # a key of the saved object, such as global_step
    TRAINER_STATE = "trainer_state"  # the Hugging Face trainer's trainer_state.json
    OPTIMIZER = "optimizer"  # the largest `step` of the optimizer's state
    NAME = "name"  # a number in the checkpoint's name


@dataclass(frozen=True)
class Step:
    """A step that the checkpoint tells.

    Attributes:
        source: where.
        key: the key or the name that tells it.
        step: the number.
    """

    source: StepSource
    key: str
    step: int


@dataclass(frozen=True)
class Bad:
    """A tensor with non-finite values.

    Attributes:
        section: what it is part of.
        name: its key, joined by dots.
        value: nan, +inf or -inf: NaN if there is any, else +inf if there is any.
        count: how many elements are not finite; a complex one counts for each part.
        file: where, relative to the checkpoint; "." for a checkpoint that is one file.
    """

    section: Section
    name: str
    value: str
    count: int
    file: str


@dataclass(frozen=True)
class SectionCount:
    """What was looked at.

    Attributes:
        tensors: those with floating-point values.
        nbytes: of them.
        nonfinite_tensors: how many had NaN or infinities.
        nonfinite_values: how many elements.
    """

    tensors: int = 0
    nbytes: int = 0
    nonfinite_tensors: int = 0
    nonfinite_values: int = 0


@dataclass(frozen=True)
class Unreadable:
    """A file that could not be read, and why. Only that of a judged file makes `finite` unknown."""

    file: str
    reason: str
    judged: bool


@dataclass(frozen=True)
class ScanResult:
    """What is known of one checkpoint.

    Attributes:
        path: as it was asked for.
        layout: torch, dcp, hf, lightning or safetensors; None if it is none of them.
        completeness: None if that could not be found out (see `error`).
        reason: completeness in words.
        finite: whether parameters and optimizer state are; buffers do not count here. None if unknown.
        sections: what was looked at, by section.
        nonfinite: the first bad tensors of each section, in the order of the files.
        steps: all that were found; who decides is the collector.
        unreadable: files that could not be read.
        nbytes: the size of its files.
        read_bytes: of values that were looked at.
        read_seconds: that took.
        error: why there is no result; None if there is one.
    """

    path: str
    layout: str | None = None
    completeness: Completeness | None = None
    reason: str = ""
    finite: bool | None = None
    sections: dict[Section, SectionCount] = field(default_factory=dict)
    nonfinite: tuple[Bad, ...] = ()
    steps: tuple[Step, ...] = ()
    unreadable: tuple[Unreadable, ...] = ()
    nbytes: int = 0
    read_bytes: int = 0
    read_seconds: float = 0.0
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As a JSON document."""
        return dataclasses.asdict(self) | {
            "sections": {section.value: dataclasses.asdict(count) for section, count in self.sections.items()}
        }

    @classmethod
    def from_json(cls, document: Any) -> ScanResult:
        """Back from JSON.

        Raises:
            ValueError: it is not such a document.
        """
        try:
            known = {item.name: document[item.name] for item in dataclasses.fields(cls)}
            completeness = known["completeness"]
            known |= {
                "completeness": None if completeness is None else Completeness(completeness),
                "sections": {Section(name): SectionCount(**of) for name, of in known["sections"].items()},
                "nonfinite": tuple(
                    Bad(**{**bad, "section": Section(bad["section"])}) for bad in known["nonfinite"]
                ),
                "steps": tuple(
                    Step(**{**step, "source": StepSource(step["source"])}) for step in known["steps"]
                ),
                "unreadable": tuple(Unreadable(**item) for item in known["unreadable"]),
            }
            return cls(**known)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not the result of a scan: {error!r}") from error
