"""From protobuf to domain values: the one place that reads the schema's messages.

Whatever is in a report, it gives a report: what cannot be understood is counted, in the
record that it is in, so that it is counted once however often the report is sent.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

from gradwatch.collector import observations as obs
from gradwatch.collector.observations import DropReason
from gradwatch.collector.recovery.orders import Order, Task, Verb
from gradwatch.protos.v1 import gradwatch_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_log = logging.getLogger(__name__)

_VALUES: Mapping[int, obs.Value] = {
    pb.VALUE_NAN: obs.Value.NAN,
    pb.VALUE_POSITIVE_INFINITY: obs.Value.POSITIVE_INFINITY,
    pb.VALUE_NEGATIVE_INFINITY: obs.Value.NEGATIVE_INFINITY,
}
_PHASES: Mapping[int, obs.Phase] = {
    pb.PHASE_INPUT: obs.Phase.INPUT,
    pb.PHASE_PARAMETER: obs.Phase.PARAMETER,
    pb.PHASE_FORWARD: obs.Phase.FORWARD,
    pb.PHASE_LOSS: obs.Phase.LOSS,
    pb.PHASE_BACKWARD: obs.Phase.BACKWARD,
}
_COMPLETENESS: Mapping[int, obs.Completeness] = {
    pb.COMPLETENESS_COMPLETE: obs.Completeness.COMPLETE,
    pb.COMPLETENESS_IN_FLIGHT: obs.Completeness.IN_FLIGHT,
    pb.COMPLETENESS_TORN: obs.Completeness.TORN,
}
_TASKS: Mapping[int, obs.TaskKind] = {
    pb.TASK_KIND_WATCH: obs.TaskKind.WATCH,
    pb.TASK_KIND_SCAN: obs.TaskKind.SCAN,
    pb.TASK_KIND_QUARANTINE: obs.TaskKind.QUARANTINE,
}
_KINDS: Mapping[obs.TaskKind, Any] = {meaning: number for number, meaning in _TASKS.items()}
_ACTIONS: Mapping[Verb, Any] = {
    Verb.START: pb.ACTION_START,
    Verb.STOP: pb.ACTION_STOP,
    Verb.LOAD: pb.ACTION_LOAD,
    Verb.HALT: pb.ACTION_HALT,
    Verb.RELEASE: pb.ACTION_RELEASE,
}
_REPLAYS: Mapping[int, obs.Replay] = {
    pb.REPLAY_REPRODUCED: obs.Replay.REPRODUCED,
    pb.REPLAY_FINITE: obs.Replay.FINITE,
    pb.REPLAY_RECEIVED: obs.Replay.RECEIVED,
    pb.REPLAY_NOT_DONE: obs.Replay.NOT_DONE,
}
_UPDATES: Mapping[int, obs.UpdateEvidence] = {
    pb.UPDATE_EVIDENCE_GRADIENTS: obs.UpdateEvidence.GRADIENTS,
    pb.UPDATE_EVIDENCE_STATE: obs.UpdateEvidence.STATE,
    pb.UPDATE_EVIDENCE_EPSILON: obs.UpdateEvidence.EPSILON,
    pb.UPDATE_EVIDENCE_LEARNING_RATE: obs.UpdateEvidence.LEARNING_RATE,
    pb.UPDATE_EVIDENCE_SEEN: obs.UpdateEvidence.SEEN,
}
_STEP_SOURCES: Mapping[str, obs.StepSource] = {source.value: source for source in obs.StepSource}


# A probe keeps to these by itself; one gone wild must not fill the store.
_NAME = 512
_NOTE = 500
_PATH = _BATCH = 4096
_LISTED = 16
_GROUP = 65_536
# Steps and parameters of a flight, and sums of a checksum.
_FLIGHT = 64
_SUMS = 128


class _MalformedError(Exception):
    """The record says something that cannot be."""


def read_report(message: pb.Report) -> obs.Report:
    """Translate a report; `id` and `sidecar` are the stream's business."""
    return obs.Report(
        batches=tuple(
            obs.Batch(
                batch.incarnation, tuple(_record(batch.incarnation, record) for record in batch.records)
            )
            for batch in message.batches
            if batch.incarnation
        ),
        progress=tuple(_progress(progress) for progress in message.progress if progress.incarnation),
    )


