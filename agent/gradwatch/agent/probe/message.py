"""What is journalled of non-finite gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gradwatch.agent.probe.phases.batch import hash_of, pass_of, value_of

if TYPE_CHECKING:
    from gradwatch.agent.probe.model import WatchedModel
    from gradwatch.agent.probe.rounds import BadGradient, BucketFindings, Moment, ReducedFindings

GRADIENTS_PER_RECORD = 16


def nonfinite_message(
    model: WatchedModel, findings: BucketFindings, *, excused: bool, exchanged: bool = False
) -> dict[str, Any]:
    """The `NonFinite` message in its JSON mapping: the earliest gradients first.

    Args:
        model: whose gradients they are.
        findings: of one bucket.
        excused: a GradScaler's overflow, which is no fault.
        exchanged: this process has sent tensors to single ranks, or all to all.
    """
    moment = findings.moment
    placed = []
    for bad in findings.gradients:
        position = moment.order.index(bad.key) if bad.key in moment.order else None
        placed.append((position is None, position or 0, bad))
    placed.sort(key=lambda item: item[:2])
    gradients = []
    for unplaced, position, bad in placed[:GRADIENTS_PER_RECORD]:
        gradient = bad_gradient(model, bad)
        if not unplaced:
            gradient["backward_position"] = position
        gradients.append(gradient)
    message: dict[str, Any] = {
        "root": moment.root,
        "round": moment.round,
        "step": moment.step,
        "bucket": findings.bucket,
        "gradients": gradients,
        "gradients_total": len(findings.gradients),
        "source": model.source,
    }
    origin = findings.origin
    microbatch = moment.microbatch if origin.microbatch is None else origin.microbatch
    batch = moment.batch if origin.batch is None else origin.batch
    if origin.phase is not None:
        message["phase"] = origin.phase
    if excused:
        message["loss_scale_overflow"] = True
    if microbatch is not None:
        message["microbatch"] = microbatch
    if batch is not None:
        message["batch"] = batch
    if exchanged:
        message["exchanged"] = True
    return message | _of_the_loss(findings)


def _of_the_loss(findings: BucketFindings) -> dict[str, Any]:
    """What is known of the loss and of the batch, each where it is."""
    message: dict[str, Any] = {}
    bad = pass_of(findings.passes, findings.origin.microbatch)
    # That of the round is the newest, and one of several micro-batches may be the bad one.
    loss = findings.moment.loss if bad is None or bad.loss is None else bad.loss.loss
    if isinstance(loss, float):
        message["loss"] = loss
    if findings.note:
        message["loss_note"] = findings.note
    if bad is not None and bad.capsule is not None:
        message["batch_hash"] = hash_of(bad.capsule)
        value = value_of(bad.capsule) if findings.origin.phase == "PHASE_INPUT" else None
        if value is not None:
            message["batch_value"] = value
    return message


def reduced_message(
    model: WatchedModel, moment: Moment, findings: ReducedFindings, *, excused: bool
) -> dict[str, Any]:
    """The `Reduced` message in its JSON mapping.

    Args:
        model: whose gradients they are.
        moment: the round's.
        findings: after its reductions.
        excused: a GradScaler's overflow, which is no fault.
    """
    # In the order of the model: keys rise along it.
    bad = sorted(findings.gradients, key=lambda one: one.key)
    message: dict[str, Any] = {
        "root": moment.root,
        "round": moment.round,
        "step": moment.step,
        "gradients": [bad_gradient(model, one) for one in bad[:GRADIENTS_PER_RECORD]],
        "gradients_total": len(findings.gradients),
    }
    if excused:
        message["loss_scale_overflow"] = True
    return message


def bad_gradient(model: WatchedModel, bad: BadGradient) -> dict[str, Any]:
    """The `BadGradient` message in its JSON mapping, without a backward position."""
    info = model.info(bad.key)
    gradient: dict[str, Any] = {
        "parameter": info.name,
        "module": info.module,
        "module_class": info.module_class,
        "numel": info.numel,
        "dtype": info.dtype,
    }
    if bad.value is not None:
        gradient["value"] = bad.value
    if bad.count is not None:
        gradient["count"] = bad.count
    return gradient
