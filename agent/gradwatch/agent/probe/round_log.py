"""What a process writes down of its rounds: bad gradients, how it came to them, what the reductions gave."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gradwatch.agent.probe.message import nonfinite_message, reduced_message
from gradwatch.agent.probe.passes import PART
from gradwatch.agent.probe.phases.loss_pass import refine
from gradwatch.agent.probe.recorder import RoundFacts
from gradwatch.agent.probe.rounds import Moment
from gradwatch.agent.probe.tally import Tally

if TYPE_CHECKING:
    from collections.abc import Callable

    from gradwatch.agent.probe.losses import Number
    from gradwatch.agent.probe.model import WatchedModel
    from gradwatch.agent.probe.passes import Fact, Pass
    from gradwatch.agent.probe.rounds import BucketFindings, ReducedFindings, RoundResult
    from gradwatch.agent.probe.watcher import Watcher

# The part of the probe, for its fuse.
RECORDER = "recorder"
# A loss that is not finite every now and then is one stretch.
STEPS_BETWEEN_WARNINGS = 10


class RoundLog:
    """The rounds of one process, in the order in which they are reduced.

    Args:
        watcher: the process's.

    Attributes:
        tally: of the rounds.
        first_at: by `time.perf_counter()`, when the first one began; None before.
        magnitude: the largest of the newest round; None before.
    """

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self.count_from_0()

    def count_from_0(self) -> None:
        """A new journal begins."""
        self.tally = Tally()
        self.first_at: float | None = None
        self.magnitude: float | None = None
        # The step of the newest loss that was not finite though the gradients were.
        self._bad_loss: int | None = None
        self._warning: dict[str, Any] | None = None

    def begin(self, model: WatchedModel, passes: tuple[Pass, ...], parameters: Callable[[], Fact]) -> Moment:
        """The first bucket of a reduction is ready.

        Args:
            model: whose.
            passes: of the model, that are reduced now.
            parameters: gives whether its parameters are finite.
        """
        return self._begin(
            model,
            round_=self.tally.next_round(),
            microbatch=0 if self._watcher.arrivals.passes <= 1 else None,
            batch=self._watcher.batch,
            order=self._watcher.arrivals.order,
            passes=passes,
            parameters=parameters,
        )

    def begin_pass(
        self,
        model: WatchedModel,
        one: Pass,
        parameters: Callable[[], Fact],
        *,
        round_: int | None = None,
        others: tuple[Pass, ...] = (),
    ) -> Moment:
        """A backward pass begins where nothing is reduced: the passes until `end_local` are one round.

        Args:
            model: whose.
            one: what is known of the pass.
            parameters: gives whether the model's parameters are finite.
            round_: to which the pass belongs; None for the one to come.
            others: forward passes before it, with the same backward pass.

        Returns:
            The pass's own moment; to be `end_local`'s, or forgotten.
        """
        return self._begin(
            model,
            round_=self.tally.rounds if round_ is None else round_,
            microbatch=one.backward,
            batch=one.batch,
            order=[],
            passes=(*others, one),
            parameters=parameters,
        )

    def _begin(
        self,
        model: WatchedModel,
        *,
        round_: int,
        microbatch: int | None,
        batch: str | None,
        order: list[int],
        passes: tuple[Pass, ...],
        parameters: Callable[[], Fact],
    ) -> Moment:
        watcher = self._watcher
        if self.first_at is None:
            self.first_at = time.perf_counter()
        moment = Moment(
            root=model.root,
            round=round_,
            step=watcher.clock.step,
            microbatch=microbatch,
            batch=batch,
            order=order,
            passes=passes,
            parameters=parameters,
            loss=watcher.losses.loss,
            loss_scale=watcher.losses.scale,
            learning_rate=watcher.learning_rate,
            model_step=model.attempts.count,
        )
        self.tally.begin(moment)
        return moment

    def forget(self, moment: Moment) -> None:
        """Nothing of it is to be waited for."""
        self.tally.forget(moment)

    def found(self, model: WatchedModel, findings: BucketFindings, *, replay: bool = True) -> None:
        """Non-finite local gradients: write them down before they are reduced.

        Args:
            model: whose they are.
            findings: what is bad.
            replay: the pass may be replayed once its round is over.
        """
        tally, round_ = self.tally, findings.moment.round
        if self._warning is not None and self._warning["round"] == round_:
            # It is no warning any more: parameters beside the model were bad in that pass.
            self._warning = None
        tally.found(model.root, round_, overflow=findings.origin.overflow)
        if tally.brief:
            self.drop("repeated")
            return
        excused = tally.is_excused(round_)
        findings = self._with_the_loss(model, findings)
        message = nonfinite_message(model, findings, excused=excused, exchanged=self._watcher.has_exchanged)
        self._watcher.append("nonfinite", message | self._watcher.weights.bad_gradients(model, findings))
        first = not tally.in_a_streak and not excused
        # Weights that the update before has made bad are no riddle.
        spread = findings.origin.phase == "PHASE_PARAMETER" and tally.after_a_bad_reduction(model.root)
        if first and replay and not spread:
            autopsies = self._watcher.autopsies
            (autopsies.found if model.replayed else autopsies.not_replayed)(model, findings)

    def _with_the_loss(self, model: WatchedModel, findings: BucketFindings) -> BucketFindings:
        """The findings with what the graph of the loss shows of them."""
        if not self._watcher.fuses.intact(PART) or model.module() is None:
            return findings
        try:
            self._watcher.losses.join(findings.passes, self._watcher.arrivals.ordinal)
            bad = model.ids_of(one.key for one in findings.gradients)
            origin, note = refine(findings.origin, bad, findings.passes)
        except Exception as error:
            self._watcher.fuses.blow(PART, error)
            return findings
        return replace(findings, origin=origin, note=note)

    def remember(self, model: WatchedModel, moment: Moment, loss: Number, loss_scale: Number) -> None:
        """All local gradients of a round have been looked at.

        Args:
            model: whose they are.
            moment: the round's.
            loss: as in `Moment`, known by now.
            loss_scale: likewise.
        """
        if not self._watcher.fuses.intact(RECORDER):
            return
        try:
            self.warn()
            facts = RoundFacts(
                moment.round,
                moment.step,
                loss if isinstance(loss, float) else None,
                loss_scale if isinstance(loss_scale, float) else None,
                moment.learning_rate,
                moment.batch,
            )
            model.recorder.add(facts, moment.magnitudes)
            self.magnitude = model.recorder.largest()
            warning = model.recorder.exploding()
            if warning is not None:
                self._watcher.append("exploding", warning)
            if not self.tally.is_locally_bad(moment.round):
                for one in moment.passes:
                    one.learn_masks()
                self._warn_of_the_loss(model, facts)
            elif not self.tally.is_excused(moment.round):
                self.tell_flight(model)
        except Exception as error:
            self._watcher.fuses.blow(RECORDER, error)

    def _warn_of_the_loss(self, model: WatchedModel, facts: RoundFacts) -> None:
        """A loss is not finite and no gradient shows it, as when all labels are ignored: said seldom."""
        if facts.loss is None or math.isfinite(facts.loss):
            return
        newest, self._bad_loss = self._bad_loss, facts.step
        if newest is not None and facts.step - newest < STEPS_BETWEEN_WARNINGS:
            return
        self._warning = {"root": model.root, "round": facts.round, "step": facts.step, "loss": facts.loss}
        if facts.batch is not None:
            self._warning["batch"] = facts.batch

    def warn(self) -> None:
        """Write the warning of the round before down: nothing bad was found in it."""
        warning, self._warning = self._warning, None
        if warning is not None:
            self._watcher.append("loss", warning)

    def tell_flight(self, model: WatchedModel) -> None:
        """How it came to the first bad round of a stretch, once."""
        if model.flight_told:
            return
        model.flight_told = True
        flight = model.recorder.flight()
        if flight is not None:
            self._watcher.append("flight", flight)

    def end_local(self, moment: Moment, *, seen: bool) -> None:
        """All buckets of the round are enqueued for reduction.

        Args:
            moment: the round's.
            seen: they have been looked at; else a read-out is under way, and `landed` follows.
        """
        self.tally.rounds += 1
        self._watcher.arrivals.forget_passes()
        self._watcher.read_out_departed()
        if seen:
            self.tally.settle(moment)
            self._watcher.write_progress()

    def end_reduced(
        self,
        model: WatchedModel,
        moment: Moment,
        *,
        bad: bool,
        findings: Callable[[], ReducedFindings | None],
    ) -> None:
        """The reduced gradients of a round have been looked at.

        Args:
            model: whose they are.
            moment: the round's.
            bad: whether any is non-finite.
            findings: gives what is, when it is to be told.
        """
        if bad and model.reduces and not self.tally.is_locally_bad(moment.round):
            self._reduced_though_finite(model, moment, findings)
        elif not bad:
            model.reduced_excused, model.flight_told = None, False
        self.tally.reduced(model.root, moment.round, bad=bad)
        if bad:
            self._watcher.weights.suspect = True
            # Every rank sees this in the same round: with their watermarks written at once,
            # the verdict waits for no timer.
            self._watcher.write_progress()

    def _reduced_though_finite(
        self, model: WatchedModel, moment: Moment, findings: Callable[[], ReducedFindings | None]
    ) -> None:
        """This rank's own gradients were finite: said once, and again when it is excused no more."""
        excusable = self.tally.excuses(model.root)
        if model.reduced_excused is False or (model.reduced_excused and excusable):
            return
        known = findings()
        if known is None:
            return
        model.reduced_excused = excused = known.overflow and excusable
        self._watcher.append("reduced", reduced_message(model, moment, known, excused=excused))
        if not excused:
            self.tell_flight(model)

    def landed(self, model: WatchedModel, results: list[RoundResult]) -> None:
        """Read-outs have arrived from the device, oldest first."""
        for result in results:
            self._watcher.weights.read_out(model, result.moment, finite=result.weights_finite)
            for findings in model.news(result.findings):
                self.found(model, findings)
            if result.reduced_bad is None and result.moment.round >= self.tally.rounds:
                # A micro-batch that is read out before its round is over.
                self.forget(result.moment)
            else:
                if result.moment.magnitudes:
                    self.remember(model, result.moment, result.loss, result.loss_scale)
                self.tally.settle(result.moment)
            if result.reduced_bad is not None:
                bad, told = result.reduced_bad, result.reduced_findings
                overflow = result.reduced is not None and result.reduced.overflow
                excused = overflow and self.tally.excuses(model.root)
                new = not excused and not self.tally.after_a_bad_reduction(model.root)
                self._watcher.autopsies.on_device.landed(model, result.moment, bad=bad, new=new)
                self.end_reduced(model, result.moment, bad=bad, findings=told)
                if self._watcher.guarding is not None:
                    self._watcher.guarding.landed(model, result.moment, bad=result.reduced_bad)
        if results:
            self._watcher.write_progress()

    def drop(self, reason: str) -> None:
        """Count something that was not written or not looked at."""
        self.tally.drop(reason)
