"""From the state to the documents of `schema.py`. Pure.

The HTTP API, the status that is pushed to sidecars and the reader of a state directory
all give these.
"""

from __future__ import annotations

import datetime as dt
import json
import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from gradwatch.collector import schema
from gradwatch.collector.books import NO_BOOKS, Books
from gradwatch.collector.early_warnings import warn_of_growth, warn_of_loss
from gradwatch.collector.evidence import first_step, had_bad_gradients
from gradwatch.collector.model import RankCondition, RankState, Status, faults_of
from gradwatch.collector.observations import DropReason
from gradwatch.collector.runs import is_over
from gradwatch.collector.sentences import tell_before
from gradwatch.collector.title import title_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from gradwatch.collector.model import Incident, JobState, Journal, Launch, Sighting, State
    from gradwatch.collector.observations import BadLoss, BadWeight


def jobs(state: State, books: Books = NO_BOOKS) -> list[schema.JobDocument]:
    """All jobs, by name."""
    return [job(state, name, books) for name in sorted(state.jobs)]


def job(state: State, name: str, books: Books = NO_BOOKS, newest: int | None = None) -> schema.JobDocument:
    """One job.

    Args:
        state: the collector's.
        name: the job's.
        books: what deciding rests on.
        newest: list only so many incidents; None for all.

    Raises:
        KeyError: there is no such job.
    """
    known = state.jobs[name]
    current = None if known.current is None else state.attempts[known.current]
    ranks = current_ranks(state, known)
    conditions = rank_conditions(state, known)
    exit_code, ended_by = _outcome(known.launches.values())
    rounds = [rank.progress.round for rank in ranks if rank.progress is not None]
    known_incidents = list(incidents_of(state, known))
    left_out = 0 if newest is None else max(0, len(known_incidents) - newest)
    journals = [
        journal for journal in state.journals.values() if journal.job == name and journal.run == known.run
    ]
    return schema.JobDocument(
        job=name,
        generation=known.generation,
        attempt=None if current is None else current.id.number,
        attempts=_attempts(state, known),
        run=known.run,
        status="ended" if is_over(known, current, state.journals) else "running",
        world_size=None if current is None else current.world_size,
        ranks_watched=len(ranks),
        ranks=schema.RanksDocument(**{condition.value: conditions[condition] for condition in RankCondition}),
        step=newest_step(ranks),
        round=max(rounds, default=None),
        slowest_step=slowest_step(ranks),
        exit_code=exit_code,
        ended_by=ended_by,
        launches=[_launch(launch) for launch in known.launches.values()],
        overhead=overhead(ranks),
        incidents=[incident(value, books) for value in known_incidents[left_out:]],
        incidents_left_out=left_out,
        **_with_warnings(books.of_job(known), state, known),
        resume=_resume(state, known),
        dropped=dropped(_since(known.dropped, known.dropped_earlier), journals),
        faults=_sum(faults_of(journal) for journal in journals),
        unwatched=[
            schema.UnwatchedDocument(node=one.node, pid=one.pid, rank=one.rank, reason=one.reason)
            for one in known.unwatched
        ],
        first_seen=time_of(known.first_seen),
        last_seen=time_of(known.last_seen),
    )


def incidents(
    state: State,
    books: Books = NO_BOOKS,
    *,
    job: str | None = None,
    status: str | None = None,
    limit: int | None = None,
) -> list[schema.IncidentDocument]:
    """Incidents, newest first.

    Args:
        state: the collector's.
        books: what deciding rests on.
        job: only of that job.
        status: only in that status; "open" stands for suspected and confirmed.
        limit: at most so many.
    """
    wanted = [
        value
        for value in state.incidents.values()
        if job in {None, value.attempt.job} and _has_status(value, status)
    ]
    wanted.sort(key=lambda value: (value.opened_at, value.attempt, value.evidence.first_round), reverse=True)
    return [incident(value, books) for value in wanted[:limit]]