def write_directive(what: Order | Task) -> pb.Directive:
    """An order or a task, for a sidecar."""
    if isinstance(what, Task):
        task = pb.Task(id=what.id, job=what.job, kind=_KINDS[what.kind], paths=what.paths, reason=what.reason)
        return pb.Directive(task=task)
    order = pb.Order(
        id=what.id,
        job=what.job,
        launch=what.launch,
        generation=what.generation,
        action=_ACTIONS[what.verb],
        reason=what.reason,
        skip_batches=what.skip_batches,
        exclude_node=what.exclude_node or "",
    )
    if what.resume is not None:
        order.resume_path = what.resume.path
        order.resume_step = what.resume.step
    return pb.Directive(order=order)


def _record(incarnation: str, message: pb.Record) -> obs.Record:
    at = message.at if math.isfinite(message.at) and message.at > 0 else None
    kind = message.WhichOneof("body") or ""
    drops: list[DropReason] = []
    try:
        if kind in _READERS:
            body = _READERS[kind](getattr(message, kind))
        elif kind in _READERS_OF_PARTS:
            body = _READERS_OF_PARTS[kind](getattr(message, kind), drops)
        else:
            return obs.Record(message.seq, at, None, (DropReason.UNKNOWN_RECORD,))
        same = kind != "hello" or message.hello.incarnation == incarnation
        _check(same, "the hello is of another incarnation than its journal")
    except _MalformedError as error:
        _log.warning("record %d of journal %s makes no sense: %s", message.seq, incarnation, error)
        return obs.Record(message.seq, at, None, (DropReason.MALFORMED_RECORD,))
    return obs.Record(message.seq, at, body, tuple(drops))


# ---------------------------------------------------------------- bodies


def _hello(message: pb.Hello) -> obs.Hello:
    _check(bool(message.job), "it names no job")
    _check(message.rank >= 0 and message.world_size >= 1, "rank or world size is out of range")
    _check(message.generation >= 0, "the generation is negative")
    return obs.Hello(
        job=message.job,
        generation=message.generation,
        attempt_key=_known(message, "attempt_key"),
        rank=message.rank,
        world_size=message.world_size,
        local_rank=_known(message, "local_rank"),
        node=message.node,
        pid=message.pid,
        device=message.device,
        device_id=_known(message, "device_id"),
        device_name=_known(message, "device_name"),
        torch_version=message.torch_version,
        probe_version=message.probe_version,
        framework=message.framework,
        duplicate_claim=message.duplicate_claim,
    )


def _model(message: pb.Model) -> obs.ModelSeen:
    _check(message.root >= 0, "the model's ordinal is negative")
    return obs.ModelSeen(
        root=message.root,
        module_class=message.module_class[:_NAME],
        wrapper=message.wrapper[:_NAME],
        group_size=max(message.group_size, 0),
        parameter_count=max(message.parameter_count, 0),
        parameters=tuple(
            obs.Parameter(
                name=parameter.name[:_NAME],
                module=parameter.module[:_NAME],
                module_class=parameter.module_class[:_NAME],
                shape=tuple(parameter.shape[:_LISTED]),
                dtype=parameter.dtype[:_NAME],
            )
            for parameter in message.parameters
        ),
        group=tuple(sorted({rank for rank in message.group[:_GROUP] if rank >= 0})),
    )


