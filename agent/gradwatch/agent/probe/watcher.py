"""The rank's watcher: its clock, its journal, and what it writes there.

One per process. `ddp.py` tells it what happens to buckets, `steps.py` counts its steps.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gradwatch.agent.probe import spool
from gradwatch.agent.probe.arrival import Arrivals
from gradwatch.agent.probe.autopsy.autopsies import Autopsies
from gradwatch.agent.probe.fuses import Fuses
from gradwatch.agent.probe.guarding import Guarding
from gradwatch.agent.probe.inspection.updates import Updates
from gradwatch.agent.probe.inspection.weights import WeightsWatch
from gradwatch.agent.probe.journal import Journal
from gradwatch.agent.probe.losses import Losses
from gradwatch.agent.probe.outputs import Outputs
from gradwatch.agent.probe.phases.armed import Armed
from gradwatch.agent.probe.rank import identify, unwatched_message, world_size
from gradwatch.agent.probe.reload import Reload
from gradwatch.agent.probe.resumed import PART as RESUMED
from gradwatch.agent.probe.resumed import Resumed, local_path
from gradwatch.agent.probe.round_log import RoundLog
from gradwatch.agent.probe.saves import Saves, absolute
from gradwatch.agent.probe.second_moments import SecondMoments
from gradwatch.agent.probe.steps import StepClock, learning_rate
from gradwatch.agent.probe.training_thread import TrainingThread
from gradwatch.agent.probe.unowned import UnownedWatch

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from gradwatch.agent.probe.model import WatchedModel
    from gradwatch.agent.probe.rank import Identity
    from gradwatch.agent.probe.settings import Settings
    from gradwatch.agent.probe.single import SingleWatch

TAG_CHARACTERS = 4096
LINGER_SECONDS = 0.02
# The framework of a process that trains alone, as in the `Hello` message.
SINGLE = "single"
# Why something is not watched.
OF_SEVERAL_THREADS = (
    "several threads of this process train at the same time, and trainings of several threads are not watched"
)
OF_ANOTHER_THREAD = (
    "another thread of this process trains, too, and what it trains beside the watched model is not watched"
)


class Watcher:
    """Watches one process.

    Attributes:
        thread: that is followed.
        single: watches the process for as long as it has no wrapped model.
        losses: of the backward passes.
        armed: looks closely at backward passes after a fault of which something is missing.
        has_exchanged: this process has sent tensors to single ranks, or all to all.
        second_moments: of the optimizers.
        learning_rate: the largest of the last update attempt; None when not known.
        round_log: of its rounds.
        resumed: whether the job has opened what it was told to go back to.
        unowned: what no model of it owns.
        updates: that its optimizers attempt.
        weights: of its models.
        replays_on_device: passes of a model on a device may be replayed, in the training process itself.
        models_told: models of this rank, of whatever kind; the ordinal of the next one.
        probe_seconds: time that the training has waited for the probe.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.fuses = Fuses(lambda part, error: self.append("fault", {"part": part, "error": error}))
        self.arrivals = Arrivals()
        self.outputs = Outputs()
        self.clock = StepClock(settings.resume_step)
        self.thread = TrainingThread(
            self._has_what_trains, self._threads_overlap, self._leave_threads, self._thread_begins
        )
        self.losses = Losses(self.fuses, self._may_examine_losses)
        self.armed = Armed(self.fuses)
        self.has_exchanged = False
        self.second_moments = SecondMoments(self)
        self.learning_rate: float | None = None
        self.guarding = None if settings.guard is None else Guarding(settings.guard, self)
        self.reload = Reload(self)
        self.autopsies = Autopsies(self)
        self.identity: Identity | None = None
        self.single: SingleWatch | None = None
        self._device: torch.device | None = None
        self._framework = ""
        self._finishes = False
        self._claim: int | None = None
        self._journal: Journal | None = None
        self._models: list[WatchedModel] = []
        self._departed: list[WatchedModel] = []
        self._gone: list[WatchedModel] = []
        self._tag: str | None = None
        self._watched = False
        self._said_unwatched = False
        self._said_dropping = False
        self.models_told = 0
        self.replays_on_device = False
        self.round_log = RoundLog(self)
        self.resumed = Resumed(self, local_path(settings.resume_path))
        self.unowned = UnownedWatch(self)
        self.updates = Updates(self)
        self.weights = WeightsWatch(self)
        self._count_from_0()

    def _count_from_0(self) -> None:
        """What belongs to one journal."""
        self.round_log.count_from_0()
        self.weights.start_over()
        self._saves = Saves()
        self.probe_seconds = 0.0

    # ------------------------------------------------------------------ models

    def admit(self, device: torch.device, framework: str = "ddp") -> bool:
        """Open the journal for the first watched model, if that has not happened.

        Args:
            device: where the model is.
            framework: as in the `Hello` message.

        Returns:
            Whether this process is watched: not so when another one is already this rank.

        Raises:
            OSError: the spool cannot be written.
        """
        if self.thread.off:
            return False
        if framework != SINGLE:
            self._leave_single()
        if self.identity is None:
            self.identity, self._claim = identify(self.settings.spool)
            self._device, self._framework = device, framework
            self._begin(self._new_journal(self.identity), self.identity)
            if not self._finishes:
                atexit.register(self.finish)
            self._finishes = True
        return not self.identity.duplicate

    def _leave_single(self) -> None:
        """A model is wrapped: what this process has trained alone is over."""
        if self.single is not None:
            self.single.leave()
        alone = self.identity
        if alone is None or self._framework != SINGLE or world_size() == alone.world_size:
            return
        # It is one of several after all: another rank, in a journal of its own.
        self._flush()
        self.write_progress()
        if self._journal is not None:
            self._journal.close()
        if self._claim is not None:
            os.close(self._claim)
        self.identity = self._journal = self._claim = None
        self.clock.start_over()
        self.models_told = 0
        self._count_from_0()
        self.arrivals.forget_passes()

    def add(self, model: WatchedModel) -> None:
        """A model is watched from now on; the first one's optimizer counts the steps."""
        self.remove_gone()
        for other in self._models:
            # A training that is over ends where the next one begins.
            other.forget_state()
        self._models.append(model)
        if self.autopsies.on_device.can_replay(model):
            self.replays_on_device = True
        if len(self._models) == 1:
            self.clock.follow(model.counted())
        self.describe(model)
        self.models_told += 1
        self._watched = True
        self._models_are_others()
        self.weights.wrapped(model)

    def admit_unowned(self, model: WatchedModel) -> None:
        """A gradient of parameters that no wrapped model owns has arrived: they are told of from now on."""
        self.models_told += 1
        self.describe(model)
        self._models_are_others()
        self.weights.wrapped(model)

    def _models_are_others(self) -> None:
        self.updates.forget_models()
        self.unowned.outdated = True

    def updated_unseen(self, model: WatchedModel) -> None:
        """An update of a model has shown by its weights alone."""
        if self._models and model is self._models[0]:
            self.clock.updated_unseen()

    def new_round(self, model: WatchedModel) -> None:
        """Gradients of a model come that no optimizer has taken yet."""
        if self._models and model is self._models[0]:
            self.clock.new_round()
        if self.resumed.waits:
            self.fuses.call(RESUMED, self.resumed.round_begins)

    @property
    def watching(self) -> bool:
        """Whether a model of this process is, or was, under watch, or its rank is another's."""
        return self.identity is not None

    def leave(self, model: WatchedModel) -> None:
        """The wrapper of a model was collected: it is removed when the next backward pass begins.

        Not at once: the garbage collector may run while torch compiles a step, and changes what that reads.
        """
        model.let_go()
        self._gone.append(model)

    def remove_gone(self) -> None:
        """Remove the models whose wrappers were collected."""
        while self._gone:
            self.remove(self._gone.pop())

    def remove(self, model: WatchedModel) -> None:
        """The model is no longer wrapped."""
        model.leave_arrivals()
        if model not in self._models:
            return
        was_first = self._models[0] is model
        self._models.remove(model)
        self._models_are_others()
        self.depart(model)
        if was_first and self._models:
            self.clock.follow(self._models[0].counted())

    def depart(self, model: WatchedModel) -> None:
        """A model is not watched any more: its read-outs may still be under way."""
        model.give_up()
        self._departed.append(model)

    @property
    def has_several(self) -> bool:
        """Whether one watched model may be given what another one has made."""
        return len(self._models) > 1

    def _may_examine_losses(self) -> bool:
        """Whether to look for what made a loss not finite: a replay finds it where it was the model."""
        return self.settings.autopsy and all(model.gave_finite_outputs for model in self._models)

    @property
    def models(self) -> list[WatchedModel]:
        """Those under watch now."""
        return self._models

    @property
    def all_models(self) -> list[WatchedModel]:
        """With those parameters that no model owns."""
        apart = self.unowned.active
        return self._models if apart is None else [*self._models, apart]

    def models_of(self, optimizer: Any) -> list[WatchedModel]:
        """The watched models of which the optimizer updates parameters."""
        return [model for model in self.updates.models_of(optimizer) if model is not self.unowned.model]

    def unwatched(self, reason: str, *, once: bool = True) -> None:
        """Say that this process trains what is not watched, and why; `once` for the first reason only."""
        if once and self._said_unwatched:
            return
        self._said_unwatched = True
        message = unwatched_message(self.settings, reason)
        if self._journal is not None:
            self.append("unwatched", message)
            return
        # A process with nothing to watch says its one line, and claims no rank.
        name = spool.rank_journal_name(message.get("rank", 0), spool.new_incarnation())
        journal = Journal(self.settings.spool, name)
        journal.append("unwatched", message)
        journal.close()

    # ------------------------------------------------------------------ threads

    def _has_what_trains(self) -> bool:
        return self.watching or (self.single is not None and self.single.follows)

    def _thread_begins(self) -> None:
        self.arrivals.thread_begins()
        self.clock.thread_begins()

    def _threads_overlap(self) -> bool:
        """A second thread trains; whether nothing is watched any more."""
        self.unowned.off = True
        # Of a wrapped model, only its own thread ever reads the gradients.
        return self._framework in {"", SINGLE}

    def _leave_threads(self) -> None:
        self.fuses.call("threads", self._leave_what_threads_share)

    def _leave_what_threads_share(self) -> None:
        if self.thread.off and self.single is not None:
            self.single.leave()
        self.unowned.leave()
        self.unwatched(OF_SEVERAL_THREADS if self.thread.off else OF_ANOTHER_THREAD, once=False)

    # ------------------------------------------------------------------ what watching costs

    @property
    def probe_memory(self) -> int:
        """Bytes that the probe keeps, beside what is there for a replay of a bad pass."""
        return sum(model.nbytes for model in self._models)

    def spent(self, seconds: float) -> None:
        """Time that the training waited for the probe."""
        self.probe_seconds += seconds

    # ------------------------------------------------------------------ the user's words

    def tag(self, batch: Any) -> None:
        """What the user says about the batch under way; events of later rounds carry it."""
        self._tag = None if batch is None else json.dumps(batch, default=str)[:TAG_CHARACTERS]

    @property
    def batch(self) -> str | None:
        """JSON of what the user has said."""
        return self._tag

    def checkpoint_saved(self, path: str, step: int | None) -> None:
        """The user says that a checkpoint has been written."""
        message: dict[str, Any] = {"path": absolute(path), "declared": True}
        if step is not None:
            message["step"] = step
        self.append("checkpoint", message)

    def exchanged(self) -> None:
        """This process has sent tensors to single ranks, or all to all."""
        self.has_exchanged = True

    # ------------------------------------------------------------------ the scaler

    def stepped(self, optimizer: Any) -> None:
        """An update attempt of the first model's optimizer is over."""
        self.learning_rate = learning_rate(optimizer)

    def loss_scaled(self, losses: Any, scaler: Any) -> None:
        """A GradScaler has scaled losses."""
        self.losses.scaled(losses, scaler)
        for model in self._models:
            model.loss_scaled(losses)

    # ------------------------------------------------------------------ saves

    def saving(self, path: Callable[[], str]) -> None:
        """A save begins in this process; told once a model of it is watched.

        Args:
            path: gives the absolute path, or "".
        """
        if not self._watched:
            return
        where, step = path(), self.clock.step
        if self._saves.is_new(where, step):
            self.append("checkpoint", {"path": where, "step": step})

    # ------------------------------------------------------------------ writing

    def write_progress(self) -> None:
        """Rewrite the progress file."""
        journal = self._journal
        if journal is None or self.identity is None:
            return
        began = self.round_log.first_at
        message: dict[str, Any] = {
            "incarnation": self.identity.incarnation,
            "step": self.clock.step,
            "probe_seconds": self.probe_seconds,
            "train_seconds": 0.0 if began is None else time.perf_counter() - began,
            "faults": dict(self.fuses.counts),
            "at": time.time(),
            "journal_records": journal.records,
            **self.round_log.tally.progress(self.autopsies.held, journal.dropped),
        }
        if self.round_log.magnitude is not None:
            message["magnitude"] = self.round_log.magnitude
        if self.weights.finite is not None:
            message |= {"weights_finite": self.weights.finite, "weights_step": self.weights.step}
        journal.progress(message)

    def start_over(self, generation: int, step: int | None, loaded: dict[str, Any]) -> None:
        """The ranks have loaded a checkpoint: end this journal, and begin one in a new generation.

        Args:
            generation: in which the training goes on.
            step: of the checkpoint; None when not known.
            loaded: the last record of the old journal.

        Raises:
            OSError: the spool cannot be written; nothing has changed.
        """
        for model in self.all_models:
            model.catch_up()
        self._flush()
        ended, identity, journal = self._journal, self.identity, None
        if identity is not None:
            identity = replace(identity, incarnation=spool.new_incarnation())
            journal = self._new_journal(identity)
        self.append("loaded", loaded)
        self.write_progress()
        if ended is not None:
            ended.close()
        self.settings = replace(self.settings, generation=generation)
        if step is not None:
            self.clock.set_step(step)
        self._count_from_0()
        self.arrivals.forget_passes()
        self.autopsies.start_over()
        for model in self.all_models:
            model.start_over()
        if self.guarding is not None:
            self.guarding.start_over()
        self.identity = identity
        if journal is not None and identity is not None:
            self._begin(journal, identity)
            for model in self.all_models:
                self.describe(model)

    def forget_error_feedback(self) -> None:
        """Clear what compressing comm hooks carry from round to round."""
        for model in self._models:
            model.forget_error_feedback()

    def finish(self) -> None:
        """At exit: wait for the read-outs under way and write the last progress."""
        if self._journal is not None and not self._journal.is_ours:
            return  # a forked child, which ends
        try:
            self.remove_gone()
            self._flush()
            self.resumed.attempted()
            self.autopsies.finish()
            self.write_progress()
        except Exception as error:
            self.fuses.blow("exit", error)
        if self._journal is not None:
            self._journal.close()
        if self.round_log.tally.rounds:
            # gloo's threads still let go of the last reductions' Python callbacks; one that comes
            # for the interpreter's lock once that is being taken down aborts the process.
            time.sleep(LINGER_SECONDS)

    def _flush(self) -> None:
        """Wait for the read-outs under way, and write down what waits for the next round."""
        self.round_log.warn()
        for model in [*self._departed, *self.all_models]:
            self.round_log.landed(model, model.look.arrived(wait=True))
            model.tell_checksum(wait=True)

    def _new_journal(self, identity: Identity) -> Journal:
        name = spool.rank_journal_name(identity.rank, identity.incarnation)
        return Journal(self.settings.spool, name)

    def _begin(self, journal: Journal, identity: Identity) -> None:
        self._journal = journal
        if self._device is not None:
            self.append("hello", identity.hello(self.settings, self._device, self._framework))
        self.write_progress()

    def describe(self, model: WatchedModel) -> None:
        """Journal a `Model` message."""
        named = self.identity is not None and self.identity.rank == 0
        self.append("model", model.as_message(with_parameters=named))

    def append(self, kind: str, message: dict[str, Any]) -> None:
        """Journal one record; says so once if it cannot be written."""
        journal = self._journal
        if journal is None or not journal.is_ours or journal.append(kind, message) or self._said_dropping:
            return
        self._said_dropping = True
        sys.stderr.write(
            f"gradwatch: an event could not be written to {self.settings.spool} "
            f"({', '.join(journal.dropped)}) and is lost; it is counted, and the training goes on.\n"
        )

    def read_out_departed(self) -> None:
        """Write down what has arrived of models that are no longer wrapped."""
        self._departed = [model for model in self._departed if not self._is_read_out(model)]

    def _is_read_out(self, model: WatchedModel) -> bool:
        self.round_log.landed(model, model.look.arrived())
        model.tell_checksum()
        return not model.under_way