def incident(value: Incident, books: Books = NO_BOOKS) -> schema.IncidentDocument:
    """One incident."""
    verdict = value.verdict
    return schema.IncidentDocument(
        id=value.id,
        title=title_of(value),
        job=value.attempt.job,
        generation=value.attempt.generation,
        attempt=value.attempt.number,
        run=value.run,
        status=value.status.value,
        cause=None if verdict.cause is None else verdict.cause.value,
        step=first_step(value.evidence),
        round=value.evidence.first_round,
        last_round=value.evidence.last_round,
        first=None if verdict.first is None else _origin(verdict.first),
        origins=[_origin(origin) for origin in verdict.origins],
        tie=verdict.tie,
        clean_ranks=list(verdict.clean_ranks),
        unknown_ranks=sorted(verdict.unknown_ranks),
        unknown_reasons={str(rank): reason.value for rank, reason in sorted(verdict.unknown_ranks.items())},
        contaminated_ranks=list(verdict.contaminated_ranks),
        verdict=[*verdict.sentences, *tell_before(verdict)],
        judgement=None if verdict.judgement is None else verdict.judgement.value,
        doubts=list(verdict.doubts),
        likely=[
            schema.GuessDocument(kind=guess.kind.value, because=guess.because, remedy=guess.remedy)
            for guess in verdict.likely
        ],
        flight=_flight(value),
        opened_at=time_of(value.opened_at),
        confirmed_at=None if value.confirmed_at is None else time_of(value.confirmed_at),
        closed_at=None if value.closed_at is None else time_of(value.closed_at),
        close_reason=None if value.close_reason is None else value.close_reason.value,
        decisions=books.decisions_about(value),
    )


def audit(row: Mapping[str, Any]) -> schema.AuditDocument:
    """One row of the audit trail."""
    return schema.AuditDocument(**{**row, "at": time_of(row["at"])})


def event(row: Mapping[str, Any]) -> schema.EventDocument:
    """One row of the store's log."""
    at = row["at"]
    return schema.EventDocument(
        **{**row, "at": None if at is None else time_of(at), "received_at": time_of(row["received_at"])}
    )


def as_json(value: schema.JobDocument, max_bytes: int) -> bytes:
    """A job's document as JSON; the oldest incidents are left out of one that would be too long."""
    text = value.model_dump_json().encode()
    while len(text) > max_bytes and value.incidents:
        left_out = (len(value.incidents) + 1) // 2
        value = value.model_copy(
            update={
                "incidents": value.incidents[left_out:],
                "incidents_left_out": value.incidents_left_out + left_out,
            }
        )
        text = value.model_dump_json().encode()
    return text


# ---------------------------------------------------------------- shared with the metrics


def current_ranks(state: State, job: JobState) -> list[RankState]:
    """The ranks of the attempt that trains now, by rank."""
    if job.current is None:
        return []
    attempt = state.attempts[job.current]
    journals = (state.journals[incarnation] for _, incarnation in sorted(attempt.ranks.items()))
    return [journal.rank for journal in journals if journal.rank is not None]


def rank_conditions(state: State, job: JobState) -> Counter[RankCondition]:
    """How many ranks of the attempt that trains now are in which condition."""
    ranks = current_ranks(state, job)
    conditions = Counter(
        RankCondition.ENDED if rank.progress is not None and rank.progress.ended else RankCondition.WATCHED
        for rank in ranks
    )
    if job.current is not None:
        conditions[RankCondition.MISSING] = state.attempts[job.current].world_size - len(ranks)
    return conditions


def newest_step(ranks: Iterable[RankState]) -> int | None:
    """The step of the rank that is ahead."""
    return max((rank.step for rank in ranks if rank.step is not None), default=None)


def slowest_step(ranks: Iterable[RankState]) -> int | None:
    """The step of the rank that is behind."""
    return min((rank.step for rank in ranks if rank.step is not None), default=None)


