"""Replay a pass, of this rank or of another one of the host, and journal what comes of it."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradwatch.agent.probe.autopsy.capsule import nbytes_of
from gradwatch.agent.probe.autopsy.child import ChildError, in_child
from gradwatch.agent.probe.autopsy.due import name_of
from gradwatch.agent.probe.autopsy.handover import Handover, NoShardsError
from gradwatch.agent.probe.autopsy.in_process import in_process
from gradwatch.agent.probe.autopsy.replay import Case, not_done, replay
from gradwatch.agent.probe.autopsy.shelf import NotShareable, Shelf, read_shards
from gradwatch.agent.probe.phases.loss_pass import completed

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager
    from typing import IO

    import torch

    from gradwatch.agent.probe.autopsy.capsule import Capsule
    from gradwatch.agent.probe.autopsy.due import Due
    from gradwatch.agent.probe.model import WatchedModel
    from gradwatch.agent.probe.rounds import Moment
    from gradwatch.agent.probe.watcher import Watcher

# That the training waits: for one, and for all of a process.
SECONDS = 20.0
SECONDS_IN_ALL = 60.0


@dataclass
class _Report:
    """What is told of any replay, whatever came of it."""

    moment: Moment
    microbatch: int | None
    of_rank: int | None = None
    seconds: float = 0.0
    nbytes: int = 0

    def as_message(self, own_rank: int) -> dict[str, Any]:
        """The fields of the `Autopsy` message in its JSON mapping."""
        moment = self.moment
        microbatch = moment.microbatch if self.microbatch is None else self.microbatch
        message: dict[str, Any] = {
            "root": moment.root,
            "round": moment.round,
            "step": moment.step,
            "of_rank": own_rank if self.of_rank is None else self.of_rank,
            "seconds": self.seconds,
            "nbytes": self.nbytes,
        }
        return message if microbatch is None else message | {"microbatch": microbatch}


class Replayer:
    """Replays for one process.

    Args:
        watcher: the process's.
    """

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._shelf: Shelf | None = None
        self._seconds = 0.0

    @property
    def shelf(self) -> Shelf | None:
        """Of this host and attempt; None where the ranks of an attempt cannot be told from others."""
        identity = self._watcher.identity
        if self._shelf is None and identity is not None and identity.attempt_key is not None:
            self._shelf = Shelf(self._watcher.settings.spool, identity.attempt_key)
        return self._shelf

    def clear(self) -> None:
        """Delete what this rank has laid down and nobody took."""
        if self._shelf is not None:
            self._shelf.clear()

    def handover(self) -> Handover | None:
        """By which the ranks of this host hand their shards over; None where they cannot."""
        shelf, identity = self.shelf, self._watcher.identity
        if shelf is None or identity is None:
            return None
        return Handover(shelf, self._watcher.settings.spool, identity.rank)

    def why_no_more(self) -> str | None:
        """Why nothing is replayed any more; None while it is."""
        if self._seconds < SECONDS_IN_ALL:
            return None
        return f"autopsies have taken {SECONDS_IN_ALL:.0f} seconds already"

    def share(self, model: WatchedModel, due: Due) -> bool:
        """Lay the capsule down for other ranks, or note why not; whether it lies there."""
        one, shelf, identity = due.bad_pass, self.shelf, self._watcher.identity
        if model.group_size == 1 or shelf is None or identity is None or due.why_not():
            return False
        if one is None or one.capsule is None:
            return False
        began = time.perf_counter()
        about = {"microbatch": one.backward, "output": one.output if isinstance(one.output, bool) else None}
        try:
            shelf.put(due.name, identity.rank, one.capsule, about)
        except NotShareable as why:
            due.not_shared = str(why)
        except OSError as error:
            due.not_shared = f"it could not be written for them: {error}"
        due.seconds += time.perf_counter() - began
        return not due.not_shared

    def own(self, model: WatchedModel, due: Due) -> None:
        """Replay this rank's own bad pass."""
        began = time.perf_counter()
        one, reason = due.bad_pass, due.why_not()
        report = _Report(due.moment, due.microbatch)
        if reason or one is None or one.capsule is None:
            told = not_done(reason)
            if due.handover is not None:
                due.handover.call_off(due.name)
                due.handover = None
        else:
            report.nbytes = one.capsule.nbytes
            try:
                with _shards_for(model, due) as shards:
                    told = self._replayed(model, due.moment, one.capsule, one.output, shards)
            except NoShardsError as why:
                told = not_done(str(why))
        if due.not_shared and told["replay"] != "REPLAY_NOT_DONE":
            told.setdefault("missing", []).append(f"whether it goes bad on another rank: {due.not_shared}")
        report.seconds = due.seconds + time.perf_counter() - began
        self._write(report, self._completed(model, due, told))

    def anothers(
        self, model: WatchedModel, moment: Moment, shards: Mapping[int, IO[bytes]] | None = None
    ) -> None:
        """Ours was finite and another's was not: replay what that rank has laid down, with our weights."""
        shelf = self.shelf
        if shelf is None:
            return
        began = time.perf_counter()
        taken = shelf.take(name_of(moment), model.device)
        if taken is None:
            return
        owner, capsule, about = taken
        told = self._replayed(model, moment, capsule, about["output"], shards or {})
        report = _Report(moment, about["microbatch"], of_rank=owner, nbytes=nbytes_of(capsule))
        report.seconds = time.perf_counter() - began
        self._write(report, told)

    def leave(self, model: WatchedModel, due: Due, reason: str) -> None:
        """Say that it is not replayed, and why."""
        self._write(_Report(due.moment, due.microbatch), self._completed(model, due, not_done(reason)))

    def _completed(self, model: WatchedModel, due: Due, told: dict[str, Any]) -> dict[str, Any]:
        """What is told, with what the loss shows; a fault without a line is looked at closely next time."""
        told = completed(told, due.phase, due.passes, alone=model.module() is None)
        if told["replay"] == "REPLAY_REPRODUCED" or due.phase in {"PHASE_INPUT", "PHASE_PARAMETER"}:
            return told
        armed = self._watcher.armed
        losses = [one.loss for one in due.passes if one.loss is not None]
        was_finite = bool(losses) and all(
            isinstance(one.loss, float) and math.isfinite(one.loss) for one in losses
        )
        if armed.maker is not None and was_finite and all(one.output is True for one in due.passes):
            # Had something been bad before, the first gradient that is would only show it.
            return {**told, **armed.told(), "missing": []}
        facts = [one.facts for one in losses]
        if model.on_host and facts and all(one is not None and not one.is_compiled for one in facts):
            armed.arm()
        return told

    def _replayed(
        self,
        model: WatchedModel,
        moment: Moment,
        capsule: Capsule,
        output: object,
        shards: Mapping[int, IO[bytes]],
    ) -> dict[str, Any]:
        enough = self.why_no_more()
        if enough is not None:
            return not_done(enough)
        module = model.module()
        if module is None:
            return not_done("the model itself is not known")
        was_bad = not output if isinstance(output, bool) else None

        def parameters() -> list[torch.Tensor]:
            """Those first whose gradients arrived first."""
            by_key = model.prepare_replay(read_shards(shards))
            places = {key: place for place, key in enumerate(moment.order)}
            return [by_key[key] for key in sorted(by_key, key=lambda one: places.get(one, len(places)))]

        case = Case(module, capsule, parameters, was_bad)
        if not model.on_host:
            return in_process(case, model.device, seconds=SECONDS)
        try:
            return in_child(lambda: replay(case), seconds=SECONDS)
        except ChildError as error:
            return not_done(str(error))

    def _write(self, report: _Report, told: dict[str, Any]) -> None:
        self._seconds += report.seconds
        identity = self._watcher.identity
        own = 0 if identity is None else identity.rank
        self._watcher.append("autopsy", report.as_message(own) | told)


def _shards_for(model: WatchedModel, due: Due) -> AbstractContextManager[Mapping[int, IO[bytes]]]:
    """By rank, what a replay needs; nothing where the parameters are not sharded.

    Raises:
        NoShardsError: they are not to be had; also when the context is entered.
    """
    if model.shards is None:
        return nullcontext({})
    if due.handover is None:
        raise NoShardsError("the ranks that hold parts of the parameters were not asked for them")
    return due.handover.own(due.name, model.shards)