def _nonfinite(message: pb.NonFinite, drops: list[DropReason]) -> obs.NonFinite:
    _check_place(message)
    return obs.NonFinite(
        root=message.root,
        round=message.round,
        step=message.step,
        microbatch=_ordinal(message, "microbatch"),
        phase=_enum(message, "phase", _PHASES, drops),
        bucket=message.bucket,
        gradients=tuple(_gradient(gradient, drops) for gradient in message.gradients[:_LISTED]),
        gradients_total=max(message.gradients_total, 0),
        batch=_text(message, "batch", _BATCH),
        source=message.source[:_NAME],
        loss_scale_overflow=message.loss_scale_overflow,
        model_step=_ordinal(message, "model_step"),
        weights_finite=_known(message, "weights_finite"),
        bad_weights=_weights(message.bad_weights, drops),
        bad_weights_total=max(message.bad_weights_total, 0),
        weights_finite_step=_ordinal(message, "weights_finite_step"),
        loss=_known(message, "loss"),
        exchanged=message.exchanged,
        batch_hash=message.batch_hash[:_NAME],
        batch_value=_enum(message, "batch_value", _VALUES, drops),
        loss_note=message.loss_note[:_NOTE],
    )


def _bad_weights(message: pb.BadWeights, drops: list[DropReason]) -> obs.BadWeights:
    # Before the first reduction there is no newest round.
    _check(message.root >= 0, "the model's ordinal is negative")
    _check(message.round >= -1 and message.step >= 0, "round or step is negative")
    evidence = None
    if message.evidence != pb.UPDATE_EVIDENCE_UNSPECIFIED:
        evidence = _UPDATES.get(message.evidence)
        if evidence is None:
            drops.append(DropReason.UNKNOWN_ENUM)
    return obs.BadWeights(
        root=message.root,
        round=max(message.round, 0),
        step=message.step,
        model_step=_ordinal(message, "model_step"),
        weights=_weights(message.weights, drops),
        weights_total=max(message.weights_total, 0),
        evidence=evidence,
        gradients=tuple(_gradient(gradient, drops) for gradient in message.gradients[:_LISTED]),
        gradients_total=max(message.gradients_total, 0),
        optimizer=message.optimizer[:_NAME],
        eps=_known(message, "eps"),
        learning_rate=_known(message, "learning_rate"),
        finite_step=_ordinal(message, "finite_step"),
        batch=_text(message, "batch", _BATCH),
        initial=message.initial,
    )


def _weights(messages: Sequence[pb.BadWeight], drops: list[DropReason]) -> tuple[obs.BadWeight, ...]:
    return tuple(
        obs.BadWeight(
            parameter=message.parameter[:_NAME],
            value=_enum(message, "value", _VALUES, drops),
            count=_ordinal(message, "count"),
            numel=max(message.numel, 0),
        )
        for message in messages[:_LISTED]
    )


def _bad_loss(message: pb.BadLoss) -> obs.BadLoss:
    _check_place(message)
    return obs.BadLoss(
        root=message.root,
        round=message.round,
        step=message.step,
        loss=message.loss,
        batch=_text(message, "batch", _BATCH),
    )


def _rehearsal(message: pb.Rehearsal) -> obs.Rehearsal:
    _check_place(message)
    _check(message.of_round >= 0, "the round that it speaks for is negative")
    return obs.Rehearsal(
        root=message.root,
        round=message.round,
        step=message.step,
        of_round=message.of_round,
        equal=message.equal,
        doubts=_notes(message.doubts),
    )


def _resumed(message: pb.Resumed) -> obs.Resumed:
    _check(bool(message.path), "it names no path")
    return obs.Resumed(path=message.path[:_PATH], opened=message.opened)


def _gradient(message: pb.BadGradient, drops: list[DropReason]) -> obs.BadGradient:
    return obs.BadGradient(
        parameter=message.parameter[:_NAME],
        module=message.module[:_NAME],
        module_class=message.module_class[:_NAME],
        value=_enum(message, "value", _VALUES, drops),
        count=_ordinal(message, "count"),
        numel=max(message.numel, 0),
        dtype=message.dtype[:_NAME],
        backward_position=_ordinal(message, "backward_position"),
    )


def _reduced(message: pb.Reduced, drops: list[DropReason]) -> obs.Reduced:
    _check_place(message)
    return obs.Reduced(
        root=message.root,
        round=message.round,
        step=message.step,
        gradients=tuple(_gradient(gradient, drops) for gradient in message.gradients[:_LISTED]),
        gradients_total=max(message.gradients_total, 0),
        loss_scale_overflow=message.loss_scale_overflow,
    )


