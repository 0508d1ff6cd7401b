"""Take in what a rank tells beside its own non-finite gradients. Pure."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from gradwatch.collector import observations as obs
from gradwatch.collector.draft import counted
from gradwatch.collector.model import (
    Cause,
    Checked,
    Event,
    Flown,
    Kind,
    KnownModel,
    Overflow,
    Rehearsed,
    Replayed,
    Resume,
    Status,
    Update,
)
from gradwatch.collector.replicas import differing, odd_ones
from gradwatch.collector.sightings import begun, of_gradient, of_weight

if TYPE_CHECKING:
    from gradwatch.collector.draft import Draft
    from gradwatch.collector.model import AttemptId, RankState

EXPLODING, LOSS = "exploding", "loss"
# Of a job's warnings. The newest tell most.
_WARNINGS = 8
# Warnings that have fewer steps between them are of one stretch, whichever rank gave them.
_STRETCH_STEPS = 10
# Of an attempt; what comes after is counted only.
_STRETCHES = 8
# Generations, and models of one attempt, of which something is remembered.
_RESUMES, _MODELS = 4, 256
# Rounds whose checksums are waited for.
_CHECKED_ROUNDS = 4


def see_reduced(draft: Draft, rank: RankState, body: obs.Reduced) -> None:
    """Reduced gradients were bad, and the rank's own were not."""
    if body.loss_scale_overflow:
        job = draft.jobs[rank.attempt.job]
        draft.jobs[job.name] = replace(
            job, nonfinite_events=counted(job.nonfinite_events, Cause.LOSS_SCALE.value)
        )
        return
    gradient = next(iter(body.gradients), None)
    draft.news[rank.attempt].sightings.append(
        replace(
            of_gradient(begun(rank.hello, Kind.REDUCED, body.step, body.round), gradient),
            gradients_total=body.gradients_total,
        )
    )


def see_overflow(draft: Draft, rank: RankState, body: obs.OptimizerState) -> None:
    """A finite gradient is too large for the optimizer."""
    draft.news[rank.attempt].sightings.append(
        replace(
            begun(rank.hello, Kind.OVERFLOW, body.step, body.round),
            parameter=body.parameter,
            module=body.module,
            module_class=body.module_class,
            numel=body.numel,
            dtype=body.dtype,
            gradients_total=body.parameters_total,
            batch=body.batch,
            overflow=Overflow(
                body.magnitude, body.limit, body.local_magnitude, body.optimizer, skipped=body.skipped
            ),
        )
    )


def see_weights(draft: Draft, rank: RankState, body: obs.BadWeights) -> None:
    """Weights are bad, or an update is about to make them so."""
    kind = Kind.WEIGHTS if body.evidence is None else Kind.UPDATE
    gradient = next(iter(body.gradients), None)
    sighting = replace(
        of_gradient(begun(rank.hello, kind, body.step, body.round), gradient),
        phase=obs.Phase.PARAMETER if body.evidence is None else obs.Phase.UPDATE,
        gradients_total=body.gradients_total,
        batch=body.batch,
        root=body.root,
        model_step=body.model_step,
        # What an update is about to do is not done yet.
        weights_finite=False if body.weights or body.evidence is None else None,
        bad_weights=body.weights,
        bad_weights_total=max(body.weights_total, len(body.weights)),
        finite_step=body.finite_step,
        update=Update(
            evidence=body.evidence,
            optimizer=body.optimizer,
            eps=body.eps,
            learning_rate=body.learning_rate,
            gradient=None if gradient is None else gradient.parameter,
            gradients_total=max(body.gradients_total, len(body.gradients)),
            initial=body.initial,
        ),
    )
    if body.weights:
        sighting = of_weight(sighting, body.weights[0], body.gradients)
    draft.news[rank.attempt].sightings.append(sighting)


def see_growth(draft: Draft, rank: RankState, body: obs.Exploding) -> None:
    """A gradient grows far beyond what it usually is; the first that says so of a stretch is told."""
    job, attempt = draft.jobs[rank.attempt.job], draft.attempts[rank.attempt]
    growths, warnings = _with_step(attempt.growths, body.step), job.warnings
    if len(growths) > len(attempt.growths):
        warnings = (*warnings, (rank.hello.rank, body))[-_WARNINGS:]
    draft.jobs[job.name] = replace(job, warned=counted(job.warned, EXPLODING), warnings=warnings)
    draft.attempts[attempt.id] = replace(attempt, growths=growths)


def see_loss(draft: Draft, rank: RankState, body: obs.BadLoss) -> None:
    """A loss is not finite, and all gradients are; the first that says so of a stretch is told."""
    if math.isfinite(body.loss):
        return
    job, attempt = draft.jobs[rank.attempt.job], draft.attempts[rank.attempt]
    stretches, bad_losses = _with_step(attempt.bad_losses, body.step), job.bad_losses
    if len(stretches) > len(attempt.bad_losses):
        bad_losses = (*bad_losses, (rank.hello.rank, body))[-_WARNINGS:]
    draft.jobs[job.name] = replace(job, warned=counted(job.warned, LOSS), bad_losses=bad_losses)
    draft.attempts[attempt.id] = replace(attempt, bad_losses=stretches)


def _with_step(stretches: tuple[tuple[int, int], ...], step: int) -> tuple[tuple[int, int], ...]:
    """The stretches with a step: one of them is longer, or there is one more, unless there are too many."""
    known = list(stretches)
    for place, (first, last) in enumerate(known):
        if first - _STRETCH_STEPS < step < last + _STRETCH_STEPS:
            known[place] = (min(first, step), max(last, step))
            return tuple(known)
    return stretches if len(known) >= _STRETCHES else (*stretches, (step, step))


