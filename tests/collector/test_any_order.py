"""Whatever the order in which journals arrive, and however often, the verdict is the same."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st

from gradwatch.collector import observations as obs
from gradwatch.collector.model import Cause, Status
from tests.collector.bodies import autopsy, bad_weights, checksum, flight, reduced
from tests.collector.history import Told, batch, gradient, hello, nonfinite, progress

if TYPE_CHECKING:
    from gradwatch.collector.model import Incident, State

# After so many bad rounds in a row the simulated probe only counts them.
IN_FULL = 8


@dataclass(frozen=True)
class Moment:
    """What a rank's spool holds at one time: its journal up to `records`, and its progress file."""

    records: int
    progress: obs.Progress


@dataclass(frozen=True)
class Journal:
    incarnation: str
    bodies: list[obs.Body]
    moments: list[Moment]

    def part(self, start: int, moment: Moment) -> list[obs.Batch | obs.Progress]:
        """What a sidecar sends that has shipped `start` records."""
        bodies = self.bodies[start : moment.records]
        shipped: list[obs.Batch | obs.Progress] = [moment.progress]
        if bodies:
            shipped.insert(0, batch(self.incarnation, start, *bodies))
        return shipped


@dataclass(frozen=True)
class Course:
    """What a job goes through.

    Attributes:
        bad: by round, the ranks that were bad, and the backward position of what they saw.
        reduced: rounds that were bad after the reduction only.
        per_step: rounds that make up one update.
        guarded: the guard skips every update with a bad round.
        in_full: the probes tell all that they see beside their own bad gradients.
        drifts_at: from this round on the parameters of rank 0 are not those of the others.
        models: so many are trained in turn, and their steps are told; 0 for one, as probes of before told it.
    """

    world_size: int
    rounds: int
    bad: dict[int, dict[int, int]]
    reduced: frozenset[int] = frozenset()
    per_step: int = 1
    guarded: bool = False
    in_full: bool = False
    drifts_at: int | None = None
    models: int = 0


def bad(course: Course, rank: int, round_: int, position: int) -> obs.NonFinite:
    """A rank's own bad gradients; of some the weights explain them, of some the batch does."""
    step = round_ // course.per_step
    known = nonfinite(round_, gradient(position=position), step=step)
    if not course.models:
        return known
    chance = random.Random(f"{round_} {rank}")
    return replace(
        known,
        root=round_ % course.models,
        model_step=round_ // course.models // course.per_step,
        weights_finite=chance.choice([True, True, False, None]),
        phase=chance.choice([obs.Phase.INPUT, obs.Phase.LOSS, obs.Phase.PARAMETER, None]),
        batch_hash=chance.choice(["", "a", "b"]),
        loss=chance.choice([None, math.inf, 0.5]),
    )


def of_models(course: Course, rank: int, round_: int) -> list[obs.Body]:
    """What a rank tells of weights, and of clean passes that it has replayed."""
    step, chance = round_ // course.per_step, random.Random(f"weights {round_} {rank}")
    bodies: list[obs.Body] = []
    if rank in course.bad.get(round_, {}):
        doubts = ("module a keeps a lock",)
        bodies.append(
            obs.Rehearsal(round_ % course.models, round_, step, round_, chance.random() < 0.5, doubts)
        )
    # Replicas find the same, and after bad gradients weights may be found bad here and there. Of a run of
    # skipped updates only the newest is remembered, so that bad weights beside it may be told of too early.
    if course.guarded:
        return bodies
    of_all = random.Random(f"weights {round_}").random() < 0.05
    if of_all or (course.bad.get(round_) and chance.random() < 0.3):
        evidence = chance.choice([None, *obs.UpdateEvidence])
        bodies.append(bad_weights(round_, evidence, step=step, root=round_ % course.models))
    return bodies