def _optimizer_state(message: pb.OptimizerState) -> obs.OptimizerState:
    _check_place(message)
    return obs.OptimizerState(
        root=message.root,
        round=message.round,
        step=message.step,
        parameter=message.parameter[:_NAME],
        module=message.module[:_NAME],
        module_class=message.module_class[:_NAME],
        dtype=message.dtype[:_NAME],
        numel=max(message.numel, 0),
        magnitude=message.magnitude,
        limit=message.limit,
        local_magnitude=_known(message, "local_magnitude"),
        parameters_total=max(message.parameters_total, 0),
        optimizer=message.optimizer[:_NAME],
        skipped=message.skipped,
        batch=_text(message, "batch", _BATCH),
    )


def _exploding(message: pb.Exploding) -> obs.Exploding:
    _check_place(message)
    return obs.Exploding(
        root=message.root,
        round=message.round,
        step=message.step,
        parameter=message.parameter[:_NAME],
        module=message.module[:_NAME],
        module_class=message.module_class[:_NAME],
        magnitude=message.magnitude,
        usual=message.usual,
        parameters_total=max(message.parameters_total, 0),
    )


def _flight(message: pb.Flight) -> obs.Flight:
    _check_place(message)
    complete = all(len(step.magnitudes) == len(message.parameters) for step in message.steps)
    _check(complete, "a step of it has more or fewer magnitudes than there are parameters")
    return obs.Flight(
        root=message.root,
        round=message.round,
        step=message.step,
        parameters=tuple(name[:_NAME] for name in message.parameters[:_FLIGHT]),
        steps=tuple(
            obs.FlightStep(
                round=step.round,
                step=step.step,
                loss=_known(step, "loss"),
                loss_scale=_known(step, "loss_scale"),
                learning_rate=_known(step, "learning_rate"),
                magnitude=_known(step, "magnitude"),
                magnitudes=tuple(step.magnitudes[:_FLIGHT]),
            )
            for step in message.steps[-_FLIGHT:]
        ),
        dtype_max=message.dtype_max,
        dtype=message.dtype[:_NAME],
    )


def _autopsy(message: pb.Autopsy, drops: list[DropReason]) -> obs.Autopsy:
    _check_place(message)
    _check(message.of_rank >= 0, "the rank is negative")
    replay = _REPLAYS.get(message.replay)
    if replay is None:
        raise _MalformedError("it does not say what became of the replay")
    return obs.Autopsy(
        root=message.root,
        round=message.round,
        step=message.step,
        microbatch=_ordinal(message, "microbatch"),
        of_rank=message.of_rank,
        replay=replay,
        reason=message.reason[:_NOTE],
        phase=_enum(message, "phase", _PHASES, drops),
        operator=_text(message, "operator"),
        module=_text(message, "module"),
        module_class=_text(message, "module_class"),
        source=_text(message, "source"),
        code=_text(message, "code", _NOTE),
        inputs=tuple(
            obs.OperatorInput(
                dtype=one.dtype[:_NAME],
                shape=tuple(one.shape[:_LISTED]),
                min=_known(one, "min"),
                max=_known(one, "max"),
                nonfinite=max(one.nonfinite, 0),
                empty_rows=_ordinal(one, "empty_rows"),
            )
            for one in message.inputs[:_LISTED]
        ),
        value=_enum(message, "value", _VALUES, drops),
        missing=_notes(message.missing),
        seconds=_finite(message.seconds),
        nbytes=max(message.nbytes, 0),
        faithful=_known(message, "faithful"),
        doubts=_notes(message.doubts),
    )


def _checksum(message: pb.Checksum) -> obs.Checksum:
    _check_place(message)
    return obs.Checksum(
        root=message.root,
        round=message.round,
        step=message.step,
        parameters=max(message.parameters, 0),
        sums=tuple(message.sums[:_SUMS]),
    )


def _checkpoint(message: pb.CheckpointSeen) -> obs.CheckpointSeen:
    return obs.CheckpointSeen(path=message.path, step=_known(message, "step"), declared=message.declared)