def see_rehearsal(draft: Draft, rank: RankState, body: obs.Rehearsal) -> None:
    """A clean pass has been replayed, after a bad one of the same rank."""
    draft.news[rank.attempt].rehearsed.append(Rehearsed(rank.hello.rank, body))


def see_resumed(draft: Draft, rank: RankState, body: obs.Resumed) -> None:
    """A rank says whether it has opened what the job was told to go back to."""
    job = draft.jobs[rank.attempt.job]
    attempt = draft.attempts[rank.attempt]
    place = (attempt.run, rank.attempt.generation)
    known = {(one.run, one.generation): one for one in job.resumes}
    before = known.get(place, Resume(place[1], place[0], body.path, opened=False, ranks=frozenset()))
    known[place] = Resume(
        generation=before.generation,
        run=before.run,
        path=max(before.path, body.path),
        opened=before.opened or body.opened,
        ranks=before.ranks if body.opened else before.ranks | {rank.hello.rank},
    )
    newest = tuple(known[key] for key in sorted(known)[-_RESUMES:])
    draft.jobs[job.name] = replace(job, resumes=newest)


def see_model(draft: Draft, rank: RankState, body: obs.ModelSeen) -> None:
    """A model is known by its class and its group; all ranks of the group tell the same."""
    _see_parameters(draft, rank, body)
    attempt = draft.attempts[rank.attempt]
    model = KnownModel(body.root, body.module_class, body.group)
    models = tuple(sorted({*attempt.models, model})[:_MODELS])
    if models != attempt.models:
        draft.attempts[attempt.id] = replace(attempt, models=models)
        draft.news[attempt.id].models = True


def see_flight(draft: Draft, rank: RankState, body: obs.Flight) -> None:
    """How it came to a rank's sighting, which its journal has told before."""
    draft.news[rank.attempt].flown.append(Flown(rank.hello.rank, body))


def see_autopsy(draft: Draft, rank: RankState, body: obs.Autopsy) -> None:
    """A micro-batch has been replayed."""
    draft.news[rank.attempt].replayed.append(Replayed(rank.hello.rank, body))


def _see_parameters(draft: Draft, rank: RankState, body: obs.ModelSeen) -> None:
    """The names of a model's parameters, by which a replica's is named. Rank 0 tells them."""
    if body.parameters:
        for known in draft.parameters:
            if known[0].job == rank.attempt.job and known[0] != rank.attempt:
                draft.parameters[known] = ()
        draft.parameters[rank.attempt, body.root] = tuple(one.name for one in body.parameters)


def see_checksum(draft: Draft, rank: RankState, body: obs.Checksum, seq: int) -> None:
    """A replica tells the checksum of its parameters; with the last rank's they are compared."""
    attempt = draft.attempts[rank.attempt]
    logged = is_checksum_logged(draft, rank.attempt)
    held = [*attempt.checksums, Checked(rank.hello.rank, seq, body, logged)]
    here = {
        one.rank: one for one in held if (one.checksum.root, one.checksum.round) == (body.root, body.round)
    }
    if len(here) < attempt.world_size:
        rounds = sorted({one.checksum.round for one in held})[-_CHECKED_ROUNDS:]
        kept = tuple(one for one in held if one.checksum.round in rounds)
        draft.attempts[rank.attempt] = replace(attempt, checksums=kept)
        return
    kept = tuple(one for one in held if one.checksum.root != body.root or one.checksum.round > body.round)
    odd = odd_ones({number: one.checksum for number, one in here.items()})
    alike_at, diverged = attempt.alike_at, attempt.diverged
    if not odd:
        alike_at, diverged = {**alike_at, str(body.root): body.step}, diverged - {body.root}
    elif body.root not in diverged:
        diverged |= {body.root}
        _diverge(draft, rank, here, odd)
    draft.attempts[rank.attempt] = replace(attempt, checksums=kept, alike_at=alike_at, diverged=diverged)


def is_checksum_logged(draft: Draft, attempt_id: AttemptId) -> bool:
    """Whether a checksum is logged as it comes, as all else is; else it is once it differs from others."""
    incidents = draft.attempts[attempt_id].incidents
    return bool(incidents) and draft.incidents[incidents[-1]].status is not Status.CLOSED


def _diverge(draft: Draft, teller: RankState, here: dict[int, Checked], odd: tuple[int, ...]) -> None:
    attempt = draft.attempts[teller.attempt]
    others = [rank for rank in sorted(here) if rank not in odd] or [odd[0]]
    right = here[others[0]].checksum
    names = draft.parameters.get((attempt.id, right.root), ())
    for number in odd:
        checksum = here[number].checksum
        # The journal that is being read is not in the draft before its batch has been.
        rank = teller if number == teller.hello.rank else draft.journals[attempt.ranks[number]].rank
        if rank is None:
            continue
        other = right.sums
        if checksum is right:
            other = next(one.checksum.sums for one in here.values() if one.checksum.sums != right.sums)
        place = differing(checksum.sums, other)
        name = names[place] if place is not None and place < len(names) else None
        draft.news[attempt.id].sightings.append(
            replace(
                begun(rank.hello, Kind.REPLICA, checksum.step, checksum.round),
                parameter=name,
                module=None if name is None else name.rpartition(".")[0],
                gradients_total=0 if place is None else 1,
                alike_at=attempt.alike_at.get(str(checksum.root)),
            )
        )
    # Logged only when they differ: there is one of each rank in every so many rounds.
    draft.events += [
        Event(
            job=attempt.id.job,
            attempt=attempt.id,
            rank=number,
            incarnation=attempt.ranks[number],
            seq=one.seq,
            at=None,
            received_at=draft.now,
            body=one.checksum,
        )
        for number, one in sorted(here.items())
        if not one.logged
    ]