def overhead(ranks: Iterable[RankState]) -> schema.OverheadDocument:
    """The probe's own time where it is the largest share of the training's."""
    shares = [
        (rank.progress.probe_seconds / rank.progress.train_seconds, rank.hello.rank, rank.progress)
        for rank in ranks
        if rank.progress is not None and rank.progress.train_seconds > 0
    ]
    if not shares:
        return schema.OverheadDocument(ratio=None, rank=None, probe_seconds=None, train_seconds=None)
    ratio, rank, progress = max(shares, key=lambda share: share[:2])
    return schema.OverheadDocument(
        ratio=ratio, rank=rank, probe_seconds=progress.probe_seconds, train_seconds=progress.train_seconds
    )


def dropped(here: Mapping[str, int], journals: Sequence[Journal]) -> dict[str, int]:
    """What was dropped, by reason: here, and in these journals' probes and sidecars."""
    malformed = DropReason.MALFORMED_LINE.value
    return _sum(
        [
            here,
            *(journal.dropped for journal in journals),
            *({malformed: journal.malformed_lines} for journal in journals if journal.malformed_lines),
        ]
    )


def incidents_of(state: State, job: JobState) -> Iterator[Incident]:
    """A job's incidents in logical order."""
    for attempt in job.attempts:
        for id_ in state.attempts[attempt].incidents:
            yield state.incidents[id_]


# ---------------------------------------------------------------- details


def _origin(sighting: Sighting) -> schema.OriginDocument:
    return schema.OriginDocument(
        rank=sighting.rank,
        node=sighting.node,
        device=sighting.device or None,
        device_id=sighting.device_id,
        step=sighting.step,
        round=sighting.round,
        microbatch=sighting.microbatch,
        phase=None if sighting.phase is None else sighting.phase.value,
        parameter=sighting.parameter,
        module=sighting.module,
        module_class=sighting.module_class,
        value=None if sighting.value is None else sighting.value.value,
        count=sighting.count,
        numel=sighting.numel,
        dtype=sighting.dtype,
        backward_position=sighting.backward_position,
        bad_parameters=sighting.gradients_total,
        batch=_batch(sighting.batch),
        operator=None if sighting.operator is None else sighting.operator.name,
        source=None if sighting.operator is None else sighting.operator.source,
        replay=_replay(sighting),
        look=sighting.look,
        gradient=sighting.gradient,
        bad_weights=[_bad_weight(one) for one in sighting.bad_weights],
        loss=_number(sighting.loss),
        model_step=None if sighting.model is None else sighting.model_step,
        model=None
        if sighting.model is None
        else schema.ModelDocument(
            root=sighting.model.root,
            module_class=sighting.model.module_class,
            ordinal=sighting.model.ordinal,
        ),
        group=list(sighting.group) or None,
        exchanged=sighting.exchanged or sighting.group_unknown,
    )


def _bad_weight(weight: BadWeight) -> schema.BadWeightDocument:
    return schema.BadWeightDocument(
        name=weight.parameter,
        value=None if weight.value is None else weight.value.value,
        count=weight.count,
    )


def _with_warnings(document: dict[str, Any], state: State, known: JobState) -> dict[str, Any]:
    told = [
        *(warn_of_growth(rank, warning) for rank, warning in known.warnings),
        *(
            warn_of_loss(rank, warning)
            for rank, warning in known.bad_losses
            if not _is_of_incident(state, known, warning)
        ),
    ]
    resume = _resume(state, known)
    if resume is not None and resume.honoured is False:
        told.append(
            f"the job was told to resume from {resume.path} and has not opened it: it started from scratch"
        )
    return {**document, "warnings": [*document["warnings"], *told]}


def _is_of_incident(state: State, known: JobState, warning: BadLoss) -> bool:
    """Whether gradients were bad in the round of a bad loss after all, on another rank or reduced."""
    attempts = (state.attempts[attempt] for attempt in known.attempts)
    return any(
        had_bad_gradients(state.incidents[id_].evidence, warning.round)
        for attempt in attempts
        # Rounds begin anew with each attempt.
        if any(first <= warning.step <= last for first, last in attempt.bad_losses)
        for id_ in attempt.incidents
    )