def _fault(message: pb.Fault) -> obs.Fault:
    return obs.Fault(part=message.part, error=message.error)


def _unwatched(message: pb.Unwatched) -> obs.Unwatched:
    _check(bool(message.job), "it names no job")
    return obs.Unwatched(
        job=message.job,
        generation=message.generation,
        node=message.node,
        pid=message.pid,
        rank=_known(message, "rank"),
        world_size=_known(message, "world_size"),
        reason=message.reason,
    )


def _launch_started(message: pb.LaunchStarted) -> obs.LaunchStarted:
    _check_launch(message)
    _check(message.generation >= 0, "the generation is negative")
    return obs.LaunchStarted(
        job=message.job,
        generation=message.generation,
        launch=message.launch,
        node=message.node,
        pid=message.pid,
        command=tuple(message.command),
        policy_hash=_known(message, "policy_hash"),
        whole_job=message.whole_job,
    )


def _launch_ended(message: pb.LaunchEnded) -> obs.LaunchEnded:
    _check_launch(message)
    return obs.LaunchEnded(
        job=message.job,
        generation=message.generation,
        launch=message.launch,
        exit_code=message.exit_code,
        ended_by=message.ended_by,
    )


def _skipped(message: pb.Skipped) -> obs.Skipped:
    _check_time(message)
    return obs.Skipped(
        step=message.step,
        round=message.round,
        consecutive=message.consecutive,
        in_last_1000=message.in_last_1000,
        exhausted=message.exhausted,
    )


def _guard_off(message: pb.GuardOff) -> obs.GuardOff:
    return obs.GuardOff(reason=message.reason)


def _command_started(message: pb.CommandStarted) -> obs.CommandStarted:
    _check_launch(message)
    return obs.CommandStarted(
        job=message.job,
        generation=message.generation,
        launch=message.launch,
        no_restart=message.no_restart,
    )


def _command_stopped(message: pb.CommandStopped) -> obs.CommandStopped:
    _check_launch(message)
    return obs.CommandStopped(
        job=message.job,
        generation=message.generation,
        launch=message.launch,
        order=message.order,
        exit_code=_known(message, "exit_code"),
        restarts=message.restarts,
    )


def _checkpoint_root(message: pb.CheckpointRoot) -> obs.CheckpointRoot:
    _check(bool(message.job and message.root), "it names no job or no root")
    return obs.CheckpointRoot(
        job=message.job,
        generation=message.generation,
        node=message.node,
        root=message.root,
        error=message.error,
        launch=message.launch,
    )


def _checkpoint_scanned(message: pb.CheckpointScanned, drops: list[DropReason]) -> obs.CheckpointScanned:
    _check(bool(message.path), "it names no path")
    completeness = None
    if message.completeness != pb.COMPLETENESS_UNSPECIFIED:
        completeness = _COMPLETENESS.get(message.completeness)
        if completeness is None:
            drops.append(DropReason.UNKNOWN_ENUM)
    return obs.CheckpointScanned(
        path=message.path,
        layout=message.layout,
        completeness=completeness,
        reason=message.reason,
        finite=_known(message, "finite"),
        bad_buffers=tuple(message.bad_buffers),
        steps=tuple(
            obs.CheckpointStep(_STEP_SOURCES[step.source], step.step)
            for step in message.steps
            if step.source in _STEP_SOURCES
        ),
        modified_at=_finite(message.modified_at),
        error=message.error,
        found=message.found,
        nbytes=message.nbytes,
        seconds=_finite(message.seconds),
    )


def _checkpoint_gone(message: pb.CheckpointGone) -> obs.CheckpointGone:
    _check(bool(message.path), "it names no path")
    return obs.CheckpointGone(path=message.path)


def _task_done(message: pb.TaskDone) -> obs.TaskDone:
    kind = _TASKS.get(message.kind)
    if kind is None:
        raise _MalformedError("it is of a task of an unknown kind")
    return obs.TaskDone(id=message.id, kind=kind, error=message.error, paths=tuple(message.paths))


def _loaded(message: pb.Loaded) -> obs.Loaded:
    return obs.Loaded(order=message.order, path=message.path, step=message.step, error=message.error)


