"""A policy, as frozen values.

Leaf module. Annotations are evaluated at run time, since the policy's hash is taken of its JSON.
"""

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gradwatch.collector.model import Cause
from gradwatch.collector.observations import Phase, Value
from gradwatch.collector.policy.compare import Comparison

API_VERSION = "gradwatch/v1"


class Mode(str, enum.Enum):
    """Whether decisions are performed."""

    DRY_RUN = "dry_run"
    ENFORCE = "enforce"


class Reflex(str, enum.Enum):
    """What the guard does about non-finite reduced gradients."""

    OFF = "off"
    SKIP_STEP = "skip_step"


class ReadOut(str, enum.Enum):
    """When a rank on a device knows what it has seen of its gradients."""

    WHEN_READY = "when_ready"
    EVERY_STEP = "every_step"


class Action(str, enum.Enum):
    """What is decided about an incident."""

    IGNORE = "ignore"
    WARN = "warn"
    ROLLBACK = "rollback"
    HALT = "halt"
    NONE = "none"  # no rule matched until the incident was closed


class Otherwise(str, enum.Enum):
    """What is done instead of a rollback that cannot be."""

    HALT = "halt"
    WARN = "warn"


class Layout(str, enum.Enum):
    """How checkpoints lie on disk."""

    AUTO = "auto"
    TORCH = "torch"
    DCP = "dcp"
    HF = "hf"
    LIGHTNING = "lightning"
    SAFETENSORS = "safetensors"


class Quarantine(str, enum.Enum):
    """What becomes of checkpoints newer than a rollback's target."""

    MOVE = "move"
    LEDGER = "ledger"


class Scope(str, enum.Enum):
    """What a budget counts."""

    JOB = "job"
    SAME_FIRST_BAD_STEP = "same_first_bad_step"
    NO_PROGRESS = "no_progress"


@dataclass(frozen=True, slots=True)
class Guard:
    """The reflex in every rank.

    Attributes:
        max_consecutive: skips in a row at which it reports `guard_exhausted`; None for no limit.
        max_per_1000_steps: skips in 1,000 steps, likewise.
        read_out: on a device.
    """

    on_nonfinite: Reflex = Reflex.OFF
    max_consecutive: int | None = None
    max_per_1000_steps: int | None = None
    read_out: ReadOut = ReadOut.WHEN_READY


# What an update is also matched by, if it has made weights bad. Such weights were told as weights that were
# found bad before `update` was a word.
IF_WEIGHTS_ARE_BAD: Mapping[enum.Enum, enum.Enum] = {
    Cause.UPDATE: Cause.PARAMETER,
    Phase.UPDATE: Phase.PARAMETER,
}


def may_mean(words: Iterable[enum.Enum]) -> frozenset[enum.Enum]:
    """All that the words of a condition on cause or phase may match."""
    known = frozenset(words)
    return known | {word for word, wide in IF_WEIGHTS_ARE_BAD.items() if wide in known}


@dataclass(frozen=True, slots=True)
class Match:
    """Conditions that must all hold; None is no condition.

    Attributes:
        node, parameter: shell patterns, of which one must fit.
        same_rank: `count` is of the incidents with this one's first rank.
        count: of the job's incidents, this one included, those that were ignored left out.
        within_steps: `count` is of the incidents at most so many steps away.
    """

    cause: tuple[Cause, ...] | None = None
    phase: tuple[Phase, ...] | None = None
    value: tuple[Value, ...] | None = None
    step: Comparison | None = None
    rank: Comparison | None = None
    node: tuple[str, ...] | None = None
    parameter: tuple[str, ...] | None = None
    origins: Comparison | None = None
    same_rank: bool = False
    count: Comparison | None = None
    within_steps: int | None = None
    consecutive_bad_steps: Comparison | None = None
    guard_exhausted: bool | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """What to do about the incidents that match."""

    name: str
    match: Match
    action: Action
    exclude_node: bool = False


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """Where checkpoints are looked for: below `root`, an absolute path or a URL of remote storage."""

    root: str
    layout: Layout = Layout.AUTO

    @property
    def is_remote(self) -> bool:
        """Whether the root is a URL."""
        return "://" in self.root


@dataclass(frozen=True, slots=True)
class Rollback:
    """How to go back."""

    margin_steps: int = 0
    skip_batches: int = 0
    quarantine: Quarantine = Quarantine.MOVE


@dataclass(frozen=True, slots=True)
class Budget:
    """How many rollbacks there may be.

    Attributes:
        per: in so many seconds; None for ever.
    """

    scope: Scope
    max: int
    per: int | None = None


DEFAULT_BUDGETS = (
    Budget(Scope.JOB, 5, 24 * 3600),
    Budget(Scope.SAME_FIRST_BAD_STEP, 1),
    Budget(Scope.NO_PROGRESS, 3),
)


@dataclass(frozen=True, slots=True)
class Policy:
    """All of a policy file.

    Attributes:
        cooldown: seconds between two rollbacks at least.
    """

    mode: Mode = Mode.DRY_RUN
    guard: Guard = Guard()
    rules: tuple[Rule, ...] = ()
    checkpoints: Checkpoints | None = None
    rollback: Rollback = Rollback()
    budgets: tuple[Budget, ...] = DEFAULT_BUDGETS
    cooldown: int = 0
    on_budget_exhausted: Otherwise = Otherwise.HALT
    on_no_good_checkpoint: Otherwise = Otherwise.HALT
