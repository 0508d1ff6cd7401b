"""Take in what a rank tells beside its own non-finite gradients. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from gradwatch.collector.draft import counted
from gradwatch.collector.model import Cause, Checked, Event, Flown, Kind, Overflow, Replayed, Sighting, Status
from gradwatch.collector.replicas import differing, odd_ones

if TYPE_CHECKING:
    from gradwatch.collector import observations as obs
    from gradwatch.collector.draft import Draft
    from gradwatch.collector.model import AttemptId, RankState

EXPLODING = "exploding"
# Of a job's warnings. The newest tell most.
_WARNINGS = 8
# Warnings that have fewer steps between them are of one stretch, whichever rank gave them.
_STRETCH_STEPS = 10
# Of an attempt; what comes after is counted only.
_STRETCHES = 8
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
            _sighting(rank, Kind.REDUCED, body.step, body.round),
            parameter=None if gradient is None else gradient.parameter,
            module=None if gradient is None else gradient.module,
            module_class=None if gradient is None else gradient.module_class,
            value=None if gradient is None else gradient.value,
            count=None if gradient is None else gradient.count,
            numel=None if gradient is None else gradient.numel,
            dtype=None if gradient is None else gradient.dtype,
            gradients_total=body.gradients_total,
        )
    )


def see_overflow(draft: Draft, rank: RankState, body: obs.OptimizerState) -> None:
    """A finite gradient is too large for the optimizer."""
    draft.news[rank.attempt].sightings.append(
        replace(
            _sighting(rank, Kind.OVERFLOW, body.step, body.round),
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


def see_growth(draft: Draft, rank: RankState, body: obs.Exploding) -> None:
    """A gradient grows far beyond what it usually is; the first that says so of a stretch is told."""
    job, attempt = draft.jobs[rank.attempt.job], draft.attempts[rank.attempt]
    warnings, growths = job.warnings, list(attempt.growths)
    for place, (first, last) in enumerate(growths):
        if first - _STRETCH_STEPS < body.step < last + _STRETCH_STEPS:
            growths[place] = (min(first, body.step), max(last, body.step))
            break
    else:
        if len(growths) < _STRETCHES:
            growths.append((body.step, body.step))
            warnings = (*warnings, (rank.hello.rank, body))[-_WARNINGS:]
    draft.jobs[job.name] = replace(job, warned=counted(job.warned, EXPLODING), warnings=warnings)
    draft.attempts[attempt.id] = replace(attempt, growths=tuple(growths))


def see_flight(draft: Draft, rank: RankState, body: obs.Flight) -> None:
    """How it came to a rank's sighting, which its journal has told before."""
    draft.news[rank.attempt].flown.append(Flown(rank.hello.rank, body))


def see_autopsy(draft: Draft, rank: RankState, body: obs.Autopsy) -> None:
    """A micro-batch has been replayed."""
    draft.news[rank.attempt].replayed.append(Replayed(rank.hello.rank, body))


def see_parameters(draft: Draft, rank: RankState, body: obs.ModelSeen) -> None:
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
                _sighting(rank, Kind.REPLICA, checksum.step, checksum.round),
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


def _sighting(rank: RankState, kind: Kind, step: int, round_: int) -> Sighting:
    hello = rank.hello
    return Sighting(
        rank=hello.rank,
        node=hello.node,
        device=hello.device,
        device_id=hello.device_id,
        step=step,
        round=round_,
        microbatch=None,
        phase=None,
        parameter=None,
        module=None,
        module_class=None,
        value=None,
        count=None,
        numel=None,
        dtype=None,
        backward_position=None,
        gradients_total=0,
        batch=None,
        look=kind.value,
        kind=kind,
    )
