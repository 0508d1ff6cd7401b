"""Replay a pass, of this rank or of another one of the host, and journal what comes of it."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from gradwatch.agent.probe.autopsy.capsule import NUMPY, PYTHON, nbytes_of
from gradwatch.agent.probe.autopsy.child import ChildError, in_child
from gradwatch.agent.probe.autopsy.due import Due, name_of, why_not
from gradwatch.agent.probe.autopsy.evidence import Evidence
from gradwatch.agent.probe.autopsy.handover import Handover, NoShardsError
from gradwatch.agent.probe.autopsy.in_process import in_process
from gradwatch.agent.probe.autopsy.inventory import take_inventory
from gradwatch.agent.probe.autopsy.proof import evidence_of, places_of, weights_of
from gradwatch.agent.probe.autopsy.replay import Case, not_done, replay
from gradwatch.agent.probe.autopsy.shelf import NotShareable, Shelf, read_shards
from gradwatch.agent.probe.phases.loss_pass import completed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager
    from typing import IO

    import torch

    from gradwatch.agent.probe.autopsy.capsule import Capsule
    from gradwatch.agent.probe.autopsy.python_state import State
    from gradwatch.agent.probe.autopsy.shelf import Taken
    from gradwatch.agent.probe.model import WatchedModel
    from gradwatch.agent.probe.passes import Pass
    from gradwatch.agent.probe.rounds import Moment
    from gradwatch.agent.probe.watcher import Watcher

# That the training waits: for one, and for all of a process.
SECONDS = 20.0
SECONDS_IN_ALL = 60.0
# Other ranks that replay a pass: with the owner they are three, of which two can outvote one.
PEERS = 2


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


@dataclass(frozen=True)
class _Wanted:
    """A pass that is to be replayed.

    Attributes:
        capsule: what went in.
        output: whether the model's output was finite, as far as known.
        evidence: to compare the replay with.
    """

    capsule: Capsule
    output: object
    evidence: Evidence


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
        if one is None:
            due.not_shared = f"which of {len(due.candidates)} passes it was is not known"
            return False
        if one.capsule is None:
            return False
        began = time.perf_counter()
        evidence = self._evidence(model, due, one)
        evidence.weights = weights_of(model)
        about = {
            "microbatch": one.backward,
            "output": one.output if isinstance(one.output, bool) else None,
            "evidence": evidence.plain(),
        }
        try:
            shelf.put(due.name, identity.rank, one.capsule, about)
        except NotShareable as why:
            due.not_shared = str(why)
        except OSError as error:
            due.not_shared = f"it could not be written for them: {error}"
        due.seconds += time.perf_counter() - began
        return not due.not_shared

    def own(self, model: WatchedModel, due: Due) -> dict[str, Any]:
        """Replay this rank's own bad pass; fields of the `Autopsy` message."""
        began = time.perf_counter()
        reason = due.why_not()
        report = _Report(due.moment, due.microbatch)
        if reason:
            told = not_done(reason)
            if due.handover is not None:
                due.handover.call_off(due.name)
                due.handover = None
        else:
            try:
                with _shards_for(model, due) as shards:
                    told = self._candidates(model, due, shards, report)
            except NoShardsError as why:
                told = not_done(str(why))
        if due.not_shared and told["replay"] != "REPLAY_NOT_DONE":
            told.setdefault("missing", []).append(f"whether it goes bad on another rank: {due.not_shared}")
        report.seconds = due.seconds + time.perf_counter() - began
        told = self._completed(model, due, told)
        self._write(report, told)
        return told

    def _candidates(
        self, model: WatchedModel, due: Due, shards: Mapping[int, IO[bytes]], report: _Report
    ) -> dict[str, Any]:
        """Replay the passes that may be the bad one, in order of time, until one goes bad."""
        until = time.monotonic() + SECONDS
        results: list[dict[str, Any]] = []
        for one in due.candidates:
            reason = why_not(one)
            if reason or one.capsule is None:
                results.append(not_done(reason))
                continue
            report.nbytes += one.capsule.nbytes
            case = _Wanted(one.capsule, one.output, self._evidence(model, due, one))
            told = self._replayed(model, due.moment, case, shards, seconds=until - time.monotonic())
            if told["replay"] == "REPLAY_REPRODUCED":
                report.microbatch = one.backward
                return told
            results.append(told)
        unknown = [told for told in results if told["replay"] != "REPLAY_FINITE"]
        return unknown[0] if unknown else _all_finite(results)

    def anothers(
        self,
        model: WatchedModel,
        moment: Moment,
        shards: Mapping[int, IO[bytes]] | None = None,
        *,
        most: int = 1,
    ) -> dict[str, Any] | None:
        """Ours was finite and another's was not: replay what that rank has laid down, with our weights.

        Args:
            model: ours.
            moment: the round's.
            shards: by rank, what others hold of the parameters, where these are sharded.
            most: how many ranks may do so.

        Returns:
            Fields of the `Autopsy` message; None where nothing was there to be replayed.
        """
        shelf = self.shelf
        if shelf is None:
            return None
        began = time.perf_counter()
        taken = shelf.take(name_of(moment), model.device, most=most)
        if taken is None:
            return None
        capsule, evidence = taken.capsule, Evidence.of(taken.about["evidence"])
        if evidence.weights is not None and evidence.weights != weights_of(model):
            evidence.doubts.append("the weights are not those of the other rank")
        elif model.shards is not None and taken.rank not in model.shards.peers:
            evidence.doubts.append("the weights were not compared with those of the other rank")
        self._take_state(model, moment, taken)
        wanted = _Wanted(capsule, taken.about["output"], evidence)
        told = self._replayed(model, moment, wanted, shards or {}, seconds=SECONDS)
        report = _Report(moment, taken.about["microbatch"], of_rank=taken.rank, nbytes=nbytes_of(capsule))
        report.seconds = time.perf_counter() - began
        self._write(report, told)
        return told

    def rehearse(self, model: WatchedModel, moment: Moment, of_round: int) -> None:
        """Replay a clean pass, and journal whether it comes out equal: what a replay of a bad one is worth.

        Args:
            model: whose it is.
            moment: the clean round's.
            of_round: of the bad pass.
        """
        due = Due(moment, None, moment.passes)
        one, reason, equal = due.bad_pass, due.why_not(), False
        began = time.perf_counter()
        if one is None or one.capsule is None or reason:
            doubts = [reason or "gradients of several passes are summed up"]
        else:
            wanted = _Wanted(one.capsule, one.output, self._evidence(model, due, one))
            told = self._replayed(model, moment, wanted, {}, seconds=SECONDS)
            equal = told.get("faithful", False)
            doubts = told.get("doubts") or ([] if equal else [told.get("reason", "it went bad")])
        self._seconds += time.perf_counter() - began
        self._watcher.append(
            "rehearsal",
            {
                "root": moment.root,
                "round": moment.round,
                "step": moment.step,
                "of_round": of_round,
                "equal": equal,
                "doubts": doubts,
            },
        )

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
            return {**told, **armed.report(), "missing": []}
        facts = [one.facts for one in losses]
        if model.on_host and facts and all(one is not None and not one.is_compiled for one in facts):
            armed.arm()
        return told

    def _evidence(self, model: WatchedModel, due: Due, one: Pass) -> Evidence:
        roots = self._watcher.losses.roots if due.roots is None else due.roots
        return evidence_of(model, due.moment, one, due.checksums, roots)

    def _take_state(self, model: WatchedModel, moment: Moment, taken: Taken) -> None:
        """Have our modules be in the state in which the other rank's were."""
        capsule, module = taken.capsule, model.module()
        if taken.state is None or module is None:
            return
        try:
            capsule.state = _own_state(module, moment)
            capsule.doubts += capsule.state.take_over(taken.state)
        except Exception as error:
            capsule.doubts.append(f"the state of its modules could not be handed on ({type(error).__name__})")

    def _replayed(
        self,
        model: WatchedModel,
        moment: Moment,
        wanted: _Wanted,
        shards: Mapping[int, IO[bytes]],
        *,
        seconds: float,
    ) -> dict[str, Any]:
        enough = self.why_no_more()
        if enough is not None:
            return not_done(enough)
        if seconds <= 0:
            return not_done("it took too long")
        module = model.module()
        if module is None:
            return not_done("the model itself is not known")
        was_bad = not wanted.output if isinstance(wanted.output, bool) else None
        arrived = {key: place for place, key in enumerate(moment.order)}
        # Those first whose gradients arrived first.
        keys = sorted(model.keys, key=lambda one: arrived.get(one, len(arrived)))

        def parameters() -> list[torch.Tensor]:
            by_key = model.prepare_replay(read_shards(shards))
            return [by_key[key] for key in keys]

        places = places_of(model)
        case = Case(
            module, wanted.capsule, parameters, was_bad, wanted.evidence, [places[key] for key in keys]
        )
        if not model.on_host:
            told = in_process(case, model.device, seconds=seconds)
        else:
            try:
                told = in_child(lambda: replay(case), seconds=seconds, threads=wanted.capsule.threads)
            except ChildError as error:
                told = not_done(str(error))
        capsules, doubts = self._watcher.autopsies.capsules, told.get("doubts", ())
        capsules.keeps_numpy = capsules.keeps_numpy or NUMPY in doubts
        capsules.keeps_python = capsules.keeps_python or PYTHON in doubts
        return told

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


def _own_state(module: torch.nn.Module, moment: Moment) -> State:
    """As our modules are now, but for what runs in place of the model's forward for the time of a pass."""
    for one in moment.passes:
        if one.capsule is not None and one.capsule.state is not None:
            then = one.capsule.state
            with suppress(KeyError, ValueError):
                return replace(then.inventory.take(), forward=then.forward)
    return take_inventory(module).take()


def _all_finite(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One result of several, each of which stayed finite."""
    told = dict(results[0])
    doubts = [doubt for one in results for doubt in one.get("doubts", ())]
    if len(results) > 1:
        doubts.append(f"which of {len(results)} passes went bad is not known")
    if doubts:
        told |= {"faithful": False, "doubts": list(dict.fromkeys(doubts))}
    return told