def beside(course: Course, rank: int, round_: int) -> list[obs.Body]:
    """What a rank tells in a round beside its own bad gradients."""
    step, bad = round_ // course.per_step, course.bad.get(round_, {})
    bodies: list[obs.Body] = []
    if rank in bad:
        bodies += [replace(flight(round_, [1.0] * 4), step=step), replayed(course, rank, round_)]
    elif bad or round_ in course.reduced:
        bodies.append(reduced(round_, step=step))
    if course.models:
        bodies += of_models(course, rank, round_)
    # Its neighbour on the host has left its capsule.
    other = (rank + 1) % course.world_size
    if other in bad:
        bodies.append(replayed(course, other, round_, by=rank))
    # Of no more rounds than are waited for.
    if round_ % (course.rounds // 3 + 1) == 0:
        drifted = rank == 0 and course.drifts_at is not None and round_ >= course.drifts_at
        bodies.append(checksum(round_, 8 if drifted else 7, 3, step=step))
    return bodies


def replayed(course: Course, rank: int, round_: int, by: int | None = None) -> obs.Autopsy:
    """A replay: some are reproduced, some are not, some were brought in by a collective."""
    known = [obs.Replay.REPRODUCED, obs.Replay.FINITE, obs.Replay.RECEIVED]
    kind = known[(round_ + rank) % len(known)] if by is None else known[(round_ + rank + by) % 2]
    return autopsy(rank, round_, kind, step=round_ // course.per_step)


def simulate(course: Course) -> list[Journal]:
    """A job's journals, as its probes write them."""
    all_bad = course.bad.keys() | course.reduced
    journals = []
    for rank in range(course.world_size):
        incarnation = f"r{rank}"
        bodies: list[obs.Body] = [hello(rank, course.world_size)]
        moments = [Moment(1, progress(incarnation, 0, 1))]
        seen, streak, consecutive, last_bad = 0, 0, 0, None
        for round_ in range(course.rounds):
            step = round_ // course.per_step
            position = course.bad.get(round_, {}).get(rank)
            if position is None:
                streak = 0
            else:
                seen += 1
                if streak < IN_FULL:
                    bodies.append(bad(course, rank, round_, position))
                streak += 1
            if course.in_full:
                bodies += beside(course, rank, round_)
            elif round_ in course.reduced:
                bodies.append(reduced(round_, step=step))
            last_bad = round_ if round_ in all_bad else last_bad
            moments.append(
                Moment(
                    len(bodies),
                    progress(
                        incarnation,
                        round_ + 1,
                        len(bodies),
                        step=step,
                        bad_rounds=seen,
                        last_bad_round=last_bad,
                        dropped={"repeated": 1} if seen else {},
                    ),
                )
            )
            if (round_ + 1) % course.per_step == 0:
                bad_ones = [one for one in range(step * course.per_step, round_ + 1) if one in all_bad]
                consecutive = consecutive + 1 if bad_ones else 0
                if bad_ones and course.guarded:
                    skip = obs.Skipped(step, bad_ones[0], consecutive, consecutive, exhausted=False)
                    bodies.append(skip)
        moments.append(Moment(len(bodies), replace(moments[-1].progress, journal_records=len(bodies))))
        journals.append(Journal(incarnation, bodies, moments))
    return journals


def in_step(journals: list[Journal]) -> State:
    """Told as it happens, round by round."""
    told = Told()
    shipped = [0] * len(journals)
    for time in range(len(journals[0].moments)):
        for index, journal in enumerate(journals):
            moment = journal.moments[time]
            told.tell(*journal.part(shipped[index], moment))
            shipped[index] = moment.records
    return told.state


def essence(state: State) -> tuple[object, ...]:
    return (
        sorted((essence_of(incident) for incident in state.incidents.values()), key=repr),
        state.jobs["j"].incidents_confirmed,
        state.jobs["j"].nonfinite_events,
        state.jobs["j"].dropped,
        {key: journal.rank.nonfinite_events for key, journal in state.journals.items() if journal.rank},
    )


def essence_of(incident: Incident) -> tuple[object, ...]:
    return (incident.id, incident.status, incident.evidence, incident.verdict)


@st.composite
def courses(draw: st.DrawFn) -> Course:
    world_size = draw(st.integers(2, 4))
    rounds = draw(st.integers(1, 60))
    bad = draw(
        st.dictionaries(
            st.integers(0, rounds - 1),
            st.dictionaries(st.integers(0, world_size - 1), st.integers(0, 3), min_size=1),
            max_size=IN_FULL - 1,
        )
    )
    # From here on the weights are NaN, and all is.
    for round_ in range(draw(st.integers(0, rounds * 2)), rounds):
        bad[round_] = dict.fromkeys(range(world_size), 0)
    guarded = draw(st.booleans())
    reduced = draw(st.frozensets(st.integers(0, rounds - 1), max_size=3)) if guarded else frozenset()
    return Course(world_size, rounds, bad, reduced, draw(st.sampled_from([1, 1, 2, 3])), guarded)


@settings(max_examples=300, deadline=None)
@given(courses(), st.integers(0, 2**32))
def test_any_order(course: Course, seed: int):
    assert essence(out_of_step(course, seed)) == essence(in_step(simulate(course)))


@settings(max_examples=100, deadline=None)
@given(courses(), st.integers(0, 2**32), st.none() | st.integers(0, 60))
def test_any_order_of_all_that_is_told(course: Course, seed: int, drifts_at: int | None):
    # A replica that drifts apart within a run of skipped updates may be told of before the skips are.
    course = replace(course, in_full=True, drifts_at=None if course.guarded else drifts_at)
    assert essence(out_of_step(course, seed)) == essence(in_step(simulate(course)))


@settings(max_examples=200, deadline=None)
@given(courses(), st.integers(0, 2**32), st.integers(1, 3), st.booleans())
def test_any_order_of_several_models(course: Course, seed: int, models: int, in_full: bool):
    course = replace(course, in_full=in_full, models=models)
    assert essence(out_of_step(course, seed)) == essence(in_step(simulate(course)))


def out_of_step(course: Course, seed: int) -> State:
    """Told by sidecars that each come when they like, and send some of it twice."""
    chance = random.Random(seed)
    journals = simulate(course)
    told = Told()
    shipped = [0] * course.world_size
    at = [0] * course.world_size
    while any(
        at[index] < len(journal.moments) - 1 or not shipped[index] for index, journal in enumerate(journals)
    ):
        index = chance.randrange(course.world_size)
        journal = journals[index]
        at[index] = min(len(journal.moments) - 1, at[index] + chance.randint(1, course.rounds))
        moment = journal.moments[at[index]]
        # Sent but not acknowledged: it comes again, with what has been added since.
        start = chance.randint(0, shipped[index])
        parts = journal.part(start, moment)
        told.tell(*parts)
        if chance.random() < 0.5:
            told.tell(*parts)
        shipped[index] = moment.records
    return told.state


@settings(max_examples=100, deadline=None)
@given(courses())
def test_first_is_the_earliest_of_all(course: Course):
    course = replace(course, reduced=frozenset())
    state = in_step(simulate(course))
    if not course.bad:
        assert not state.incidents
        return
    first_round = min(course.bad)
    position, rank = min((position, rank) for rank, position in course.bad[first_round].items())
    incident = min(state.incidents.values(), key=lambda one: one.evidence.first_round)
    assert incident.verdict.first is not None
    assert (incident.verdict.first.round, incident.verdict.first.rank) == (first_round, rank)
    assert incident.verdict.first.backward_position == position
    at_once = {origin.rank for origin in incident.verdict.origins if origin.round == first_round}
    assert at_once == set(course.bad[first_round])
    others = set(range(course.world_size)) - at_once
    assert set(incident.verdict.clean_ranks) == others - {one.rank for one in incident.verdict.origins}
    if course.per_step == 1:
        assert course.guarded or {one.rank for one in incident.verdict.origins} == at_once


@settings(max_examples=200, deadline=None)
@given(courses())
def test_under_the_guard_an_incident_is_a_run_of_skipped_updates(course: Course):
    course = replace(course, guarded=True)
    state = in_step(simulate(course))
    steps = sorted({round_ // course.per_step for round_ in course.bad.keys() | course.reduced})
    runs: list[list[int]] = []
    for step in steps:
        if runs and step == runs[-1][-1] + 1:
            runs[-1].append(step)
        else:
            runs.append([step])
    incidents = sorted(state.incidents.values(), key=lambda one: one.evidence.first_round)
    assert len(incidents) == len(runs)
    last_step = course.rounds // course.per_step - 1
    for run, incident in zip(runs, incidents, strict=True):
        of_run = {
            round_: ranks
            for round_, ranks in course.bad.items()
            if run[0] <= round_ // course.per_step <= run[-1]
        }
        rounds = of_run.keys() | {
            one for one in course.reduced if run[0] <= one // course.per_step <= run[-1]
        }
        assert incident.evidence.first_round == min(rounds)
        # Where no rank saw it in its own gradients first, the reduction made it.
        in_reduction = min(rounds) not in of_run
        assert (incident.verdict.cause is Cause.REDUCTION) == in_reduction
        # No update was applied: nobody is contaminated, but by what was reduced in the same step.
        same_step = {
            rank for round_, ranks in of_run.items() if round_ // course.per_step == run[0] for rank in ranks
        }
        assert set(incident.verdict.contaminated_ranks) == (same_step if in_reduction else set())
        assert {one.rank for one in incident.verdict.origins} == (
            set() if in_reduction else {rank for ranks in of_run.values() for rank in ranks}
        )
        # Over with the clean update attempt after it, and not before.
        if run[-1] + 2 <= last_step:
            assert incident.status is Status.CLOSED
        if run[-1] >= last_step:
            assert incident.status is not Status.CLOSED
