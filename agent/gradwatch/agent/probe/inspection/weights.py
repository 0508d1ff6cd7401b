"""Whether a process's weights are finite: when they are looked at, and what is reported of bad ones.

They are looked at when a model is wrapped; before its first update, and after its updates as long as these
move no weight, or with a learning rate that is not finite; beside the replica check; after a state was
loaded; when a rank's own gradients are bad; and at the first bucket of each round after a bad one. In host
memory exactly, by name. On a device only by what the look at a round's gradients shows anyway, since nothing
may wait for a device.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gradwatch.agent.probe import scan
from gradwatch.agent.probe.inspection.optimizer_evidence import (
    GRADIENTS,
    SEEN,
    Evidence,
    evidence_in,
    group_of,
    settings_of,
)
from gradwatch.agent.probe.message import GRADIENTS_PER_RECORD, bad_gradient

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch

    from gradwatch.agent.probe.model import WatchedModel
    from gradwatch.agent.probe.rounds import BadGradient, BucketFindings, Moment
    from gradwatch.agent.probe.watcher import Watcher

# The part of the probe, for its fuse.
PART = "weights"
# As many as a `NonFinite` or `BadWeights` message names.
WEIGHTS_PER_RECORD = 16


@dataclass(frozen=True)
class BadWeight:
    """The weight of a parameter that is not finite.

    Attributes:
        name: as the model's author knows it.
        numel: elements of the whole parameter.
        finding: what is bad in what this rank holds of it.
    """

    name: str
    numel: int
    finding: scan.Finding

    def as_message(self) -> dict[str, Any]:
        """The `BadWeight` message in its JSON mapping."""
        found = self.finding
        return {"parameter": self.name, "value": found.value, "count": found.count, "numel": self.numel}


@dataclass
class WeightsState:
    """What is known of one model's weights.

    Attributes:
        finite: when they were last looked at; None before, and where that cannot be done.
        bad: those that were not.
        finite_step: the newest step before which they were seen finite.
        updates: attempts of updates since then.
        tainted: they may have become bad since then by what is no update, or by gradients that were bad.
        initial: they were bad when the model was wrapped.
        due: they are to be looked at when the next round begins.
        reported: that they are bad, or are about to be made so; until they are finite again.
        looked_at: when that was, as numbers that change when weights may have.
    """

    finite: bool | None = None
    bad: list[BadWeight] = field(default_factory=list)
    finite_step: int | None = None
    updates: int = 0
    tainted: bool = False
    initial: bool = False
    due: bool = False
    reported: bool = False
    looked_at: tuple[int, ...] = ()


class WeightsWatch:
    """Looks at the weights of all watched models of one process.

    Args:
        watcher: the process's.

    Attributes:
        suspect: a round was bad, or an update is about to be, and no weights have been seen finite since.
        finite: those of all models, when they were last looked at; None before.
        step: before which update that was.
    """

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self.start_over()

    def start_over(self) -> None:
        """A checkpoint has been loaded, or another journal begins."""
        self.suspect = False
        self.finite: bool | None = None
        self.step: int | None = None

    # ------------------------------------------------------------------ when

    def wrapped(self, model: WatchedModel) -> None:
        """A model is watched from now on. Never raises."""
        self._guarded(lambda: self._look_when_wrapped(model))

    def round_begins(self, model: WatchedModel, moment: Moment, *, due: bool) -> None:
        """The first gradients of a round are there, which no optimizer has taken. Never raises.

        Args:
            model: whose round it is.
            moment: the round's.
            due: it is the turn of this model's weights.
        """
        state = model.weights
        if self.suspect:
            self._guarded(lambda: self._look_at_all(moment.round))
        elif due or state.due or state.initial:
            self._guarded(lambda: self._look(model))

    def bad_gradients(self, model: WatchedModel, findings: BucketFindings) -> dict[str, Any]:
        """This rank's own gradients are bad: what a `NonFinite` message says of the weights. Never raises."""
        self.suspect = True
        facts: dict[str, Any] = {}
        if findings.moment.model_step is not None:
            facts["model_step"] = findings.moment.model_step
        self._guarded(lambda: facts.update(self._facts(model, findings)))
        return facts

    def first_update_begins(self, model: WatchedModel) -> None:
        """The optimizer is about to take the model's gradients for the first time. Never raises."""
        self._guarded(lambda: self._look(model))

    def updated(self, model: WatchedModel, optimizers: Iterable[Any], *, first: bool) -> None:
        """An attempt of an update of a model's weights is over. Never raises.

        Args:
            model: whose.
            optimizers: that update it.
            first: no update before it has moved a weight, or its learning rate is not finite.
        """
        model.weights.updates += 1
        if first:
            self._guarded(lambda: self._look(model, tuple(optimizers), after=True))

    def about_to_be_bad(
        self, model: WatchedModel, optimizer: Any, parameter: torch.Tensor, gradients: Sequence[BadGradient]
    ) -> None:
        """An optimizer takes gradients that were finite after their reduction, and are not any more.

        Args:
            model: whose they are.
            optimizer: the optimizer.
            parameter: of the first of them.
            gradients: that are bad.
        """
        self.suspect = True
        state = model.weights
        state.tainted = True
        if state.reported:
            return
        state.reported = True
        settings = settings_of(optimizer, group_of(optimizer, parameter))
        self._record(model, [], kind=GRADIENTS, settings=settings, gradients=gradients)

    def read_out(self, model: WatchedModel, moment: Moment, *, finite: bool | None) -> None:
        """A round has been read out from a device: whether a model's weights were finite when it began."""
        if finite is None:
            return
        self._note(model, finite, moment.step)
        if finite:
            model.weights.reported = False
        elif not model.weights.reported:
            model.weights.reported = True
            self._record(model, [], step=moment.step, round_=moment.round)

    # ------------------------------------------------------------------ the look

    def _guarded(self, call: Any) -> None:
        began = time.perf_counter()
        self._watcher.fuses.call(PART, call)
        self._watcher.spent(time.perf_counter() - began)

    def _look_when_wrapped(self, model: WatchedModel) -> None:
        state = model.weights
        bad = model.bad_weights()
        if bad is None:
            return
        # A checkpoint may be loaded before they are used: they are reported if they still are bad then.
        state.initial, state.bad = bool(bad), [one for _, one in bad]
        if not bad:
            self._note(model, True, self._watcher.clock.step)

    def _look_at_all(self, round_: int) -> None:
        """At the weights of all watched models, once a round."""
        watched = self._watcher.all_models
        for model in watched:
            self._look(model, round_=round_)
        self.suspect = any(model.weights.finite is False for model in watched)

    def _look(
        self,
        model: WatchedModel,
        optimizers: Sequence[Any] | None = None,
        *,
        after: bool = False,
        round_: int | None = None,
    ) -> None:
        """Look at the weights of a model, and report them if they have become bad.

        Args:
            model: the model.
            optimizers: that update it; None to ask who has.
            after: an update is just over, which is the clock's step under way still.
            round_: that begins; None if none does.
        """
        clock, state = self._watcher.clock, model.weights
        now = (clock.attempts, self._watcher.round_log.tally.rounds if round_ is None else round_, after)
        if state.looked_at == now:
            return
        found = model.bad_weights()
        if found is None:
            return
        state.looked_at, state.due = now, False
        state.bad = bad = [one for _, one in found]
        initial, state.initial = state.initial and bool(bad), False
        self._note(model, not bad, clock.step + after)
        if not bad:
            state.reported = False
        elif not state.reported:
            state.reported = True
            self.suspect = True
            parameters = [parameter for parameter, _ in found]
            evidence = None if initial else self._evidence(model, parameters, optimizers)
            self._record(
                model,
                bad,
                kind=None if evidence is None else evidence.kind,
                settings={} if evidence is None else evidence.optimizer,
                initial=initial,
            )

    def _note(self, model: WatchedModel, finite: bool, step: int) -> None:
        state = model.weights
        state.finite = finite
        if finite:
            state.finite_step, state.updates, state.tainted = step, 0, False
        self.finite = self._of_all()
        self.step = step

    def _of_all(self) -> bool | None:
        """Whether those of all models were finite when they were last looked at; None when not known."""
        known = [model.weights.finite for model in self._watcher.all_models]
        return False if False in known else True if known and all(known) else None

    def _evidence(
        self, model: WatchedModel, bad: Sequence[torch.Tensor], optimizers: Sequence[Any] | None
    ) -> Evidence | None:
        """What shows that an update has made them bad: nothing, if something else may have."""
        state = model.weights
        if state.finite_step is None or not state.updates or state.tainted:
            return None
        known = self._watcher.updates.optimizers_of(model) if optimizers is None else optimizers
        found = (evidence_in(optimizer, bad) for optimizer in known)
        evidence = next((one for one in found if one is not None), None)
        if (
            evidence is None
            and optimizers
            and state.updates == 1
            and state.finite_step == self._watcher.clock.step
        ):
            # Looked at right before this update and right after it.
            settings = settings_of(optimizers[0], group_of(optimizers[0], bad[0]))
            return Evidence(SEEN, settings)
        return evidence

    # ------------------------------------------------------------------ what is reported

    def _facts(self, model: WatchedModel, findings: BucketFindings) -> dict[str, Any]:
        moment, state = findings.moment, model.weights
        if model.on_host:
            self._look_at_all(moment.round)
            self.suspect = True
            finite = self._of_all()
        else:
            alone = len(self._watcher.all_models) == 1
            finite = findings.weights_finite if alone or findings.weights_finite is False else None
        facts: dict[str, Any] = {}
        if finite is not None:
            facts["weights_finite"] = finite
        if model.on_host and state.bad:
            facts["bad_weights"] = [one.as_message() for one in state.bad[:WEIGHTS_PER_RECORD]]
            facts["bad_weights_total"] = len(state.bad)
        if state.finite_step is not None and state.finite_step <= moment.step:
            facts["weights_finite_step"] = state.finite_step
        return facts

    def _record(
        self,
        model: WatchedModel,
        bad: Sequence[BadWeight],
        *,
        kind: str | None = None,
        settings: dict[str, Any] | None = None,
        gradients: Sequence[BadGradient] = (),
        initial: bool = False,
        step: int | None = None,
        round_: int | None = None,
    ) -> None:
        """Journal a `BadWeights` message."""
        watcher, state = self._watcher, model.weights
        message: dict[str, Any] = {
            "root": model.root,
            "round": max(0, watcher.round_log.tally.rounds - 1) if round_ is None else round_,
            "step": watcher.clock.step if step is None else step,
            "model_step": model.attempts.count,
            "weights": [one.as_message() for one in bad[:WEIGHTS_PER_RECORD]],
            "weights_total": len(bad),
            **(settings or {}),
        }
        if kind is not None:
            message["evidence"] = kind
        if gradients:
            message["gradients"] = [bad_gradient(model, one) for one in gradients[:GRADIENTS_PER_RECORD]]
            message["gradients_total"] = len(gradients)
        if state.finite_step is not None:
            message["finite_step"] = state.finite_step
        if watcher.batch is not None:
            message["batch"] = watcher.batch
        if initial:
            message["initial"] = True
        watcher.append("weights", message)


def bad_in(held: torch.Tensor) -> scan.Finding | None:
    """What is not finite in a weight; None also for one that is not in host memory."""
    if held.device.type != "cpu" or scan.surely_finite(held):
        return None
    return scan.examine(held)