def _resume(state: State, known: JobState) -> schema.ResumeDocument | None:
    """Whether the job has gone back to the checkpoint that it was told to, as its ranks say."""
    said = [one for one in known.resumes if one.run == known.run]
    if not said:
        return None
    newest = max(said, key=lambda one: one.generation)
    honoured = True if newest.opened else None
    current = None if known.current is None else state.attempts[known.current]
    if not newest.opened and current is not None:
        # One rank may open it for all: nothing follows before all have said so.
        heard = newest.ranks >= set(range(current.world_size)) or is_over(known, current, state.journals)
        honoured = False if heard or current.id.generation > newest.generation else None
    return schema.ResumeDocument(path=newest.path, generation=newest.generation, honoured=honoured)


def _replay(sighting: Sighting) -> schema.ReplayDocument | None:
    operator = sighting.operator
    if operator is None:
        return None
    return schema.ReplayDocument(
        phase=None if operator.phase is None else operator.phase.value,
        module=operator.module,
        module_class=operator.module_class,
        code=operator.code,
        inputs=[
            schema.OperatorInputDocument(
                dtype=one.dtype, shape=list(one.shape), min=one.min, max=one.max, nonfinite=one.nonfinite
            )
            for one in operator.inputs
        ],
        missing=list(operator.missing),
    )


def _flight(value: Incident) -> schema.FlightDocument | None:
    """How it came to the first rank's sighting."""
    first = value.verdict.first
    flight = next(
        (flown.flight for flown in value.evidence.flown if first is not None and flown.rank == first.rank),
        None,
    )
    if flight is None:
        return None
    return schema.FlightDocument(
        parameters=list(flight.parameters),
        steps=[
            schema.FlightStepDocument(
                step=step.step,
                round=step.round,
                loss=_number(step.loss),
                loss_scale=_number(step.loss_scale),
                learning_rate=_number(step.learning_rate),
                magnitude=_number(step.magnitude),
                magnitudes=[_number(magnitude) for magnitude in step.magnitudes],
            )
            for step in flight.steps
        ],
        dtype=flight.dtype,
    )


def _number(value: float | None) -> float | str | None:
    """A number as JSON has it: what is not finite in words, as protobuf's mapping writes it."""
    if value is None or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _attempts(state: State, job: JobState) -> int:
    """How many attempts the present generation has had in this run."""
    return sum(
        attempt.generation == job.generation and state.attempts[attempt].run == job.run
        for attempt in job.attempts
    )


def _batch(text: str | None) -> Any:
    """The values that were given to `tag`; as text when that was cut."""
    if text is None:
        return None
    try:
        return json.loads(text)
    except ValueError:
        return text


def _launch(launch: Launch) -> schema.LaunchDocument:
    return schema.LaunchDocument(
        id=launch.id,
        generation=launch.generation,
        node=launch.node,
        pid=launch.pid,
        started_at=None if launch.started_at is None else time_of(launch.started_at),
        ended_at=None if launch.ended_at is None else time_of(launch.ended_at),
        exit_code=launch.exit_code,
        ended_by=launch.ended_by,
        command=launch.command.value,
    )


def _outcome(launches: Collection[Launch]) -> tuple[int | None, str | None]:
    """How the run ended: as the first launch that failed, if one did."""
    ended = [launch for launch in launches if launch.ended_at is not None]
    if not ended or any(launch.ended_at is None for launch in launches):
        return None, None
    outcome = next((launch for launch in ended if launch.exit_code != 0), ended[-1])
    return outcome.exit_code, outcome.ended_by


def _has_status(value: Incident, status: str | None) -> bool:
    if status == "open":
        return value.status is not Status.CLOSED
    return status in {None, value.status.value}


def time_of(seconds: float) -> dt.datetime:
    """Seconds since the epoch as documents tell them."""
    return dt.datetime.fromtimestamp(seconds, tz=dt.timezone.utc)


def _since(counts: Mapping[str, int], earlier: Mapping[str, int]) -> dict[str, int]:
    grown = {key: count - earlier.get(key, 0) for key, count in counts.items()}
    return {key: count for key, count in grown.items() if count}


def _sum(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(sorted(total.items()))