_READERS: Mapping[str, Callable[[Any], obs.Body]] = {
    "hello": _hello,
    "model": _model,
    "checkpoint": _checkpoint,
    "fault": _fault,
    "unwatched": _unwatched,
    "launch_started": _launch_started,
    "launch_ended": _launch_ended,
    "skipped": _skipped,
    "guard_off": _guard_off,
    "command_started": _command_started,
    "command_stopped": _command_stopped,
    "checkpoint_root": _checkpoint_root,
    "checkpoint_gone": _checkpoint_gone,
    "task_done": _task_done,
    "loaded": _loaded,
    "can_load": lambda _message: obs.CanLoad(),
    "optimizer_state": _optimizer_state,
    "exploding": _exploding,
    "flight": _flight,
    "checksum": _checksum,
    "loss": _bad_loss,
    "rehearsal": _rehearsal,
    "resumed": _resumed,
}
# Of these a value may be of no use, and the record still be.
_READERS_OF_PARTS: Mapping[str, Callable[[Any, list[DropReason]], obs.Body]] = {
    "nonfinite": _nonfinite,
    "checkpoint_scanned": _checkpoint_scanned,
    "reduced": _reduced,
    "autopsy": _autopsy,
    "weights": _bad_weights,
}


# ---------------------------------------------------------------- progress


def _progress(message: pb.Progress) -> obs.Progress:
    return obs.Progress(
        incarnation=message.incarnation,
        round=max(0, message.round),
        step=max(0, message.step),
        last_bad_round=_known(message, "last_bad_round"),
        bad_rounds=message.bad_rounds,
        reduced_round=message.reduced_round,
        probe_seconds=_finite(message.probe_seconds),
        train_seconds=_finite(message.train_seconds),
        ended=message.ended,
        malformed_lines=max(0, message.malformed_lines),
        journal_records=message.journal_records,
        dropped={reason: count for reason, count in message.dropped.items() if count > 0},
        faults={part: count for part, count in message.faults.items() if count > 0},
        magnitude=_magnitude(message),
        weights_finite=_known(message, "weights_finite"),
        weights_step=_ordinal(message, "weights_step"),
    )


def _magnitude(message: pb.Progress) -> float | None:
    known = message.HasField("magnitude") and math.isfinite(message.magnitude)
    return message.magnitude if known else None


# ---------------------------------------------------------------- fields


def _known(message: Any, field: str) -> Any:
    """An optional field's value; None when it is absent."""
    return getattr(message, field) if message.HasField(field) else None


def _ordinal(message: Any, field: str) -> int | None:
    """An optional count from 0 on; None when it is absent, or none."""
    number: int | None = _known(message, field)
    return None if number is None or number < 0 else number


def _text(message: Any, field: str, most: int = _NAME) -> str | None:
    """An optional text, cut; None when it is absent."""
    text: str | None = _known(message, field)
    return None if text is None else text[:most]


def _notes(notes: Sequence[str]) -> tuple[str, ...]:
    return tuple(note[:_NOTE] for note in notes[:_LISTED])


def _enum(message: Any, field: str, meanings: Mapping[int, Any], drops: list[DropReason]) -> Any:
    """An optional enum's meaning. A number that has none is counted, never read as a value."""
    number = _known(message, field)
    if number is None:
        return None
    meaning = meanings.get(number)
    if meaning is None:
        drops.append(DropReason.UNKNOWN_ENUM)
    return meaning


def _finite(seconds: float) -> float:
    return seconds if math.isfinite(seconds) and seconds >= 0 else 0.0


def _check_time(message: Any) -> None:
    _check(message.round >= 0 and message.step >= 0, "round or step is negative")


def _check_place(message: Any) -> None:
    """Of what a model saw in a round."""
    _check(message.root >= 0, "the model's ordinal is negative")
    _check_time(message)


def _check_launch(message: Any) -> None:
    _check(bool(message.job and message.launch), "it names no job or no launch")


def _check(holds: bool, complaint: str) -> None:
    if not holds:
        raise _MalformedError(complaint)
