"""What is known of one round of a model: when it was, its buckets, and what was not finite in them.

A `Look` (`look.py`) finds it; `round_log.py` writes it down.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gradwatch.agent.probe import scan
from gradwatch.agent.probe.passes import Origin, Pass, origin_of
from gradwatch.agent.probe.phases.loss_pass import settled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch

    from gradwatch.agent.probe.losses import Number
    from gradwatch.agent.probe.passes import Fact


@dataclass(frozen=True, eq=False)
class Moment:
    """When a round was: all that an event has to say about its time, kept until it is read out.

    Attributes:
        root: ordinal of the wrapped model in its process.
        round: ordinal of the reduction in the process.
        step: the update attempt under way.
        microbatch: ordinal of the backward pass; None when several were summed up.
        batch: JSON of the user's tag.
        order: keys of the parameters in the order in which their gradients arrived.
        passes: of the model, that the gradients are of; oldest first.
        parameters: gives whether the parameters are finite, before the step; None when not known.
        magnitudes: by key, of the local gradients looked at so far: the largest in each.
        loss: of the newest backward pass, before it was scaled.
        loss_scale: by what a GradScaler multiplied it.
        learning_rate: of the last update attempt.
        model_step: update attempts of the model before; None when not known.
    """

    root: int
    round: int
    step: int
    microbatch: int | None
    batch: str | None
    order: list[int]
    passes: tuple[Pass, ...] = ()
    parameters: Callable[[], Fact] = lambda: None
    magnitudes: dict[int, float] = field(default_factory=dict)
    loss: Number = None
    loss_scale: Number = None
    learning_rate: float | None = None
    model_step: int | None = None

    def origin_on_host(self) -> Origin:
        """Where it began on this rank, by what the host knows."""
        parameters = self.parameters()
        return origin_of(
            settled(self.passes),
            parameters=parameters if isinstance(parameters, bool) else None,
            scale=self.loss_scale if isinstance(self.loss_scale, float) else None,
        )


@dataclass(frozen=True)
class BadGradient:
    """A parameter's non-finite gradient.

    Attributes:
        key: the parameter's, as in `Moment.order`.
        value: enum name of `gradwatch.v1.Value`; None where only the magnitude is known.
        count: non-finite elements; None where they were not counted.
    """

    key: int
    value: str | None
    count: int | None


def bad_gradients(gradients: Iterable[tuple[int, torch.Tensor]]) -> list[BadGradient]:
    """Those in host memory, by key, that are non-finite: exactly, one by one."""
    return [
        BadGradient(key, finding.value, finding.count)
        for key, gradient in gradients
        if (finding := scan.examine(gradient)) is not None
    ]


@dataclass(frozen=True)
class BucketFindings:
    """What was non-finite in one bucket of one round, before its reduction.

    Attributes:
        origin: where it began on this rank.
        passes: those of the moment, with facts that the host knows.
        note: a sentence on how the loss made them bad; "" for none.
        weights_finite: the model's, before the step, as a device tells it; None when not known.
    """

    moment: Moment
    bucket: int
    gradients: list[BadGradient]
    origin: Origin = field(default_factory=Origin)
    passes: tuple[Pass, ...] = ()
    note: str = ""
    weights_finite: bool | None = None


@dataclass(frozen=True)
class ReducedFindings:
    """What is non-finite after the reductions of a round.

    Attributes:
        gradients: that are, as far as they can be told apart.
        overflow: as in `Origin`, for what this rank knows.
    """

    gradients: list[BadGradient]
    overflow: bool


@dataclass
class RoundResult:
    """A round that has been looked at.

    Attributes:
        findings: of its buckets, empty when all was finite.
        reduced_bad: whether the reduced gradients have a non-finite value; None when they
            were not looked at.
        reduced: what is non-finite in them.
        loss: as in `Moment`, known by now.
        loss_scale: likewise.
        weights_finite: as in `BucketFindings`.
    """

    moment: Moment
    findings: list[BucketFindings] = field(default_factory=list)
    reduced_bad: bool | None = None
    reduced: ReducedFindings | None = None
    loss: float | None = None
    loss_scale: float | None = None
    weights_finite: bool | None = None

    def reduced_findings(self) -> ReducedFindings | None:
        """Known by now."""
        return self.reduced


@dataclass(frozen=True)
class Bucket:
    """A bucket of gradients, about to be reduced.

    Attributes:
        index: its ordinal in the reducer.
        buffer: all of its memory, flat (or one sparse gradient); None where each gradient has its own.
        gradients: gives its parameters' keys, as in `Moment.order`, each with the view of the
            buffer that is its gradient. Making the views costs more than a look at a small bucket.
        keys: those of its parameters, whose gradients fill the buffer one after the other; None where
            that is not known.
    """

    index: int
    buffer: torch.Tensor | None
    gradients: Callable[[], list[tuple[int, torch.Tensor]]]
    keys: tuple[int, ...] | None = None
